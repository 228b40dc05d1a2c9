"""The plots of the benchmarks: which panels a set of runs gives, and that they can be drawn."""

import json
from types import SimpleNamespace

import pytest

from benchmarks import GRIDS, Shape, plot
from benchmarks.finetune.curves import draw_steps
from tests.tools.test_bench_report import made_row


def made_run(shapes, mode="fwd", providers=("linear", "reference", "lora_ext")):
    rows = [made_row(name, 1.0 + i, shape) for shape in shapes for i, name in enumerate(providers)]
    header = {"device": "a CPU", "torch": "2.0", "threads": 1, "commit": "c0ffee", "date": "2026"}
    header["command"] = "python -m benchmarks.bench_linear"
    return {"header": header, "rows": [row | {"mode": mode} for row in rows]}


@pytest.mark.filterwarnings("error")
def test_a_panel_for_each_kind_of_run(tmp_path, capsys):
    runs = [
        made_run(GRIDS["cpu"]["standard"]),
        made_run(GRIDS["cpu"]["standard"], "fwd_bwd"),
        made_run(GRIDS["cpu"]["rows"]),
        made_run(GRIDS["cpu"]["ranks"]),
    ]
    files = []
    for number, run in enumerate(runs):
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps(run))
    picture = tmp_path / "all.png"
    assert plot.main([*map(str, files), "--out", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    titles = json.loads(f"[{capsys.readouterr().out.partition(': ')[2]}]")
    assert titles == [
        "Speedup over the plain layer",
        "Memory of one step",
        "Over bare F.linear, fp32 forward, 1 thread",
        "Time per row, fp32 forward, 1 thread",
        "By rank, fp32 forward, 1 thread",
    ]


def test_a_sweep_varies_one_size_alone():
    assert plot.sweep(made_run(GRIDS["cpu"]["rows"]), "M")
    assert plot.sweep(made_run(GRIDS["cpu"]["rows"]), "R") is None
    assert plot.sweep(made_run(GRIDS["cpu"]["standard"]), "M") is None
    assert plot.sweep(made_run([Shape(1, 2, 3, 4), Shape(2, 2, 3, 4)]), "M") is None


def test_nothing_to_draw_is_said(tmp_path, capsys):
    empty = tmp_path / "empty.json"
    empty.write_text(json.dumps({"header": {}, "rows": []}))
    assert plot.main([str(empty)]) == 1
    assert "plot: no run" in capsys.readouterr().err


def test_each_machine_has_a_panel_of_its_own(tmp_path):
    runs = [made_run(GRIDS["cpu"]["standard"], mode) for mode in ("fwd", "fwd_bwd")]
    runs[1]["header"] |= {"device": "Another(R) CPU", "instruction_set": "AVX2"}
    assert plot.draw(runs, tmp_path / "two.png") == [
        "Speedup over the plain layer\nAnother CPU, AVX2",
        "Speedup over the plain layer\na CPU",
        "Memory of one step",
    ]


def test_means_have_a_line_for_each_machine_and_dtype(tmp_path):
    runs = [made_run(GRIDS["cpu"]["standard"], mode) for mode in ("fwd", "fwd_bwd")]
    plot.draw_means(runs, tmp_path / "means.png")
    assert (tmp_path / "means.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("longest_ms", [200.0, 9000.0], ids=["even", "one step stalls"])
def test_steps_are_drawn(tmp_path, longest_ms):
    path = tmp_path / "made.png"
    of_each = {"losses": [1.0, 0.5, 0.2], "step_ms": [longest_ms, 100.0, 100.0]}
    results = [SimpleNamespace(name=name, **of_each) for name in ("plain", "ours")]
    draw_steps(*results, path, "title\nconditions")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000
