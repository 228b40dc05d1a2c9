"""The benchmark's own promises: what is wrong is not timed, and a run says what it kept."""

import copy
import dataclasses
import json

import pytest
import torch

from benchmarks import (
    DTYPES,
    GRIDS,
    Shape,
    bases,
    bench_linear,
    flops,
    make_case,
    parse_shape,
    providers,
    random_shapes,
    report,
    timing,
)
from lora_ext.testing import LinearWithLoRA
from tests.tools.test_bench_report import SHAPE, made_row

ROW_FIELDS = "provider device dtype mode M K N R ms_median ms_p20 ms_p80".split()
ROW_FIELDS += ["peak_mib", "saved_mib", "tflops", "err_over_limit"]
HEADER_FIELDS = set("torch triton device instruction_set threads commit date command".split())


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two would wait for each other longer than such small shapes take
    yield
    torch.set_num_threads(threads)


def spoiled(change):
    """Return a provider: the plain layer, its results passed through `change`."""

    def build(case):
        step = providers.PROVIDERS["reference"](case)
        return step._replace(run=lambda: change(*step.run()))

    return build


def run(*arguments):
    return bench_linear.main(["--shape", str(SHAPE), "--seconds", "0.02", *arguments])


def test_last_first_runs_the_grid_backwards(monkeypatch, tmp_path, capsys):
    """And what is done is on disk and printed when the run ends early."""
    file, seen = tmp_path / "run.json", []

    def run_shape(shape, *rest, **options):
        if seen:
            raise KeyboardInterrupt
        seen.append(shape)
        return [made_row("linear", 1.0, shape)], []

    monkeypatch.setattr(bench_linear, "run_shape", run_shape)
    assert bench_linear.main(["--last-first", "--json", str(file)]) == 130
    said = capsys.readouterr().out
    assert "geometric means: " in said and str(seen[0]) in said
    assert f"cut after 1 of {len(GRIDS['cpu']['standard'])} shapes" in said
    assert seen == [GRIDS["cpu"]["standard"][-1]]
    assert [row["M"] for row in json.loads(file.read_text())["rows"]] == [seen[0].M]


NAMES = [name for name in providers.PROVIDERS if name not in ("compile", "peft", "loralib")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["fwd", "fwd_bwd"])
def test_every_provider_passes_the_gate_or_says_why_not(mode, dtype):
    rows, not_timed = bench_linear.run_shape(SHAPE, "cpu", dtype, mode, NAMES, 0.01)
    assert not [entry for entry in not_timed if entry["failed"]]
    assert {row["provider"] for row in rows + not_timed} == set(NAMES)


@pytest.mark.parametrize("mode", ["fwd", "fwd_bwd"])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("fp32", {"dropout": 0.3}),
        ("bf16", {"adapter_dtype": torch.float32}),
        ("bf16", {"dropout": 0.3, "adapter_dtype": torch.float32}),
    ],
    ids=["dropout", "wide adapters", "both"],
)
def test_dropout_and_wide_adapters_pass_the_gate(mode, dtype, options):
    names = ["reference", "lora_ext", "cpp", "lora_ext.reference"]
    timed, refused = bench_linear.run_shape(SHAPE, "cpu", dtype, mode, names, 0.01, **options)
    assert {row["provider"] for row in timed} == set(names), refused


@pytest.mark.parametrize("name", ["peft", "loralib", "compile"])
def test_peers_with_dropout_pass_the_gate(name):
    if name != "compile":
        pytest.importorskip(name)
    timed, refused = bench_linear.run_shape(
        SHAPE, "cpu", "fp32", "fwd_bwd", [name], 0.01, dropout=0.3
    )
    assert [row["provider"] for row in timed] == [name], refused


@pytest.mark.parametrize("name", ["reference", "lora_ext"])
def test_a_lost_mask_or_scale_is_wrong(name):
    """The gate draws the provider's own mask: one that drops nothing, or too little, is seen."""
    case = make_case(SHAPE, "cpu", torch.float32, "fwd", dropout=0.3)
    step, undropped = (
        providers.PROVIDERS[name](dataclasses.replace(case, dropout=p)) for p in (0.3, 0.0)
    )
    bench_linear.Gate(case).check(step)
    for wrong in (undropped, step._replace(mask=lambda case: ~step.mask(case))):
        with pytest.raises(bench_linear.Wrong, match="y: max error"):
            bench_linear.Gate(case).check(wrong)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda y, dx, dA, dB: (y * 1.001, dx, dA, dB), "y: max error"),
        (lambda y, dx, dA, dB: (y, dx, torch.zeros_like(dA), dB), "dA: max error"),
        (lambda y, dx, dA, dB: (y, dx, dA, dB / 0.75), "dB: max error"),
        (lambda y, dx, dA, dB: (y, torch.full_like(dx, torch.nan), dA, dB), "dx: max error nan"),
        (lambda y, dx, dA, dB: (y, dx[:1], dA, dB), "dx: (1, 32) torch.float32, not (6, 32)"),
    ],
)
def test_a_wrong_provider_is_reported_and_not_timed(monkeypatch, capsys, tmp_path, change, what):
    monkeypatch.setitem(providers.PROVIDERS, "broken", spoiled(change))
    file = tmp_path / "run.json"
    arguments = ("--providers", "broken,linear", "--mode", "fwd_bwd", "--json", str(file))
    assert run(*arguments) == 1
    assert f"wrong: {what}" in capsys.readouterr().out
    written = json.loads(file.read_text())
    assert [row["provider"] for row in written["rows"]] == ["linear"]
    assert written["not_timed"][0]["provider"] == "broken"


def test_the_base_layer_alone_does_not_pass_as_an_adapted_one():
    case = make_case(SHAPE, "cpu", torch.bfloat16, "fwd")
    gate, base = bench_linear.Gate(case), providers.PROVIDERS["linear"](case)
    gate.check(base, lora=False)
    with pytest.raises(bench_linear.Wrong, match="y: max error"):
        gate.check(base)
    with pytest.raises(bench_linear.Wrong, match="y: max error"):
        gate.check(providers.PROVIDERS["reference"](case), lora=False)


@pytest.mark.parametrize("shape", [SHAPE, Shape(1, 2048, 2048, 16)])
def test_an_fp32_result_with_factors_rounded_to_bf16_is_wrong(shape):
    case = make_case(shape, "cpu", torch.float32, "fwd")
    rounded = dataclasses.replace(case, A=case.A.bfloat16().float())
    with pytest.raises(bench_linear.Wrong, match="y: max error"):
        bench_linear.Gate(case).check(providers.PROVIDERS["reference"](rounded))


def test_the_reference_provider_is_the_reference():
    case = make_case(SHAPE, "cpu", torch.float32, "fwd")
    layer = LinearWithLoRA(bases.frozen_linear(case), SHAPE.R, case.alpha)
    layer.lora.A.data, layer.lora.B.data = case.A, case.B
    assert torch.equal(providers.PROVIDERS["reference"](case).results()["y"], layer(case.x))


def test_json_has_the_fields_and_compares_with_itself(tmp_path, capsys):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    assert run("--json", str(old)) == 0
    written = json.loads(old.read_text())
    assert set(written["header"]) == HEADER_FIELDS
    assert [list(row) for row in written["rows"]] == [ROW_FIELDS] * 3
    for row in written["rows"]:
        assert 0 < row["ms_p20"] <= row["ms_median"] <= row["ms_p80"]

    def against(factor):
        scaled = copy.deepcopy(written)
        for row in scaled["rows"]:
            row.update({k: v * factor for k, v in row.items() if k.startswith("ms_")})
        new.write_text(json.dumps(scaled))
        return run("--compare", str(new))

    assert against(1000) == 0
    assert against(0.001) == 1
    assert "regressions: 3 of 3 rows" in capsys.readouterr().out


def test_peak_is_what_the_plain_layer_holds_at_once():
    x = torch.randn(256, 1024)  # 1 MiB
    assert timing.peak_mib(lambda: x + 1, "cpu") == pytest.approx(1, abs=0.01)
    assert timing.peak_mib(lambda: (x + 1) * (x + 2), "cpu") == pytest.approx(3, abs=0.01)
    assert timing.peak_mib(lambda: ((x + 1) + 1) + 1, "cpu") == pytest.approx(2, abs=0.01)


def test_saved_is_what_the_backward_needs_beyond_inputs():
    x = torch.randn(256, 1024, requires_grad=True)  # 1 MiB
    assert timing.saved_mib(lambda: x.exp(), (x,)) == 1  # its result
    assert timing.saved_mib(lambda: x.sin(), (x,)) == 0  # its input
    assert timing.saved_mib(lambda: x.sin(), ()) == 1
    assert timing.saved_mib(lambda: x.exp().exp()[:1].sin(), (x,)) == 2  # a view counts whole, once


def test_lora_ext_keeps_no_more_than_the_plain_layer():
    case = make_case(SHAPE, "cpu", torch.float32, "fwd_bwd")
    saved = {}
    for name in ("reference", "lora_ext"):
        step = providers.PROVIDERS[name](case)
        saved[name] = timing.saved_mib(step.run, step.held)
    assert 0 < saved["lora_ext"] <= saved["reference"]
    rows = [made_row(name, 1.0, saved_mib=mib * 2**20) for name, mib in saved.items()]
    assert "kept for the backward beyond x and parameters, all shapes (MiB): reference 96" in (
        "\n".join(report.summary([*rows, made_row("linear", 1.0)]))
    )


@pytest.mark.parametrize(("budget_s", "rounds"), [(0.1, 3), (7, 3), (8, 5), (20, 7)])
def test_rounds_are_interleaved_and_fewer_when_slow(monkeypatch, budget_s, rounds):
    now, calls = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def timer(name):
        def sample():
            now[0] += 1.0
            calls.append(name)
            return 1.0

        return sample

    samples = timing.interleave({name: timer(name) for name in "abc"}, budget_s)
    assert [len(values) for values in samples.values()] == [rounds] * 3
    assert "".join(calls).startswith("abccbabca")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "1,2,3"], "four integers M,K,N,R"),
        (["--shape", "1,2,3,0"], "at least 1"),
        (["--providers", "linear,fast"], "no provider 'fast'"),
        (["--seconds", "0"], "positive float"),
        (["--threads", "two"], "positive int"),
        (["--dropout", "1"], "must be from 0 to below 1, got 1.0"),
        (["--adapters", "fp64"], "invalid choice: 'fp64'"),
        (["--compare", "nowhere.json"], "No such file"),
        (["--json", "nowhere/run.json"], "no file can be written"),
    ],
)
def test_bad_arguments_are_named(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        bench_linear.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_random_shapes_follow_from_their_seed():
    shapes = random_shapes(200, 1)
    assert shapes == random_shapes(200, 1) != random_shapes(200, 2)
    for values, least, most in zip(
        zip(*shapes, strict=True), (1, 32, 32, 1), (4096, 4096, 4096, 128), strict=True
    ):
        assert least <= min(values) < 4 * least and most / 2 < max(values) <= most


def test_grids_hold_twelve_shapes_and_work_is_counted():
    assert all(len(set(grid["standard"])) == 12 for grid in GRIDS.values())
    assert all(set(grid["quick"]) < set(grid["standard"]) for grid in GRIDS.values())
    for grid in GRIDS.values():
        assert {shape.K for shape in grid["strides"]} == {1024, 2048, 3072, 4096}
    assert parse_shape("1, 2,3,4") == Shape(1, 2, 3, 4)
    assert flops(Shape(1, 2, 3, 4), "fwd") == 2 * 6 + 2 * 4 * 5
    assert flops(Shape(1, 2, 3, 4), "fwd_bwd", lora=False) == 4 * 6
