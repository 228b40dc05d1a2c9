"""Write the README's results section from the JSON files of benchmarks/results, and only from them.

Every number there can so be traced to a row of a file and to the command that wrote it. A test
runs `check`, so that neither can change alone.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import GRIDS, Shape
from .plot import draw, name_of
from .providers import DEFAULT
from .report import FLOOR, OURS, PLAIN, Row, by_shape, earlier_run, geometric_mean, ratio

ROOT = Path(__file__).parents[1]
README, RESULTS = ROOT / "README.md", ROOT / "benchmarks" / "results"
PICTURE = RESULTS / "cpu.png"
BEGIN, END = "<!-- results: made by `make readme-results` -->", "<!-- results end -->"
Run = dict[str, Any]


def runs(folder: Path = RESULTS) -> list[tuple[Path, Run]]:
    """Return the runs of bench_linear kept there, float32 first, each with its file."""
    files = sorted(path for device in GRIDS for path in folder.glob(f"{device}-*.json"))
    found = [(path, earlier_run(path)) for path in files]
    return sorted(found, key=lambda pair: (pair[1]["rows"][0]["dtype"] != "fp32", pair[0].name))


def model_runs(folder: Path = RESULTS / "models") -> list[Run]:
    """Return the runs of bench_model kept there."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def section(kept: Sequence[tuple[Path, Run]], models: Sequence[Run] = ()) -> str:
    """Return the section's text: a table by shape, geometric means, conditions, commands.

    Args:
        kept: runs of bench_linear with their files.
        models: runs of bench_model.

    Raises:
        ValueError: no run of the standard grid.

    """
    grids = [run for _, run in kept if _is_standard(run)]
    main = [run for run in grids if _providers(run) <= set(DEFAULT)]
    if not main:
        raise ValueError(f"no run of the standard grid and default providers in {len(kept)} files")
    tables = [by_shape(run["rows"]) for run in main]
    heads = [name_of(run) for run in main]
    lines = [
        "Plain layer's time over ours, by shape (above 1: ours is faster):",
        "",
        _line(["M,K,N,R", *heads]),
        _line(["---", *("---:" for _ in heads)]),
    ]
    for shape in dict.fromkeys(shape for cells in tables for shape in cells):
        lines.append(
            _line([str(shape), *(_show(ratio(c.get(shape, {}), PLAIN, OURS)) for c in tables)])
        )
    lines.append(_line(["**geometric mean**", *(f"**{_mean(c, PLAIN, OURS)}**" for c in tables)]))
    lines.append(_line(["ours over bare `F.linear`", *(_mean(c, OURS, FLOOR) for c in tables)]))
    if peers := [run for run in grids if run not in main]:
        lines += ["", *_peers(peers)]
    for run in models:
        lines += ["", *_steps(run)]
    lines += ["", f"![{PICTURE.stem}]({PICTURE.relative_to(ROOT)})", ""]
    header = main[0]["header"]
    machines = dict.fromkeys(
        f"{run['header']['device']}, torch {run['header']['torch']}" for _, run in kept
    )
    dates = sorted({run["header"]["date"][:10] for _, run in kept})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    commits = dict.fromkeys(str(run["header"]["commit"]) for _, run in kept)
    lines += [
        f"Measured on {'; '.join(machines)}, {when}, commit {', '.join(commits)}. Each file of",
        f"`{RESULTS.relative_to(ROOT)}/` holds the command that wrote it; the first one's:",
    ]
    lines += ["", "```", header["command"], "```"]
    return "\n".join(lines)


def replaced(readme: str, text: str) -> str:
    """Return the README with its section's text replaced.

    Raises:
        ValueError: the marks are not there, once each and in order.

    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(f"the README must have {BEGIN!r} and {END!r} once each")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def check(readme: Path = README, folder: Path = RESULTS) -> str | None:
    """Say where the README differs from what the files give; None if it does not."""
    text = readme.read_text()
    made = replaced(text, section(runs(folder), model_runs(folder / "models")))
    for number, (is_, should) in enumerate(
        zip(text.splitlines(), made.splitlines(), strict=False), 1
    ):
        if is_ != should:
            return f"{readme.name}:{number} is {is_!r}, the results give {should!r}"
    return None if text == made else f"{readme.name} ends otherwise than the results"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the section and its picture; with --check return 1 and say so if they differ."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.readme", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    if args.check:
        if why := check():
            print(f"{why}\nwrite it again: make readme-results", file=sys.stderr)
        return int(why is not None)
    kept = runs()
    README.write_text(replaced(README.read_text(), section(kept, model_runs())))
    draw([run for _, run in kept], PICTURE)
    return 0


def _peers(compared: Sequence[Run]) -> list[str]:
    """Return the lines on runs with more providers: geometric means over the bare linear."""
    tables = [by_shape(run["rows"]) for run in compared]
    names = dict.fromkeys(row["provider"] for run in compared for row in run["rows"])
    return [
        "Time over bare `F.linear`, geometric means of the same shapes, all providers in turn in",
        "one process (so ours over the plain layer differs from the table above):",
        "",
        _line(["", *(name_of(run) for run in compared)]),
        _line(["---", *("---:" for _ in compared)]),
        *(
            _line([f"`{name}`", *(_mean(cells, name, FLOOR) for cells in tables)])
            for name in names
            if name != FLOOR
        ),
        _line(["plain layer over ours", *(_mean(cells, PLAIN, OURS) for cells in tables)]),
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
