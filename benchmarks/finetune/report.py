"""What a run measured, and the table of all runs."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Result:
    """What was measured of one run. Losses in nats, times in seconds, memory in MiB."""

    name: str
    losses: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    before: float | None = None
    after: float | None = None
    linears_s: float | None = None
    peak_mib: float | None = None
    trainable: int = 0
    total: int = 0

    @property
    def median_step_s(self) -> float:
        """Median over the steps."""
        return statistics.median(self.step_s)


def largest_difference(first: Result, second: Result) -> float:
    """Return the largest absolute difference of two runs' losses, in nats; NaN if one is NaN."""
    gaps = [abs(a - b) for a, b in zip(first.losses, second.losses, strict=True)]
    return math.nan if any(map(math.isnan, gaps)) else max(gaps)


def paired_ratio(plain: Result, ours: Result) -> float:
    """Return the median over the steps of plain's time over ours, taken in the same minute.

    Where the machine's speed drifts during the run, this says more than the ratio of the medians.
    """
    return statistics.median(p / o for p, o in zip(plain.step_s, ours.step_s, strict=True))


def rows(
    results: Sequence[Result],
    plain: Result,
    ours: Result,
    metric: str,
    show: Callable[[float], str],
) -> list[list[str]]:
    """Return the table's rows: label, one cell for each run, and plain over ours.

    Args:
        results: the runs, in the order of the columns.
        plain: the one of `results` that runs the plain layer.
        ours: the one that runs ours.
        metric: what the score is.
        show: how a score is printed.

    """

    def row(label: str, cell: Callable[[Result], str], ratio: float | None = None) -> list[str]:
        return [label, *(cell(r) for r in results), "" if ratio is None else f"{ratio:.2f}x"]

    def difference(result: Result) -> str:
        compared = result in (plain, ours) and result is not plain
        return f"{largest_difference(plain, result):.1e}" if compared else ""

    return [
        row(f"{metric} before", lambda r: _or_dash(r.before, show)),
        row(f"{metric} after", lambda r: _or_dash(r.after, show)),
        row(
            "time a step, median (ms)",
            lambda r: f"{1e3 * r.median_step_s:.1f}",
            paired_ratio(plain, ours),
        ),
        row(
            "  in LoRA'd linears, replayed (ms)",
            lambda r: _or_dash(r.linears_s, lambda s: f"{1e3 * s:.1f}"),
            _ratio(plain.linears_s, ours.linears_s),
        ),
        row(
            "peak memory over the model (MiB)",
            lambda r: _or_dash(r.peak_mib, lambda mib: f"{mib:.0f}"),
            _ratio(plain.peak_mib, ours.peak_mib),
        ),
        row("largest loss difference to plain", difference),
        row("trainable parameters", lambda r: f"{r.trainable:,}"),
        row("  of all", lambda r: f"{100 * r.trainable / r.total:.2f} %" if r.total else "-"),
    ]


def table(
    results: Sequence[Result],
    plain: Result,
    ours: Result,
    metric: str,
    show: Callable[[float], str],
    title: str,
) -> Any:
    """Return the rich table of all runs, see `rows`."""
    from rich.table import Table

    made = Table(title=title, title_justify="left")
    made.add_column("")
    for result in results:
        made.add_column(result.name, justify="right", no_wrap=True)
    made.add_column("plain / ours", justify="right", no_wrap=True)
    for cells in rows(results, plain, ours, metric, show):
        made.add_row(*cells)
    return made


def _or_dash(value: float | None, show: Callable[[float], str]) -> str:
    return "-" if value is None else show(value)


def _ratio(first: float | None, second: float | None) -> float | None:
    return first / second if first and second else None
