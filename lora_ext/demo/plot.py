"""The picture of a demo run: both loss curves, their difference, and the step times."""

import os
from typing import Any

from .report import Result

PLAIN_COLOR, OURS_COLOR, GREY = "#d1702c", "#1f5fa8", "#555555"
ROUNDING = 1e-9  # shown instead of an exact zero, which a logarithmic axis can't show


def save_plot(plain: Result, ours: Result, path: str | os.PathLike[str], title: str) -> None:
    """Write a PNG: losses (nats) and their difference on the left, times of each step (ms) right.

    Args:
        plain: the run with the plain layer.
        ours: the run with ours, on the same batches.
        path: the file to write.
        title: the figure's first line.

    """
    # Figure and canvas by themselves: no pyplot, so no display and no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    grid = figure.add_gridspec(2, 2, height_ratios=(3, 1), width_ratios=(1, 1))
    top = figure.add_subplot(grid[0, 0])
    _losses(top, plain, ours)
    _difference(figure.add_subplot(grid[1, 0], sharex=top), plain, ours)
    _times(figure.add_subplot(grid[:, 1]), plain, ours)
    figure.savefig(path, dpi=150)


def _losses(axes: Any, plain: Result, ours: Result) -> None:
    steps = range(1, len(plain.losses) + 1)
    # The curves lie on each other: a broad line under a thin one shows both.
    axes.plot(steps, plain.losses, color=PLAIN_COLOR, linewidth=5, alpha=0.5, label=plain.name)
    axes.plot(steps, ours.losses, color=OURS_COLOR, linewidth=1.5, label=ours.name)
    axes.set_ylabel("training loss (nats)")
    axes.tick_params(labelbottom=False)
    axes.legend(frameon=False)
    _plain_frame(axes)


def _difference(axes: Any, plain: Result, ours: Result) -> None:
    gaps = [abs(a - b) for a, b in zip(plain.losses, ours.losses, strict=True)]
    axes.plot(
        range(1, len(gaps) + 1), [max(gap, ROUNDING) for gap in gaps], color=GREY, linewidth=1.2
    )
    axes.set_yscale("log")
    axes.set_ylim(ROUNDING, max(1e-5, 3 * max(gaps)))
    axes.set_ylabel("|difference|\n(nats)")
    axes.set_xlabel("step")
    _plain_frame(axes)


def _times(axes: Any, plain: Result, ours: Result) -> None:
    for result, color, marker in ((plain, PLAIN_COLOR, "o"), (ours, OURS_COLOR, "s")):
        times_ms = [1e3 * seconds for seconds in result.step_s]
        median_ms = 1e3 * result.median_step_s
        label = f"{result.name}: median {median_ms:.0f} ms"
        steps = range(1, len(times_ms) + 1)
        axes.plot(steps, times_ms, marker, color=color, markersize=4, alpha=0.7, label=label)
        axes.axhline(median_ms, color=color, linewidth=1.2, linestyle="--")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_ylabel("time of a step: forward, backward, update (ms)")
    axes.legend(frameon=False, loc="lower right")
    _plain_frame(axes)


def _plain_frame(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
