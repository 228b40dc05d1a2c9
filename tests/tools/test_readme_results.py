"""The README's results are those of the committed files."""

import json

import pytest

from benchmarks import GRIDS, readme
from tests.tools.test_plot import made_run


def test_the_readme_shows_what_the_committed_results_give():
    assert readme.check() is None


def test_a_changed_number_is_found(tmp_path):
    text = readme.README.read_text()
    shape = str(GRIDS["cpu"]["standard"][0])
    line = next(line for line in text.splitlines() if line.startswith(f"| {shape} |"))
    digits = line.replace(f"| {shape} | ", f"| {shape} | 9")
    changed = tmp_path / "README.md"
    changed.write_text(text.replace(line, digits))
    assert f"is {digits!r}, the results give {line!r}" in readme.check(changed)


def test_losing_shapes_and_peers_are_in_the_table(tmp_path):
    shapes = GRIDS["cpu"]["standard"]
    run = made_run(shapes, providers=("linear", "lora_ext", "reference"))
    slow = next(r for r in run["rows"] if r["provider"] == "lora_ext" and r["M"] == 2048)
    slow["ms_median"] *= 4
    (tmp_path / "cpu-made.json").write_text(json.dumps(run))
    peers = made_run(shapes, "fwd_bwd", ("linear", "lora_ext", "reference", "addmm"))
    (tmp_path / "cpu-peers.json").write_text(json.dumps(peers))
    text = readme.section(readme.runs(tmp_path))
    assert f"| {shapes[-1]} | 0.38 |" in text
    assert f"| {shapes[0]} | 1.50 |" in text
    assert "| **geometric mean** | **1.34** |" in text  # 1.5 and a twelfth of a quarter
    assert "| `addmm` | 4.00 |" in text
    assert "| `lora_ext` | 2.00 |" in text


def test_a_readme_without_marks_is_refused():
    with pytest.raises(ValueError, match="must have"):
        readme.replaced("no marks", "text")
    with pytest.raises(ValueError, match="no run of the standard grid and default"):
        readme.section([])
