"""What a benchmark's rows come to: ratios, means, the worst shape, and what got slower."""

import pytest

from benchmarks import Shape, report, runs, timing

SHAPE = Shape(6, 32, 48, 4)


def made_row(provider, ms, shape=SHAPE, spread=0.02, saved_mib=0.0):
    times = timing.Times(ms, ms * (1 - spread), ms * (1 + spread))
    return runs.make_row(provider, "cpu", "fp32", "fwd", shape, times, 1.0, saved_mib, 0.5)


@pytest.mark.parametrize(("slowdown", "expected"), [(1.2, True), (1.05, False), (0.5, False)])
def test_compare_finds_a_slowdown_of_a_fifth(slowdown, expected):
    other = Shape(7, 8, 8, 2)
    old = [made_row("lora_ext", 1.0), made_row("linear", 1.0), made_row("linear", 1.0, other)]
    new = [made_row("linear", 1.0), made_row("lora_ext", slowdown), made_row("addmm", 9.0)]
    changes = {change.new["provider"]: change for change in report.compare(old, new)}
    assert set(changes) == {"linear", "lora_ext"}
    assert changes["lora_ext"].ratio == pytest.approx(slowdown)
    assert changes["lora_ext"].regressed is expected
    assert not changes["linear"].regressed


def test_compare_takes_noise_for_noise():
    (change,) = report.compare([made_row("linear", 1.0, spread=0.3)], [made_row("linear", 1.2)])
    assert not change.regressed


def test_compare_shows_the_ratio_without_the_machines_drift():
    old = [
        made_row("linear", 1.0),
        made_row("lora_ext", 2.0),
        made_row("addmm", 1.0, Shape(1, 1, 1, 1)),
    ]
    new = [
        made_row("linear", 2.0),
        made_row("lora_ext", 5.0),
        made_row("addmm", 1.0, Shape(1, 1, 1, 1)),
    ]
    assert report.drift_free(report.compare(old, new)) == [1.0, pytest.approx(1.25), None]


def test_ratios_means_and_worst_shape_come_from_the_rows():
    small, large = Shape(1, 2, 3, 4), Shape(5, 6, 7, 8)
    times = {small: {"linear": 1, "reference": 2, "lora_ext": 4}, large: {"linear": 1}}
    times[large] |= {"reference": 8, "lora_ext": 1, "addmm": 3}
    rows = [made_row(name, ms, shape) for shape, by in times.items() for name, ms in by.items()]
    table = report.ratio_table(rows, ["linear", "reference", "lora_ext"], "title")
    columns = [list(column.cells) for column in table.columns]
    assert columns[:3] == [["1,2,3,4", "5,6,7,8"], ["4.00", "1.00"], ["0.50", "8.00"]]
    assert columns[3] == ["1 ±2%", "1 ±2%"]
    assert report.summary(rows) == [
        "geometric means over linear: reference 4.00, addmm 3.00 (1 of 2 shapes)",
        "geometric means: lora_ext / linear 2.00, reference / lora_ext 2.00",
        "largest error over its limit: linear 0.50, reference 0.50, lora_ext 0.50, addmm 0.50",
        "worst shape: 1,2,3,4: reference / lora_ext 0.50, lora_ext / linear 4.00",
        "slower than reference by more than 3 %: 1,2,3,4 (0.50)",
    ]
