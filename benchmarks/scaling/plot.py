"""Draw what simulate wrote: memory and bytes sent by ranks, plain layer next to ours."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.plot import RUN_COLORS

from .trace import KINDS

HATCHES = {"plain": "///", "lora_ext": None}
WIDTH = 0.38


def draw(document: dict[str, Any], path: Path) -> None:
    """Write a PNG: on the left without activation checkpointing, on the right with it.

    Args:
        document: as `simulate` writes it.
        path: of the PNG.

    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in document["rows"] if row["layer"] in HATCHES]
    modes = list(dict.fromkeys(row["checkpointing"] for row in rows))
    figure = Figure(figsize=(6.2 * len(modes), 12), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(3, len(modes), sharey="row", squeeze=False)
    for column, mode in zip(panels.T, modes, strict=True):
        chosen = [row for row in rows if row["checkpointing"] == mode]
        _stack(column[0], chosen, _held_gib, "held by one rank (GiB)")
        _stack(column[1], chosen, _sent_gib, "sent by one rank in a step (GiB)")
        _floors(column[2], chosen)
        column[0].set_title(f"activation checkpointing: {mode}", loc="left", fontsize=10)
        for axes in column:
            axes.set_xlabel("ranks")
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color="#dddddd", linewidth=0.6)
            axes.set_axisbelow(True)
    for axes in panels[:, -1]:  # of both columns, where no bar is under it
        axes.get_legend().set_visible(True)
    figure.supxlabel(_caption(document), fontsize=7, color="#555555", x=0.01, ha="left")
    figure.savefig(path, dpi=110)


def _held_gib(row: dict[str, Any]) -> dict[str, float]:
    memory = row["memory_bytes"]
    held = {kind: memory[kind] / 2**30 for kind in (*KINDS, "gathered")}
    return held | {"temporary, at the peak": memory["peak"] / 2**30 - sum(held.values())}


def _sent_gib(row: dict[str, Any]) -> dict[str, float]:
    return {f"{t['collective']}, {t['dimension']}": t["sent_bytes"] / 2**30 for t in row["traffic"]}


def _stack(axes: Any, rows: list[dict[str, Any]], parts_of: Any, label: str) -> None:
    """Draw a pair of stacked bars for each number of ranks: the plain layer hatched, ours not."""
    ranks = list(dict.fromkeys(row["ranks"] for row in rows))
    names = list(dict.fromkeys(name for row in rows for name in parts_of(row)))
    colors = dict(zip(names, (*RUN_COLORS, "#777777"), strict=False))
    for row in rows:
        place = ranks.index(row["ranks"]) + (list(HATCHES).index(row["layer"]) - 0.5) * WIDTH
        bottom, parts = 0.0, parts_of(row)
        for name in names:
            axes.bar(
                place, parts.get(name, 0), WIDTH, bottom, color=colors[name], edgecolor="white",
                hatch=HATCHES[row["layer"]], linewidth=0.3,
            )  # fmt: skip
            bottom += parts.get(name, 0)
    axes.set_xticks(range(len(ranks)), [f"{n:,}" for n in ranks], fontsize=8)
    axes.set_ylabel(f"{label}\nleft, hatched: plain; right: lora_ext")
    _legend(axes, colors)


def _legend(axes: Any, colors: Mapping[str, str]) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(color=color, label=name) for name, color in reversed(colors.items())]
    _legend_on_the_right(axes, handles=patches)


def _legend_on_the_right(axes: Any, **options: Any) -> None:
    axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1), **options)
    axes.get_legend().set_visible(False)


def _floors(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Draw the floors of ours over the number of ranks; the plain layer's as crosses."""
    for name, color in zip(rows[0]["floor_ms"], RUN_COLORS, strict=False):
        for layer, style in (("lora_ext", "-"), ("plain", "x")):
            points = [(r["ranks"], r["floor_ms"][name]) for r in rows if r["layer"] == layer]
            label = f"{name}, {layer}"
            axes.plot(*zip(*points, strict=True), style, color=color, label=label, linewidth=1.2)
    axes.set_xscale("log", base=2)
    axes.set_xticks([rank for rank, _ in points], [f"{rank:,}" for rank, _ in points], fontsize=8)
    axes.set_ylabel("floor of a step at an H100 data sheet's peaks (ms)\ncalculated, not measured")
    _legend_on_the_right(axes)


def _caption(document: dict[str, Any]) -> str:
    shape, header = document["shape"], document["header"]
    return (
        f"{shape['layers']} blocks, hidden {shape['hidden']}, ffn {shape['ffn']}, LoRA of rank "
        f"{shape['rank']} on every linear; tensor parallel {document['tp']}, the rest FSDP2; "
        f"{document['batch']} x {document['sequence']} tokens on each data-parallel rank; "
        f"{document['dtype']}. Simulated on fake ranks by torch {header['torch']}, "
        f"commit {header['commit']}: no GPU ran."
    )
