"""A run against an earlier one: a ratio a row, and which rows are regressions."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from .report import FLOOR, Row, geometric_mean

SLOWER = 1.10  # a smaller change is not called a regression
_KEY = ("provider", "device", "dtype", "mode", "M", "K", "N", "R")
_NUMBERS = ("ms_median", "ms_p80")
_CONDITIONS = ("torch", "triton", "device", "threads")


class Change(NamedTuple):
    """One row in both runs; `ratio` is the new median time over the old one."""

    old: Row
    new: Row
    ratio: float

    @property
    def regressed(self) -> bool:
        """More than 10% slower, and outside what the old run's own spread (p80) explains."""
        return self.ratio > SLOWER and self.new["ms_median"] > self.old["ms_p80"]


def read_run(path: Path) -> dict[str, Any]:
    """Read a JSON file of an earlier run.

    Raises:
        OSError: it can't be read.
        ValueError: it is not such a file.

    """
    try:
        run = json.loads(path.read_text())
        rows = run["rows"]
        whole = isinstance(run["header"], dict) and all(
            all(key in row for key in _KEY) and all(row[key] > 0 for key in _NUMBERS)
            for row in rows
        )
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise ValueError(f"{path} is not a file that --json wrote")
    return run


def compare(old: Sequence[Row], new: Sequence[Row]) -> list[Change]:
    """Pair the rows of two runs by provider, device, dtype, mode and shape."""
    before = {tuple(row[key] for key in _KEY): row for row in old}
    pairs = ((before.get(tuple(row[key] for key in _KEY)), row) for row in new)
    return [Change(o, n, n["ms_median"] / o["ms_median"]) for o, n in pairs if o is not None]


def drift_free(changes: Sequence[Change]) -> list[float | None]:
    """Return each change's ratio over that of `linear` at the same shape, None where it has none.

    `linear` is timed in the same rounds, so a machine that is slower as a whole cancels out. Shown
    beside the plain ratio and not part of the verdict.
    """
    sizes = _KEY[1:]
    floors = {
        tuple(c.new[key] for key in sizes): c.ratio for c in changes if c.new["provider"] == FLOOR
    }
    under = (floors.get(tuple(change.new[key] for key in sizes)) for change in changes)
    return [c.ratio / floor if floor else None for c, floor in zip(changes, under, strict=True)]


def print_comparison(console: Console, changes: Sequence[Change], old: dict, new: dict) -> None:
    """Print a line a row that both runs have, then geometric means and the verdict.

    Args:
        console: where to.
        changes: of `compare`.
        old: header of the earlier run.
        new: header of this run.

    """
    title = f"against commit {old.get('commit')} of {old.get('date')}"
    table = Table(title=title, title_justify="left")
    headings = ("provider", "M,K,N,R", "old ms", "new ms", "new / old", f"over {FLOOR}'s", "")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("provider", "") else "right")
    for change, relative in zip(changes, drift_free(changes), strict=True):
        row = change.new
        table.add_row(
            row["provider"],
            ",".join(str(row[size]) for size in "MKNR"),
            f"{change.old['ms_median']:.3g}",
            f"{row['ms_median']:.3g}",
            f"{change.ratio:.2f}",
            "-" if relative is None else f"{relative:.2f}",
            "regression" if change.regressed else "",
            style="bold red" if change.regressed else None,
        )
    console.print(table)
    for key in _CONDITIONS:
        if old.get(key) != new.get(key):
            console.print(f"differs: {key} was {old.get(key)}, is {new.get(key)}", highlight=False)
    providers = dict.fromkeys(change.new["provider"] for change in changes)
    means = (
        (p, geometric_mean([c.ratio for c in changes if c.new["provider"] == p])) for p in providers
    )
    shown = ", ".join(f"{provider} {mean:.2f}" for provider, mean in means)
    console.print(f"geometric means, new / old: {shown}", highlight=False)
    count = sum(change.regressed for change in changes)
    console.print(f"regressions: {count} of {len(changes)} rows", highlight=False)
