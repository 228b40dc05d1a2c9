"""Choosing a regime on a GPU: what is measured, kept and remembered; a stand-in for the timing."""

import json
import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs the compiler, not the interpreter", allow_module_level=True)

from lora_ext.backends.triton import grouping, launches, regimes, tuning
from lora_ext.backends.triton.costs import Problem
from tests.gpu.meta_calls import H100, choice_of, forward_of


@pytest.fixture
def tuner(monkeypatch, tmp_path) -> list:
    """Tuning as on a card, its file in a folder of its own; what is measured is in the list."""
    measured = []
    monkeypatch.setattr(tuning.knobs.cache, "dir", str(tmp_path))
    tuning.tuning_file.cache_clear()
    for name in ("_chosen", "_plans", "_unmeasured"):
        monkeypatch.setattr(tuning, name, {})
    monkeypatch.setattr(tuning, "may_measure", lambda: True)
    monkeypatch.setattr(tuning, "card_of", lambda device: H100)

    def bench(run, **options):
        run()
        measured.append(run)
        return float(-len(measured))  # the last measured wins

    monkeypatch.setattr(tuning.triton.testing, "do_bench", bench)
    monkeypatch.setattr(tuning, "captured", lambda run: run)
    monkeypatch.setattr(launches, "launch", lambda kernel, grid, arguments: None)
    yield measured
    tuning.tuning_file.cache_clear()


def test_tuning_measures_once_a_bucket_and_keeps_the_winner(monkeypatch, tuner):
    best = choice_of(forward_of(8000, 4096, 4096))
    found = regimes.candidates("forward", Problem(8192, 4096, 4096, 16), H100)
    each = len({c.name for c in found})  # one tile of each regime: the cheapest
    assert len(tuner) == each == 6
    assert best[0] == list({c.name: c for c in reversed(found)})[-1]
    assert best[1] == next(c.tile for c in found if c.name == best[0])
    assert choice_of(forward_of(5000, 4096, 4096)) == best
    assert len(tuner) == each  # the same bucket of M

    monkeypatch.setattr(tuning, "_chosen", {})  # another process
    assert choice_of(forward_of(8000, 4096, 4096)) == best
    assert len(tuner) == each
    file = tuning.tuning_file(H100)
    assert len(json.loads(file.read_text())) == 1 and list(file.parent.iterdir()) == [file]

    file.write_text("{ not json")
    monkeypatch.setattr(tuning, "_chosen", {})
    choice_of(forward_of(8000, 4096, 4096))
    assert len(tuner) == 2 * each


def test_the_tuning_file_has_every_candidates_predicted_and_measured_time(tuner):
    chosen = choice_of(forward_of(8000, 4096, 4096))
    (entry,) = json.loads(tuning.tuning_file(H100).read_text()).values()
    found = regimes.candidates("forward", Problem(8192, 4096, 4096, 16), H100)
    predicted = {c.name: c.time_us for c in reversed(found)}
    assert {c["regime"]: c["predicted_us"] for c in entry["candidates"]} == predicted
    assert [c["measured_us"] for c in entry["candidates"]] == [
        -1e3 * (1 + i) for i in range(len(predicted))
    ]
    assert entry["chosen"][0] == chosen[0] and entry["by_graph"] is False


def test_small_problems_are_timed_by_a_graph_and_eagerly_where_none_can_be(monkeypatch, tuner):
    replays = []

    def captured(run):
        replays.append(lambda: run())
        return replays[-1]

    monkeypatch.setattr(tuning, "captured", captured)
    choice_of(forward_of(8000, 4096, 4096))
    assert not replays and len(tuner) == 6
    choice_of(forward_of(16, 4096, 4096))
    assert tuner[6:] == replays and len(replays) == 7

    def refuse(run):
        raise RuntimeError("a capture is under way")

    monkeypatch.setattr(tuning, "captured", refuse)
    choice_of(forward_of(512, 1024, 1024))
    assert len(tuner) == 19
    entries = json.loads(tuning.tuning_file(H100).read_text()).values()
    assert [entry["by_graph"] for entry in entries] == [False, True, False]


def test_a_graph_is_captured_on_a_side_stream_after_a_first_run(monkeypatch):
    """Of torch.cuda what it asks, in order; a device is not at hand."""
    told = []

    class Told:
        def __init__(self, name: str):
            self.name = name

        def __enter__(self):
            told.append(f"in {self.name}")

        def __exit__(self, *error):
            told.append(f"out {self.name}")

        def wait_stream(self, other):
            told.append(f"{self.name} waits for {other.name}")

        def replay(self):
            told.append("replay")

    for name, value in {
        "Stream": lambda: Told("side"),
        "current_stream": lambda: Told("main"),
        "stream": lambda stream: stream,
        "CUDAGraph": lambda: Told("graph"),
        "graph": lambda graph: graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    replay = tuning.captured(lambda: told.append("run") or 7)
    assert told == [
        "side waits for main", "in side", "run", "out side", "main waits for side",
        "in graph", "run", "out graph",
    ]  # fmt: skip
    assert replay() == 7 and told[8:] == ["replay"]


def test_the_tuning_file_is_of_these_kernels(monkeypatch, tuner, tmp_path):
    before = tuning.tuning_file(H100)
    kernels = tmp_path / "kernels"
    kernels.mkdir()
    (kernels / "common.py").write_text("another kernel")
    monkeypatch.setattr(tuning, "__file__", str(kernels / "tuning.py"))
    tuning.tuning_file.cache_clear()
    assert tuning.tuning_file(H100) != before


@pytest.mark.parametrize("error", [RuntimeError("PassManager::run failed"), ValueError("no")])
def test_a_candidate_that_fails_loses_and_the_call_goes_on(monkeypatch, tuner, caplog, error):
    def launch(kernel, grid, arguments):
        if kernel.__name__ != "lora_linear_fwd_in_loop_kernel":
            raise error

    def bench(run, **options):  # the first that runs wins
        run()
        tuner.append(run)
        return float(len(tuner))

    monkeypatch.setattr(tuning.triton.testing, "do_bench", bench)
    monkeypatch.setattr(launches, "launch", launch)
    call = forward_of(512, 4096, 4096)
    assert choice_of(call)[0] == "in_loop"
    assert str(error) in caplog.text and "two_launches" in caplog.text
    y, h = tuning.run_forward(call)
    assert y.shape == (512, 4096) and h.shape == (512, 16)


def test_where_every_kernel_fails_torch_runs(monkeypatch, tuner):
    def launch(kernel, grid, arguments):
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(launches, "launch", launch)
    call = forward_of(512, 4096, 4096)
    assert choice_of(call)[0] in ("addmm", "plain")
    assert tuning.run_forward(call)[0].shape == (512, 4096)


def test_what_was_not_measured_is_not_remembered(monkeypatch, tuner):
    call = forward_of(8000, 4096, 4096)
    monkeypatch.setattr(tuning, "may_measure", lambda: False)
    for _ in range(2):
        tuning.run_forward(call)
    assert not tuner and not tuning._chosen and len(tuning._unmeasured) == 1
    monkeypatch.setattr(tuning, "may_measure", lambda: True)
    for _ in range(2):
        tuning.run_forward(call)
    assert len(tuner) == 6 and len(tuning._chosen) == 1


def test_nothing_is_measured_in_a_capture_or_when_determinism_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    torch.use_deterministic_algorithms(False)
    assert tuning.may_measure()
    torch.use_deterministic_algorithms(True)
    assert not tuning.may_measure()
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not tuning.may_measure()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("LORA_EXT_TUNE", "0")
    assert not tuning.may_measure()


def test_a_group_is_timed_jointly_and_call_after_call_once(monkeypatch, tuner):
    for name in ("_plans", "_unmeasured", "_chosen"):
        monkeypatch.setattr(grouping, name, {})
    monkeypatch.setattr(grouping, "card_of", lambda device: H100)
    launched = []
    monkeypatch.setattr(launches, "launch", lambda kernel, *_: launched.append(kernel.__name__))
    x = forward_of(8192, 4096, 4096).x
    calls = [forward_of(8192, 4096, 4096)._replace(x=x) for _ in range(3)]
    grouping.run_forward(calls)
    # The last measured wins: apart, whose single calls are then timed inside.
    (of_group,) = (
        key for key in json.loads(tuning.tuning_file(H100).read_text()) if "group" in key
    )
    kept = json.loads(tuning.tuning_file(H100).read_text())[of_group]
    assert kept["chosen"] == "apart" and set(kept["measured_us"]) == {"joint", "apart"}
    assert launched.count("lora_linears_shrink_kernel") == 1
    times = len(tuner)
    grouping.run_forward(calls)
    for name in ("_plans", "_chosen"):
        monkeypatch.setattr(grouping, name, {})  # another process
    grouping.run_forward(calls)
    assert len(tuner) == times

    monkeypatch.setattr(grouping, "_plans", {})
    monkeypatch.setattr(tuning, "may_measure", lambda: False)
    grouping.run_forward(calls)  # by its cost
    assert launched.count("lora_linears_shrink_kernel") == 2
