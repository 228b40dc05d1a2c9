"""The picture of a demo run: both loss curves, their difference, the step times and their ratio."""

import math
import os
from collections.abc import Sequence
from typing import Any

from .report import Result, paired_ratio

PLAIN_COLOR, OURS_COLOR, GREY = "#d1702c", "#1f5fa8", "#555555"
ROUNDING = 1e-9  # shown instead of an exact zero, which a logarithmic axis can't show
# Top of the axes of the times, over the median: a machine that stalls for one step of ten times the
# length would flatten all others.
TOP = 2.5


def save_plot(
    plain: Result, ours: Result, path: str | os.PathLike[str], title: str, conditions: str
) -> None:
    """Write a PNG: losses (nats) and their difference on the left, step times (ms) and ratio right.

    Args:
        plain: the run with the plain layer.
        ours: the run with ours, on the same batches.
        path: the file to write.
        title: what was trained, the figure's first line.
        conditions: on what it was measured, the second.

    """
    # Figure and canvas by themselves: no pyplot, so no display and no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 5.4), layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.06))
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}\n{conditions}", x=0.01, ha="left", fontsize=11)
    grid = figure.add_gridspec(2, 2, height_ratios=(3, 1))
    for column, above, below in ((0, _losses, _difference), (1, _times, _ratio)):
        top = figure.add_subplot(grid[0, column])
        bottom = figure.add_subplot(grid[1, column], sharex=top)
        above(top, plain, ours)
        below(bottom, plain, ours)
        top.tick_params(labelbottom=False)
        bottom.set_xlabel("step")
        bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axes in (top, bottom):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color="#dddddd", linewidth=0.6)
            axes.set_axisbelow(True)
        # Above the axes, where no point can lie under it.
        top.legend(
            frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderpad=0, fontsize=9
        )
    figure.savefig(path, dpi=150)


def _losses(axes: Any, plain: Result, ours: Result) -> None:
    steps = range(1, len(plain.losses) + 1)
    # The curves lie on each other: a broad line under a thin one shows both.
    axes.plot(steps, plain.losses, color=PLAIN_COLOR, linewidth=5, alpha=0.5, label=plain.name)
    axes.plot(steps, ours.losses, color=OURS_COLOR, linewidth=1.5, label=ours.name)
    axes.set_ylabel("training loss (nats)")


def _difference(axes: Any, plain: Result, ours: Result) -> None:
    gaps = [abs(a - b) for a, b in zip(plain.losses, ours.losses, strict=True)]
    shown = [max(gap, ROUNDING) for gap in gaps]
    axes.plot(range(1, len(gaps) + 1), shown, color=GREY, linewidth=1.2)
    axes.set_yscale("log")
    axes.set_ylim(ROUNDING, max(1e-5, 3 * max(gaps)))
    axes.set_ylabel("|difference|\n(nats)")


def _times(axes: Any, plain: Result, ours: Result) -> None:
    top_ms = TOP * 1e3 * max(plain.median_step_s, ours.median_step_s)
    for result, color, marker in ((plain, PLAIN_COLOR, "o"), (ours, OURS_COLOR, "s")):
        times_ms = [1e3 * seconds for seconds in result.step_s]
        median_ms = 1e3 * result.median_step_s
        label = f"{result.name}, median {median_ms:.0f} ms"
        _points(axes, times_ms, top_ms, marker, color=color, markersize=4, alpha=0.7, label=label)
        axes.axhline(median_ms, color=color, linewidth=1.2, linestyle="--")
    axes.set_ylim(0, top_ms)
    axes.set_ylabel("time of a step (ms)")


def _ratio(axes: Any, plain: Result, ours: Result) -> None:
    ratios = [a / b for a, b in zip(plain.step_s, ours.step_s, strict=True)]
    middle = paired_ratio(plain, ours)
    top = max(2.0, TOP * middle)
    _points(axes, ratios, top, ".", color=GREY, markersize=5)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.axhline(middle, color=GREY, linewidth=1.2, linestyle="--")
    axes.set_ylim(0, top)
    axes.set_ylabel("plain / ours")


def _points(axes: Any, values: Sequence[float], top: float, marker: str, **style: Any) -> None:
    """Draw a point a step; what lies above `top` as a triangle at the edge."""
    steps = range(1, len(values) + 1)
    inside = [value if value <= top else math.nan for value in values]
    axes.plot(steps, inside, marker, linestyle="none", **style)
    beyond = [step for step, value in zip(steps, values, strict=True) if value > top]
    if beyond:  # an empty line that is not clipped has no bounds, and the layout needs them
        style |= {"label": None, "markersize": 6, "clip_on": False}
        axes.plot(beyond, [top] * len(beyond), "^", linestyle="none", **style)
