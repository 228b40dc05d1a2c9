"""The results in README.md and docs/performance.md are those of the committed files."""

import json

import pytest

from benchmarks import GRIDS
from docs import results as readme
from tests.tools.test_plot import made_run

SHAPES = GRIDS["cpu"]["standard"]


def keep(folder, **runs):
    for name, run in runs.items():
        (folder / f"cpu-{name.replace('_', '-')}.json").write_text(json.dumps(run))


def test_the_pages_show_what_the_committed_results_give():
    assert readme.check() is None


PAGES = {"readme": readme.README, "page": readme.PAGE, "memory_page": readme.MEMORY}


@pytest.mark.parametrize("page", PAGES)
def test_a_changed_number_is_found(tmp_path, page):
    path = PAGES[page]
    before, begin, text = path.read_text().partition(readme.BEGIN)
    line = next(line for line in text.splitlines() if line.startswith("| ") and ".0" in line)
    digits = line.replace(".0", ".9", 1)
    changed = tmp_path / path.name
    changed.write_text(before + begin + text.replace(line, digits, 1))
    assert f"is {digits!r}, the results give {line!r}" in readme.check(**{page: changed})


def test_runs_under_dropout_stay_out_of_the_tables(tmp_path):
    run = made_run(SHAPES, providers=("linear", "lora_ext", "reference"))
    dropped = run | {"header": run["header"] | {"dropout": 0.05}}
    keep(tmp_path, made=run, dropped=dropped)
    assert [found for _, found in readme.runs(tmp_path)] == [json.loads(json.dumps(run))]
    assert readme.model_runs(tmp_path) == [run]


def test_losing_shapes_and_peers_are_in_the_tables(tmp_path):
    run = made_run(SHAPES, providers=("linear", "lora_ext", "reference"))
    slow = next(r for r in run["rows"] if r["provider"] == "lora_ext" and r["M"] == 2048)
    slow["ms_median"] *= 4
    peers = made_run(SHAPES, "fwd_bwd", ("linear", "lora_ext", "reference", "addmm"))
    keep(tmp_path, made=run, peers=peers)
    text = readme.tables(readme.runs(tmp_path))
    assert f"| {SHAPES[-1]} | 0.38 |" in text
    assert f"| {SHAPES[0]} | 1.50 |" in text
    assert "| **geometric mean** | **1.34** |" in text  # 1.5 and a twelfth of a quarter
    assert "| `addmm` | 4.00 |" in text
    assert "| `lora_ext` | 2.00 |" in text
    means = readme.means(readme.runs(tmp_path))
    assert "| machine | dtype | forward, 1 thread |\n" in means  # no column of peers
    assert "| a CPU | fp32 | 1.34 (2.24) |\n" in means


def test_machines_stand_apart_with_their_instruction_sets(tmp_path):
    old = made_run(SHAPES)
    new, bf16, step = (made_run(SHAPES, "fwd_bwd" if i == 2 else "fwd") for i in range(3))
    for run in (new, bf16, step):
        run["header"]["device"] = "Some(R) CPU 7 Processor"
        run["header"]["instruction_set"] = "AVX512 avx512_bf16"
        run["header"]["threads"] = 2
    for row in bf16["rows"]:
        row["dtype"] = "bf16"
    for row in new["rows"]:
        if row["provider"] == "lora_ext":
            row["ms_median"] /= 2
    keep(tmp_path, zen3_fp32=old, new_fp32=new, new_bf16=bf16, new_step=step)
    kept = readme.runs(tmp_path)
    assert readme.means(kept).splitlines()[3:8] == [
        "| machine | dtype | forward, 1 thread | forward, 2 threads | training step, 2 threads |",
        "| --- | --- | ---: | ---: | ---: |",
        "| Some CPU 7, AVX-512 (bf16) | fp32 | - | 1.33 (1.50) | 0.67 (3.00) |",
        "| Some CPU 7, AVX-512 (bf16) | bf16 | - | 0.67 (3.00) | - |",
        "| a CPU, AVX2 | fp32 | 0.67 (3.00) | - | - |",
    ]
    heads = [line for line in readme.tables(kept).splitlines() if line.startswith("#")]
    assert heads == [
        "### Machines side by side",
        "### Some CPU 7, AVX-512 (bf16)",
        "### a CPU, AVX2",
    ]


def test_a_page_without_marks_is_refused():
    with pytest.raises(ValueError, match="must have"):
        readme.replaced("no marks", "text")
    for make in (readme.means, readme.tables):
        with pytest.raises(ValueError, match="no run of the standard grid and default"):
            make([])
