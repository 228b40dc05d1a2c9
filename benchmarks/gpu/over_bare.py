"""Print the table of benchmarks/results/gpu_notes.md: predicted time over the base product alone.

`before` is the design without persistent programs and with decode in two launches, as at commit
05f88c7; `after` is today's. Both by today's cost model and its assumptions. No figure here is a
measurement.

python -m benchmarks.gpu.over_bare
"""

import sys
from dataclasses import replace
from math import ceil, exp, log
from statistics import fmean

from lora_ext.backends.triton import costs, regimes, tiling
from lora_ext.backends.triton.cards import KNOWN, Card
from lora_ext.backends.triton.costs import Kernel, Problem
from lora_ext.backends.triton.regimes import REGIMES

from .. import GRIDS, Shape
from .roofline import bare_us

DETAILED = "H100"
BEFORE = ("in_loop", "two_launches", "torch_base")
COLUMNS = ("forward before", "forward after", "step before", "step after")


def problem(shape: Shape, direction: str) -> Problem:
    """Return a bfloat16 problem, with a bias in its forward."""
    return Problem(*shape, "half", 2, 2, has_bias=direction == "forward")


def after(p: Problem, card: Card, direction: str) -> tuple[float, str]:
    """Return the microseconds and the name of what the library would choose unmeasured."""
    picked = regimes.candidates(direction, p.bucketed(), card)[0]
    kernels = REGIMES[direction][picked.name].cost(p, picked.tile, card)
    return costs.time_us(kernels, card, p.kind), picked.name


def before(p: Problem, card: Card, direction: str) -> tuple[float, str]:
    """Return the same of the regimes that there were."""
    found = []
    for name in BEFORE:
        if (regime := REGIMES[direction].get(name)) is not None:
            for tile in regime.tiles(p, card):
                found.append((costs.time_us(regime.cost(p, tile, card), card, p.kind), name))
    if direction == "forward":
        for tile in REGIMES["forward"]["decode"].tiles(p, card):
            kernels = decode_in_two(p, tile, card)
            found.append((costs.time_us(kernels, card, p.kind), "decode"))
    return min(found)


def decode_in_two(p: Problem, tile: tiling.Tile, card: Card) -> list[Kernel]:
    """Return decode's kernels as they were: parts, also of one, through L2, and their sums."""
    of, most = p.bytes, max(1, min(p.K // (4 * tile.block_k), tiling.MAX_SPLITS))

    def kernels(splits: int) -> list[Kernel]:
        tiles = ceil(p.M / tile.block_m) * ceil(p.N / tile.block_n) * splits
        parts = splits * p.M * (p.N + p.R) * 4
        (now,) = costs.decode(p, tile, card, splits)
        first = replace(
            now,
            bytes=of.x + of.keep + of.weight + of.A,
            tiles=tiles,
            cached=parts,
            extra_us=0.0,
        )
        sums = Kernel(of.B + of.bias + of.y + of.h, 2 * p.M * 16 * p.N, cached=parts)
        return [first, sums]

    ways = (kernels(splits) for splits in range(1, most + 1))
    return min(ways, key=lambda way: costs.time_us(way, card, p.kind))


def over_bare(shape: Shape, card: Card) -> tuple[list[float], list[str]]:
    """Return COLUMNS as multiples of the bare products, and the regimes chosen after."""
    f, b = problem(shape, "forward"), problem(shape, "backward")
    bare = bare_us(f, card, "forward"), bare_us(b, card, "backward")
    times = {}
    for name, way in (("before", before), ("after", after)):
        times[name] = way(f, card, "forward"), way(b, card, "backward")
    row = [times[name][0][0] / bare[0] for name in ("before", "after")]
    row += [sum(t for t, _ in times[name]) / sum(bare) for name in ("before", "after")]
    return row, [name for _, name in times["after"]]


def table() -> str:
    """Return the shapes on one card, and the geometric means of all cards, in Markdown."""
    head = " | ".join(COLUMNS)
    lines = [f"| M,K,N,R on {KNOWN[DETAILED].name} | {head} | chosen |", "|---" * 6 + "|"]
    for shape in GRIDS["cuda"]["standard"]:
        row, names = over_bare(shape, KNOWN[DETAILED])
        lines.append(f"| {shape} | {cells(row)} | {', '.join(names)} |")
    lines += ["", f"| geometric mean | {head} |", "|---" * 5 + "|"]
    for card in KNOWN.values():
        rows = [over_bare(shape, card)[0] for shape in GRIDS["cuda"]["standard"]]
        means = [exp(fmean(map(log, column))) for column in zip(*rows, strict=True)]
        lines.append(f"| {card.name} | {cells(means)} |")
    return "\n".join(lines)


def cells(values: list[float]) -> str:
    """Return figures as cells of a row."""
    return " | ".join(f"{value:.2f}" for value in values)


if __name__ == "__main__":
    print(table())
    sys.exit(0)
