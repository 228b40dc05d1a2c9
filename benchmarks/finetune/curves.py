"""Draw two training runs: losses, their difference, times of a step."""

from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.plot import COLORS, MARKERS
from benchmarks.report import OURS, PLAIN

GREY = "#555555"
ROUNDING = 1e-9  # shown instead of an exact zero, which a logarithmic axis can't show
TOP = 2.5  # of the axes of times, over the median: one step that stalls would flatten all others


def draw_steps(plain: Any, ours: Any, path: Path, title: str) -> None:
    """Write a PNG of two training runs: losses and their difference left, step times right.

    Args:
        plain: has `name`, `losses` in nats and `step_ms`, of each step; a Result of finetune.
        ours: likewise, of as many steps.
        path: where the PNG goes.
        title: stands above.

    """
    # Figure and canvas by themselves: no pyplot, so no display and no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 5.8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    panels = figure.subplots(2, 2, sharex=True, height_ratios=(3, 1))
    (losses, times), (gaps, quotients) = panels
    steps = range(1, len(plain.losses) + 1)
    # The curves are on top of each other: a broad line under a thin one shows both.
    for run, of, width in ((plain, PLAIN, 5), (ours, OURS, 1.5)):
        style = {"color": COLORS[of], "alpha": 0.7}
        losses.plot(steps, run.losses, linewidth=width, label=run.name, **style)
        label = f"{run.name}, median {median(run.step_ms):.0f} ms"
        times.plot(steps, run.step_ms, MARKERS[of], markersize=4, label=label, **style)
    times.set_ylim(0, TOP * median(plain.step_ms))
    by_step = [(abs(a - b), p / o) for a, b, p, o in zip(
        plain.losses, ours.losses, plain.step_ms, ours.step_ms, strict=True
    )]  # fmt: skip
    shown, ratios = [max(gap, ROUNDING) for gap, _ in by_step], [each for _, each in by_step]
    gaps.semilogy(steps, shown, color=GREY)
    gaps.set_ylim(ROUNDING, max(1e-5, 3 * max(shown)))
    quotients.plot(steps, ratios, ".", color=GREY)
    quotients.axhline(1, color="black", linewidth=0.8)
    quotients.set_ylim(0, TOP * median(ratios))
    names = ("training loss (nats)", "time of a step (ms)", "|difference|\n(nats)", "plain / ours")
    for axes, name in zip(panels.flat, names, strict=True):
        axes.set_ylabel(name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#dddddd", linewidth=0.6)
    for above, below in panels.T:
        below.set_xlabel("step")
        # Above the axes, where no point is under it.
        above.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=9)
    figure.savefig(path, dpi=150)
