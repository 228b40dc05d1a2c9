"""What a run says: the table with the two ratios, the means, the change since another run."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from . import Shape
from .runs import FLOOR, KEY, Row

OURS, PLAIN = "lora_ext", "reference"
LOSES = 0.97  # of the plain layer's speed: below it a shape is named as lost
SLOWER = 1.10  # a smaller change is not called a regression
_TABLE_PROVIDERS = 4  # side by side in one table of about 120 columns
_CONDITIONS = "torch triton device instruction_set threads dropout adapters".split()


def wide_console() -> Console:
    """Return a console that cuts no table short where the output is a file or a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=240)


def print_report(
    console: Console, rows: Sequence[Row], providers: Sequence[str], title: str
) -> None:
    """Print the table of a run, a line a shape, and the summary under it."""
    timed = [name for name in providers if any(row["provider"] == name for row in rows)]
    for first in range(0, len(timed), _TABLE_PROVIDERS):
        shown = timed[first : first + _TABLE_PROVIDERS]
        console.print(ratio_table(rows, shown, title if first == 0 else f"{title}, continued"))
    console.print("ms: median ± half of p20 to p80; MiB: peak of one call, results included")
    for line in summary(rows):
        console.print(line, highlight=False)


def ratio_table(rows: Sequence[Row], providers: Sequence[str], title: str) -> Table:
    """Lay out a line a shape: the two ratios, then time, spread and memory by provider."""
    table = Table(title=title, title_justify="left")
    table.add_column("M,K,N,R", no_wrap=True)
    table.add_column(f"{OURS}\n/ {FLOOR}", justify="right", style="bold")
    table.add_column(f"{PLAIN}\n/ {OURS}", justify="right", style="bold")
    for provider in providers:
        table.add_column(f"{provider}\nms", justify="right", no_wrap=True)
        table.add_column("\nMiB", justify="right", style="dim")
    for shape, cells in by_shape(rows).items():
        line = [str(shape), _times(ratio(cells, OURS, FLOOR)), _times(ratio(cells, PLAIN, OURS))]
        for provider in providers:
            line += _cells(cells.get(provider))
        table.add_row(*line)
    return table


def summary(rows: Sequence[Row]) -> list[str]:
    """Return the last lines: geometric means over the shapes, and the worst shape for us."""
    shapes = by_shape(rows)
    lines = []
    others = [p for p in dict.fromkeys(r["provider"] for r in rows) if p not in (OURS, FLOOR)]
    cells = list(shapes.values())
    if others and any(FLOOR in cell for cell in cells):
        shown = ", ".join(f"{p} {_mean(cells, p, FLOOR)}" for p in others)
        lines.append(f"geometric means over {FLOOR}: {shown}")
    ours, gain = _mean(cells, OURS, FLOOR), _mean(cells, PLAIN, OURS)
    lines.append(f"geometric means: {OURS} / {FLOOR} {ours}, {PLAIN} / {OURS} {gain}")
    kept = {p: sum(cell[p].get("saved_mib", 0) for cell in cells if p in cell) for p in others}
    if any(kept.values()):
        shown = ", ".join(f"{provider} {mib:.3g}" for provider, mib in kept.items())
        lines.append(f"kept for the backward beyond x and parameters, all shapes (MiB): {shown}")
    shares: dict[str, float] = {}
    for row in rows:
        if "err_over_limit" in row:
            shares[row["provider"]] = max(shares.get(row["provider"], 0), row["err_over_limit"])
    if shares:
        shown = ", ".join(f"{provider} {share:.2f}" for provider, share in shares.items())
        lines.append(f"largest error over its limit: {shown}")
    gains = {s: g for s, cells in shapes.items() if (g := ratio(cells, PLAIN, OURS))}
    if gains:
        worst = min(gains, key=gains.__getitem__)
        over = f"{OURS} / {FLOOR} {_times(ratio(shapes[worst], OURS, FLOOR))}"
        lines.append(f"worst shape: {worst}: {PLAIN} / {OURS} {_times(gains[worst])}, {over}")
    if losers := [f"{shape} ({gain:.2f})" for shape, gain in gains.items() if gain < LOSES]:
        lines.append(f"slower than {PLAIN} by more than 3 %: {', '.join(losers)}")
    return lines


def by_shape(rows: Iterable[Row]) -> dict[Shape, dict[str, Row]]:
    """Group the rows of one device, dtype and mode: shape -> provider -> row."""
    shapes: dict[Shape, dict[str, Row]] = {}
    for row in rows:
        shape = Shape(*(row[size] for size in Shape._fields))
        shapes.setdefault(shape, {})[row["provider"]] = row
    return shapes


def ratio(cells: dict[str, Row], over: str, under: str) -> float | None:
    """Return the ratio of two providers' median times at one shape, None unless both are there."""
    if over not in cells or under not in cells:
        return None
    return cells[over]["ms_median"] / cells[under]["ms_median"]


def geometric_mean(values: Sequence[float]) -> float | None:
    """Return the geometric mean of positive values, None of none."""
    return math.exp(math.fsum(map(math.log, values)) / len(values)) if values else None


class Change(NamedTuple):
    """One row in both runs; `ratio` is the new median time over the old one."""

    old: Row
    new: Row
    ratio: float

    @property
    def regressed(self) -> bool:
        """More than 10% slower, and outside what the old run's own spread (p80) explains."""
        return self.ratio > SLOWER and self.new["ms_median"] > self.old["ms_p80"]


def compare(old: Sequence[Row], new: Sequence[Row]) -> list[Change]:
    """Pair the rows of two runs by provider, device, dtype, mode and shape."""
    before = {_key(row): row for row in old}
    pairs = ((before[_key(row)], row) for row in new if _key(row) in before)
    return [Change(o, n, n["ms_median"] / o["ms_median"]) for o, n in pairs]


def drift_free(changes: Sequence[Change]) -> list[float | None]:
    """Return each change's ratio over that of `linear` at the same shape, None where it has none.

    `linear` is timed in the same rounds, so a machine that is slower as a whole cancels out. Shown
    next to the plain ratio and not part of the verdict.
    """
    floors = {_key(c.new)[1:]: c.ratio for c in changes if c.new["provider"] == FLOOR}
    under = (floors.get(_key(change.new)[1:]) for change in changes)
    return [c.ratio / floor if floor else None for c, floor in zip(changes, under, strict=True)]


def print_comparison(console: Console, changes: Sequence[Change], old: dict, new: dict) -> None:
    """Print a line a row that both runs have, what differs in their headers, and the verdict."""
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
    by_provider: dict[str, list[float]] = {}
    for change in changes:
        by_provider.setdefault(change.new["provider"], []).append(change.ratio)
    shown = ", ".join(f"{name} {geometric_mean(all_):.2f}" for name, all_ in by_provider.items())
    console.print(f"geometric means, new / old: {shown}", highlight=False)
    count = sum(change.regressed for change in changes)
    console.print(f"regressions: {count} of {len(changes)} rows", highlight=False)


def _key(row: Row) -> tuple:
    return tuple(row[key] for key in KEY)


def _mean(shapes: Sequence[dict[str, Row]], over: str, under: str) -> str:
    """Show a geometric mean, and over how many shapes where that is not all of them."""
    ratios = [r for cells in shapes if (r := ratio(cells, over, under))]
    part = f" ({len(ratios)} of {len(shapes)} shapes)" if 0 < len(ratios) < len(shapes) else ""
    return _times(geometric_mean(ratios)) + part


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _cells(row: Row | None) -> list[str]:
    if row is None:
        return ["-", "-"]
    spread = 50 * (row["ms_p80"] - row["ms_p20"]) / row["ms_median"]
    return [f"{row['ms_median']:.3g} ±{spread:.0f}%", f"{row['peak_mib']:.1f}"]
