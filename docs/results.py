"""Write the results into README.md and two pages of docs from the files of benchmarks/results.

Each has a section between two marks that nothing else is written into, so that every number there
can be traced to a row of a file and to the command that wrote it. A test runs `check`, so that
neither can change alone.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import GRIDS, Shape
from benchmarks.plot import draw, draw_means, machine_of, name_of
from benchmarks.providers import DEFAULT
from benchmarks.report import OURS, PLAIN, by_shape, geometric_mean, ratio
from benchmarks.runs import FLOOR, Row, earlier_run

from . import memory_tables

ROOT = Path(__file__).parents[1]
README, PAGE = ROOT / "README.md", ROOT / "docs" / "performance.md"
MEMORY = ROOT / "docs" / "memory.md"
RESULTS = ROOT / "benchmarks" / "results"
PICTURE, SUMMARY = RESULTS / "cpu.png", RESULTS / "speedup.png"
BEGIN, END = "<!-- results: made by `make readme-results` -->", "<!-- results end -->"
# Files that were written before a run's header had its instruction set, by how their names begin.
INSTRUCTION_SETS = {"cpu-zen3-": "AVX2"}
Run = dict[str, Any]
Kept = Sequence[tuple[Path, Run]]


def runs(folder: Path = RESULTS) -> list[tuple[Path, Run]]:
    """Return the runs of bench_linear kept there, float32 first, each with its file.

    Those under dropout, or over a quantised base, are no part of the tables.
    """
    files = sorted(path for device in GRIDS for path in folder.glob(f"{device}-*.json"))
    read = [(path, _with_instruction_set(path, earlier_run(path))) for path in files]
    found = [(path, run) for path, run in read if not {"dropout", "base"} & run["header"].keys()]
    return sorted(found, key=lambda pair: (pair[1]["rows"][0]["dtype"] != "fp32", pair[0].name))


def model_runs(folder: Path = RESULTS / "models") -> list[Run]:
    """Return the runs of bench_model kept there but for those under dropout."""
    files = sorted(path for path in folder.glob("*.json") if "-memory-" not in path.name)
    read = [_with_instruction_set(path, json.loads(path.read_text())) for path in files]
    return [run for run in read if "dropout" not in run["header"]]


def means(kept: Kept) -> str:
    """Return the README's text: a line for each machine and dtype, geometric means over the grid.

    Raises:
        ValueError: no run of the standard grid with the default providers.

    """
    main = _main(kept)
    columns = sorted({_column(run) for run in main})
    cells = {(machine_of(run), run["rows"][0]["dtype"], _column(run)): run for run in main}
    lines = [
        "Plain layer's time over ours (above 1: ours is faster), and in brackets ours over bare",
        "`F.linear`; geometric means over the shapes of the standard grid:",
        "",
        _line(["machine", "dtype", *(_heading(*column) for column in columns)]),
        _line(["---", "---", *("---:" for _ in columns)]),
    ]
    for machine, dtype in sorted(
        dict.fromkeys(key[:2] for key in cells), key=lambda key: (key[0], key[1] != "fp32", key[1])
    ):
        timed = (cells.get((machine, dtype, column)) for column in columns)
        lines.append(_line([machine, dtype, *map(_two_means, timed)]))
    return "\n".join([*lines, "", f"Measured {_conditions([run for _, run in kept])}."])


def tables(kept: Kept, models: Sequence[Run] = ()) -> str:
    """Return the page's text: the means side by side, then by machine all shapes and the commands.

    Args:
        kept: runs of bench_linear with their files.
        models: runs of bench_model.

    Raises:
        ValueError: no run of the standard grid with the default providers.

    """
    lines = ["### Machines side by side", "", means(kept), ""]
    for machine in sorted(dict.fromkeys(machine_of(run) for run in _main(kept))):
        here = [(path, run) for path, run in kept if machine_of(run) == machine]
        main = _main(here)
        lines += [f"### {machine}", "", *_by_shape(main)]
        if peers := [run for _, run in here if _is_standard(run) and run not in main]:
            lines += ["", *_peers(peers)]
        for run in models:
            if machine_of(run) == machine:
                lines += ["", *_steps(run)]
        commits = dict.fromkeys(str(run["header"]["commit"]) for _, run in here)
        conditions = _conditions([run for _, run in here])
        lines += ["", f"Measured {conditions}, commit {', '.join(commits)}, by:", "", "```"]
        lines += [*(run["header"]["command"] for _, run in here), "```", ""]
    return "\n".join(lines[:-1])


def replaced(page: str, text: str) -> str:
    """Return a page with its section's text replaced.

    Raises:
        ValueError: the marks are not there, once each and in order.

    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(f"the page must have {BEGIN!r} and {END!r} once each")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def made(
    readme: Path = README, page: Path = PAGE, folder: Path = RESULTS, memory_page: Path = MEMORY
) -> dict[Path, str]:
    """Return the whole text that each page should have."""
    kept, models = runs(folder), folder / "models"
    texts = {readme: means(kept), page: tables(kept, model_runs(models))}
    texts[memory_page] = memory_tables.tables(memory_tables.memory_runs(models))
    return {path: replaced(path.read_text(), text) for path, text in texts.items()}


def check(
    readme: Path = README, page: Path = PAGE, folder: Path = RESULTS, memory_page: Path = MEMORY
) -> str | None:
    """Say where a page differs from what the files give; None if none does."""
    for path, should_be in made(readme, page, folder, memory_page).items():
        text = path.read_text()
        pairs = zip(text.splitlines(), should_be.splitlines(), strict=False)
        for number, (is_, should) in enumerate(pairs, 1):
            if is_ != should:
                return f"{path.name}:{number} is {is_!r}, the results give {should!r}"
        if text != should_be:
            return f"{path.name} ends otherwise than the results"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Write the sections and the picture; with --check return 1 and say so if they differ."""
    parser = argparse.ArgumentParser(
        prog="python -m docs.results", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    if args.check:
        if why := check():
            print(f"{why}\nwrite it again: make readme-results", file=sys.stderr)
        return int(why is not None)
    for path, text in made().items():
        path.write_text(text)
    draw([run for _, run in runs()], PICTURE)
    draw_means(_main(runs()), SUMMARY)
    return 0


def _with_instruction_set(path: Path, run: Run) -> Run:
    for begins, instruction_set in INSTRUCTION_SETS.items():
        if path.name.startswith(begins):
            run["header"].setdefault("instruction_set", instruction_set)
    return run


def _main(kept: Kept) -> list[Run]:
    """Return the runs of the standard grid with the default providers; raise if there is none."""
    found = [run for _, run in kept if _is_standard(run) and _providers(run) <= set(DEFAULT)]
    if not found:
        raise ValueError(f"no run of the standard grid and default providers in {len(kept)} files")
    return found


def _column(run: Run) -> tuple[str, int]:
    return run["rows"][0]["mode"], run["header"]["threads"]


def _heading(mode: str, threads: int) -> str:
    return f"{'forward' if mode == 'fwd' else 'training step'}, {threads} thread" + "s" * (
        threads != 1
    )


def _two_means(run: Run | None) -> str:
    if run is None:
        return "-"
    cells = by_shape(run["rows"])
    return f"{_mean(cells, PLAIN, OURS)} ({_mean(cells, OURS, FLOOR)})"


def _conditions(measured: Sequence[Run]) -> str:
    headers = [run["header"] for run in measured]
    dates = sorted({header["date"][:10] for header in headers})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{when} with torch {', '.join(sorted({header['torch'] for header in headers}))}"


def _by_shape(main: Sequence[Run]) -> list[str]:
    """Return the lines on one machine's runs: plain over ours by shape, and the two means."""
    timed = [by_shape(run["rows"]) for run in main]
    lines = [
        "Plain layer's time over ours, by shape (above 1: ours is faster):",
        "",
        _line(["M,K,N,R", *map(name_of, main)]),
        _line(["---", *("---:" for _ in main)]),
    ]
    for shape in dict.fromkeys(shape for cells in timed for shape in cells):
        ratios = (ratio(cells.get(shape, {}), PLAIN, OURS) for cells in timed)
        lines.append(_line([str(shape), *map(_show, ratios)]))
    lines.append(_line(["**geometric mean**", *(f"**{_mean(c, PLAIN, OURS)}**" for c in timed)]))
    return [*lines, _line(["ours over bare `F.linear`", *(_mean(c, OURS, FLOOR) for c in timed)])]


def _peers(compared: Sequence[Run]) -> list[str]:
    """Return the lines on runs with more providers: geometric means over the bare linear."""
    timed = [by_shape(run["rows"]) for run in compared]
    names = dict.fromkeys(row["provider"] for run in compared for row in run["rows"])
    return [
        "Time over bare `F.linear`, geometric means of the same shapes, all providers in turn in",
        "one process (so ours over the plain layer differs from the table above):",
        "",
        _line(["", *(name_of(run) for run in compared)]),
        _line(["---", *("---:" for _ in compared)]),
        *(
            _line([f"`{name}`", *(_mean(cells, name, FLOOR) for cells in timed)])
            for name in names
            if name != FLOOR
        ),
        _line(["plain layer over ours", *(_mean(cells, PLAIN, OURS) for cells in timed)]),
    ]


def _steps(run: Run) -> list[str]:
    """Return the lines on whole fine-tuning steps: tokens per second by model and provider."""
    cells = {(row["model"], row["provider"]): row for row in run["rows"]}
    names, models = ([*dict.fromkeys(key[i] for key in cells)] for i in (1, 0))
    threads = run["header"]["threads"]
    lines = [
        f"Tokens a second of a whole fine-tuning step in float32, {threads} thread"
        f"{'s' * (threads != 1)} (over the plain layer's):",
        "",
        _line(["", *(f"`{name}`" for name in names)]),
        _line(["---", *("---:" for _ in names)]),
    ]
    for model in models:
        rates = [cells[model, name]["tokens_per_s"] for name in names]
        lines.append(_line([model, *(f"{r:.0f} ({r / rates[0]:.2f})" for r in rates)]))
    return [*lines, "", f"By `{run['header']['command']}`."]


def _providers(run: Run) -> set[str]:
    return {row["provider"] for row in run["rows"]}


def _is_standard(run: Run) -> bool:
    shapes = set(by_shape(run["rows"]))
    return any(shapes == set(grids["standard"]) for grids in GRIDS.values())


def _mean(cells: dict[Shape, dict[str, Row]], over: str, under: str) -> str:
    ratios = [value for by in cells.values() if (value := ratio(by, over, under))]
    return _show(geometric_mean(ratios)) if len(ratios) == len(cells) else "-"


def _show(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
