"""The benchmark of host time: each line does what it says it does."""

import json

import pytest
import torch

from benchmarks import bench_overhead
from benchmarks.cases import make_case
from benchmarks.grids import Shape
from lora_ext.backends import cpp
from tests.conftest import small_call

pytestmark = pytest.mark.skipif(
    cpp.unsupported(small_call()) is not None, reason="needs the extension"
)
SHAPE = Shape(2, 8, 8, 2)


@pytest.mark.parametrize("mode", ["fwd", "fwd_bwd"])
def test_every_layer_of_the_stack_computes_the_same(mode):
    case = make_case(SHAPE, "cpu", torch.float32, mode)
    with torch.set_grad_enabled(case.training):
        runs = bench_overhead.calls(case)
        order = ["F.linear", "plain layer", "dispatch", "kernel", "functional", "module"]
        if case.training:
            order.insert(4, "Function")
        assert list(runs) == order
        expected = runs["plain layer"]()
        for name in order[4:]:
            got = runs[name]()
            got = (got,) if isinstance(got, torch.Tensor) else got
            for one, other in zip(reversed(got), reversed(expected), strict=False):
                torch.testing.assert_close(one, other, msg=name)


def test_rows_are_written_and_a_slow_layer_shows(tmp_path, monkeypatch, capsys):
    real = bench_overhead.lora_ext.lora_linear

    def slow(*arguments):
        for _ in range(20):
            real(*arguments)
        return real(*arguments)

    monkeypatch.setattr(bench_overhead.lora_ext, "lora_linear", slow)
    file = tmp_path / "overhead.json"
    assert bench_overhead.main(["--seconds", "0.2", "--json", str(file)]) == 0
    rows = [row for row in json.loads(file.read_text())["rows"] if row["mode"] == "fwd"]
    us = {row["layer"]: row["us_median"] for row in rows}
    assert us["functional"] > 5 * us["kernel"]  # 21 calls for one
    assert "fwd 1,64,64,8 float32" in capsys.readouterr().out
