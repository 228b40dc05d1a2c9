"""`python -m benchmarks.routes`: each way is timed, and the table's wrong entries are named."""

import pytest
import torch

_C = pytest.importorskip("lora_ext._C", reason="needs the built extension")

from benchmarks import Shape, routes  # noqa: E402

SHAPE = Shape(8, 64, 64, 4)


def result(noise: float = 1.01, **ms: float) -> routes.Result:
    return routes.Result("fp32", "y", SHAPE, "strips", ms, noise)


def test_an_entry_is_wrong_when_another_way_beats_the_table_by_more_than_the_noise():
    assert result(strips=2.0, library=1.0).wrong
    assert not result(strips=1.0, library=2.0).wrong
    assert not result(strips=1.02, library=1.0).wrong, "less than the least gain"
    assert not result(strips=2.0, library=1.0, noise=2.5).wrong


def test_a_wrong_entry_is_named_with_its_field_and_worst_shape():
    found = [result(strips=2.0, library=1.0), result(strips=1.5, dots=1.0), result(strips=1.0)]
    base, rows = routes.wrong_entries(found)
    value = _C.route("float32")["dot_rows"]
    assert f"fp32: library_base is {_C.route('float32')['library_base']}" in base
    assert "2.00 times as fast by library as by strips (1 of 3 shapes)" in base
    assert f"fp32: dot_rows is {value}" in rows and "8,64,64,4" in rows
    assert routes.wrong_entries([result(strips=1.0, library=2.0)]) == []


def test_every_way_of_every_product_is_timed_and_the_table_is_left_as_it_was(capsys):
    torch.manual_seed(0)
    before = [_C.way(product, "float32", 8, 64, 4) for product in _C.ways()]
    code = routes.main(["--dtype", "fp32", "--shape", "8,64,64,4", "--seconds", "0.02"])
    printed = capsys.readouterr().out
    assert 0 <= code <= 9
    for product in ("y", "dx", "shrink", "gradient"):
        assert product in printed
    assert [_C.way(product, "float32", 8, 64, 4) for product in _C.ways()] == before


def test_a_wrong_argument_is_named(capsys):
    with pytest.raises(SystemExit):
        routes.main(["--dtype", "fp8"])
    assert "fp8" in capsys.readouterr().err
