"""Draw runs of bench_linear: speedup, time by rows and rank, memory."""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from . import Shape, flops, writable
from .report import OURS, PLAIN, by_shape, geometric_mean, ratio
from .runs import FLOOR, Row, earlier_run

Cells = dict[Shape, dict[str, Row]]
# Told apart on white by most kinds of colour vision, and by their markers.
COLORS = {OURS: "#1f5fa8", PLAIN: "#d1702c", "compile": "#7a4fa3", "addmm": "#2f8f5b"}
COLORS |= {"peft": "#a33b52", "loralib": "#8a7a2a", FLOOR: "#777777"}
MARKERS = {OURS: "s", PLAIN: "o", "compile": "^", "addmm": "D", "peft": "v", "loralib": "P"}
RUN_COLORS = (
    "#1f5fa8",
    "#d1702c",
    "#2f8f5b",
    "#7a4fa3",
    "#a33b52",
    "#8a7a2a",
    "#3fa7a0",
    "#444444",
)
SWEEP = 4  # so many sizes of M or R, all else equal, are a sweep


def name_of(run: dict[str, Any]) -> str:
    """Return what a run timed, for a legend: dtype, mode, threads."""
    row, threads = run["rows"][0], run["header"]["threads"]
    mode = "forward" if row["mode"] == "fwd" else "forward + backward"
    return f"{row['dtype']} {mode}, {threads} thread{'s' * (threads != 1)}"


def machine_of(run: dict[str, Any]) -> str:
    """Return what a run was timed on: the processor, and its instruction set where that is kept."""
    header = run["header"]
    name = re.sub(r"\((R|TM)\)| Processor$", "", header["device"])
    level, *more = header.get("instruction_set", "").replace("AVX512", "AVX-512").split() or [""]
    features = ", ".join(feature.removeprefix("avx512_") for feature in more)
    return ", ".join(filter(None, [name, f"{level} ({features})" if features else level]))


def sweep(run: dict[str, Any], size: str) -> Cells | None:
    """Return the run's cells if it varies `size`, "M" or "R", alone; else None."""
    cells = by_shape(run["rows"])
    others = {tuple(getattr(shape, s) for s in Shape._fields if s != size) for shape in cells}
    return cells if len(cells) >= SWEEP and len(others) == 1 else None


def draw(runs: Sequence[dict[str, Any]], path: Path) -> list[str]:
    """Write a PNG of those panels that the runs have data for; return their titles.

    Raises:
        ValueError: no panel can be drawn.

    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Of runs that timed the same, the one with the fewest providers is the least disturbed.
    runs = sorted(runs, key=lambda run: (run["rows"][0]["dtype"] != "fp32", name_of(run)))
    machines = dict.fromkeys(machine_of(run) for run in runs)
    on = {machine: f"\n{machine}" if len(machines) > 1 else "" for machine in machines}
    by_rows, by_rank = (
        [(name_of(run) + on[machine_of(run)], cells) for run in runs if (cells := sweep(run, size))]
        for size in "MR"
    )
    grids: dict[str, dict[str, dict[str, Any]]] = {}
    for run in runs:
        if not sweep(run, "M") and not sweep(run, "R"):
            here = grids.setdefault(machine_of(run), {})
            other = here.setdefault(name_of(run), run)
            here[name_of(run)] = min(other, run, key=lambda run: len(run["rows"]))
    panels: dict[str, Callable[[Any], int | None]] = {}
    for machine, here in sorted(grids.items()):
        title = f"Speedup over the plain layer{on[machine]}"
        panels[title] = lambda axes, here=here: _speedup(axes, list(here.values()))
    all_ = [run for here in grids.values() for run in here.values()]
    if training := [run for run in all_ if run["rows"][0]["mode"] == "fwd_bwd"]:
        panels["Memory of one step"] = lambda axes: _memory(axes, training[0])
    for name, cells in by_rows:
        panels[f"Over bare F.linear, {name}"] = lambda axes, c=cells: _over_linear(axes, c, "M")
        panels[f"Time per row, {name}"] = lambda axes, c=cells: _time_per_row(axes, c)
    for name, cells in by_rank:
        panels[f"By rank, {name}"] = lambda axes, c=cells: _over_linear(axes, c, "R")
    if not panels:
        raise ValueError("no run with a provider and its peers to draw")
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(6.2 * across, 4.4 * down), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    for index, (title, panel) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(down, across, index)
        lines_between = panel(axes) or 0
        axes.set_title(title, loc="left", fontsize=10, pad=6 + 12 * lines_between)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
    figure.supxlabel(caption(runs), fontsize=7, color="#555555", x=0.01, ha="left")
    figure.savefig(path, dpi=110)
    return list(panels)


def draw_means(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a PNG with a line for each machine and dtype: geometric means, and the range of shapes.

    Args:
        runs: of one grid, with the plain layer and ours in them; those of one thread are drawn.
        path: of the PNG.

    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs = [run for run in runs if run["header"]["threads"] == 1]
    lines = list(dict.fromkeys((machine_of(run), run["rows"][0]["dtype"]) for run in runs))
    figure = Figure(figsize=(7.5, 1.2 + 0.55 * len(lines)), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    modes = {"fwd": ("forward", COLORS[OURS], -0.15), "fwd_bwd": ("training step", "#d1702c", 0.15)}
    for run in runs:
        row = run["rows"][0]
        cells = by_shape(run["rows"]).values()
        gains = [gain for cell in cells if (gain := ratio(cell, PLAIN, OURS)) is not None]
        label, color, shift = modes[row["mode"]]
        at, mean = lines.index((machine_of(run), row["dtype"])) + shift, geometric_mean(gains) or 0
        axes.plot([min(gains), max(gains)], [at, at], color=color, linewidth=2, alpha=0.35)
        axes.plot(mean, at, "o", color=color, label=label)
        above = 5 if shift < 0 else -12  # where the other mode's line is not
        axes.annotate(
            f"{mean:.2f}x", (mean, at), (0, above), textcoords="offset points", fontsize=7
        )
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.set_yticks(range(len(lines)), [f"{machine}\n{dtype}" for machine, dtype in lines])
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.set_xlabel("plain layer's time over ours, one thread: mean, range")
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(handles.values(), handles, loc="upper right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    figure.savefig(path, dpi=110)


def caption(runs: Iterable[dict[str, Any]]) -> str:
    """Return the conditions of all runs, those that are the same named once."""
    headers = [run["header"] for run in runs]
    parts = []
    for key in ("device", "torch", "commit", "date"):
        values = dict.fromkeys(str(h[key])[:10] if key == "date" else str(h[key]) for h in headers)
        parts.append(f"{key} {', '.join(values)}")
    return "; ".join(parts)


def _speedup(axes: Any, runs: Sequence[dict[str, Any]]) -> int:
    """Draw the panel; return how many lines its legend takes between axes and title."""
    shapes = list(dict.fromkeys(shape for run in runs for shape in by_shape(run["rows"])))
    for run, color in zip(runs, RUN_COLORS * len(runs), strict=False):
        cells = by_shape(run["rows"])
        points = [(ratio(cells.get(shape, {}), PLAIN, OURS), shape) for shape in shapes]
        known = [(value, shapes.index(shape)) for value, shape in points if value is not None]
        axes.plot(*zip(*known, strict=True), "o", color=color, label=name_of(run), alpha=0.8)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.set_yticks(range(len(shapes)), map(str, shapes), fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("plain layer's time over ours (right of 1: ours is faster)")
    axes.set_ylabel("M,K,N,R")
    # Above the axes, where no point is under it.
    axes.legend(fontsize=7, ncols=2, frameon=False, loc="lower left", bbox_to_anchor=(0, 1))
    return -(-len(runs) // 2)


def _memory(axes: Any, run: dict[str, Any]) -> None:
    cells = by_shape(run["rows"])
    shapes = list(cells)
    for provider in (PLAIN, OURS):
        values = [cells[s][provider]["peak_mib"] if provider in cells[s] else 0 for s in shapes]
        axes.plot(
            range(len(shapes)), values, MARKERS[provider], color=COLORS[provider], label=provider
        )
    axes.set_yscale("log")
    axes.set_xticks(range(len(shapes)), map(str, shapes), rotation=60, ha="right", fontsize=7)
    axes.set_xlabel("M,K,N,R")
    axes.set_ylabel(f"peak beyond inputs (MiB)\n{name_of(run)}")
    axes.legend(fontsize=7)


def _over_linear(axes: Any, cells: Cells, size: str) -> None:
    providers = dict.fromkeys(name for by in cells.values() for name in by if name != FLOOR)
    for name in providers:
        points = [(getattr(shape, size), ratio(by, name, FLOOR)) for shape, by in cells.items()]
        known = [(x, value) for x, value in points if value is not None]
        axes.plot(
            *zip(*known, strict=True), marker=MARKERS.get(name, "x"), label=name, markersize=4,
            color=COLORS.get(name), linewidth=1.2,
        )  # fmt: skip
    mode = next(iter(next(iter(cells.values())).values()))["mode"]
    work = [flops(shape, mode) / flops(shape, mode, lora=False) for shape in cells]
    at = [getattr(shape, size) for shape in cells]
    axes.plot(at, work, "--", color=COLORS[FLOOR], linewidth=1, label="FLOPs of the adapted layer")
    axes.axhline(1, color="black", linewidth=1)
    _sizes_below(axes, cells, size)
    axes.set_ylabel("time over bare F.linear's")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7)


def _time_per_row(axes: Any, cells: Cells) -> None:
    for name in dict.fromkeys(name for by in cells.values() for name in by):
        known = {shape.M: by[name]["ms_median"] for shape, by in cells.items() if name in by}
        us = [ms * 1e3 / M for M, ms in known.items()]
        axes.plot(
            list(known), us, marker=MARKERS.get(name, "x"), label=name, markersize=4,
            color=COLORS.get(name), linewidth=1.2,
        )  # fmt: skip
    axes.set_yscale("log")
    _sizes_below(axes, cells, "M")
    axes.set_ylabel("microseconds per row of x")
    axes.legend(fontsize=7)


def _sizes_below(axes: Any, cells: Cells, size: str) -> None:
    """Label the axis of a sweep of `size`."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    shape = next(iter(cells))
    fixed = ", ".join(f"{s}={getattr(shape, s)}" for s in Shape._fields if s != size)
    axes.set_xlabel(f"{'rows M' if size == 'M' else 'rank R'}  ({fixed})")


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the files named; return 0, or 1 where there is nothing to draw."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plot", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("runs", nargs="+", type=earlier_run, metavar="FILE.json")
    parser.add_argument("--out", type=writable, default=Path("bench.png"))
    args = parser.parse_args(argv)
    try:
        titles = draw([run for run in args.runs if run["rows"]], args.out)
    except ValueError as error:
        print(f"plot: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {json.dumps(titles)[1:-1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
