"""The benchmark of host time: each line does what it says it does, and frames are counted right."""

import json
import os

import pytest
import torch

from benchmarks import bench_overhead
from lora_ext.backends import cpp
from tests.conftest import small_call

pytestmark = pytest.mark.skipif(
    cpp.unsupported(small_call()) is not None, reason="needs the extension"
)
SHAPE = (2, 8, 12, 2)
HERE = os.path.dirname(__file__) + os.sep


@pytest.mark.parametrize("mode", ["fwd", "fwd_bwd"])
def test_every_layer_of_the_stack_computes_the_same(mode):
    with torch.set_grad_enabled(mode == "fwd_bwd"):
        runs = bench_overhead.layers(mode, SHAPE)
        names = ["F.linear", "plain layer", "dispatch", "kernel", "functional", "module"]
        assert list(runs) == names
        results = {name: run() for name, run in runs.items()}
    for name in ("kernel", "functional", "module"):
        for got, want in zip(results[name], results["plain layer"], strict=name == "functional"):
            want, got = (t if t.dim() else t[None] for t in (want, got))
            if got.shape == want.shape:
                torch.testing.assert_close(got, want, msg=name)
    assert len(results["dispatch"][0]) == 0


def outer():
    inner()
    return [inner() for _ in range(1)]


def inner():
    return os.path.basename(HERE)


def test_frames_of_the_package_are_counted_with_files_and_depth(monkeypatch):
    monkeypatch.setattr(bench_overhead, "PACKAGE", HERE)
    counted = bench_overhead.count(outer)
    comprehension = outer.__code__.co_consts and any(
        getattr(const, "co_name", "") == "<listcomp>" for const in outer.__code__.co_consts
    )
    assert counted["calls"] == 3 + comprehension
    assert counted["deepest"] == 2 + comprehension
    assert counted["files"] == [os.path.basename(__file__)]
    assert bench_overhead.count(lambda: os.path.basename(HERE))["calls"] == 1  # the lambda


def test_rows_are_written_and_a_slow_layer_shows(tmp_path, monkeypatch, capsys):
    real = bench_overhead.lora_ext.lora_linear

    def slow(*arguments):
        for _ in range(20):
            real(*arguments)
        return real(*arguments)

    monkeypatch.setattr(bench_overhead.lora_ext, "lora_linear", slow)
    file = tmp_path / "overhead.json"
    assert bench_overhead.main(["--seconds", "0.2", "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    us = {row["layer"]: row["us_median"] for row in written["rows"] if row["mode"] == "fwd"}
    assert us["functional"] > 5 * us["kernel"]  # 21 calls for one
    assert "fwd (1, 64, 64, 8) float32" in capsys.readouterr().out
    by_way = {row["way"]: row for row in written["ways"]}
    assert {"forward", "step", "autocast step", "tensor-parallel step"} <= set(by_way)
    assert by_way["step"]["calls"] > by_way["forward"]["calls"] >= by_way["forward"]["deepest"] > 1
    for row in by_way.values():
        assert {"layers.py", "functional.py", "distributed.py"} & set(row["files"]), row["way"]
        assert 0 < row["us_p20"] <= row["us_median"]


def test_bad_shape_is_named(capsys):
    with pytest.raises(SystemExit):
        bench_overhead.main(["--shape", "1,2,3"])
    assert "must be four integers M,K,N,R, got '1,2,3'" in capsys.readouterr().err
