"""Print the tables of benchmarks/results/gpu_notes.md: predicted time over the base product alone.

`before` is the design without persistent programs and with decode in two launches, as at commit
05f88c7; `after` is today's. Both by today's cost model and its assumptions. Then groups of layers
of one x, jointly, over one call after the other. No figure here is a measurement.

python -m benchmarks.gpu.over_bare
"""

import sys
from dataclasses import replace
from math import ceil, exp, log
from statistics import fmean

from lora_ext.backends.triton import costs, group_costs, regimes, tiling
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


GROUPS = {
    "q, k, v: 4096, 1024, 1024": (4096, (4096, 1024, 1024), 16),
    "q, k, v: 4096 each": (4096, (4096, 4096, 4096), 16),
    "gate, up: 14336 each": (4096, (14336, 14336), 16),
    "q, k, v: 768 each": (768, (768, 768, 768), 16),
}


def group_time(direction: str, M: int, name: str, card: Card) -> tuple[float, float, bool]:
    """Return the microseconds of what a group is run as, of call after call, and if it is joint."""
    K, widths, R = GROUPS[name]
    problems = [problem(Shape(M, K, N, R), direction) for N in widths]
    apart = group_costs.apart(direction, problems, card)
    joint = group_costs.joint(direction, problems, card, lambda name, tile: True)
    apart_us = costs.time_us(apart, card, "half")
    if joint is None or not group_costs.gains(joint.kernels, apart, card, "half"):
        return apart_us, apart_us, False
    return costs.time_us(joint.kernels, card, "half"), apart_us, True


def group_table() -> str:
    """Return a step of groups over the same call after call, in Markdown; f, b: what is joint."""
    names = ("A100", "L4", "H100", "B200", "MI300X")
    lines = [f"| layers of K features, M | {' | '.join(names)} |", "|---" * 6 + "|"]
    for name, (K, *_) in GROUPS.items():
        for M in (8192, 2048, 512):
            row = []
            for card in names:
                ways = [group_time(of, M, name, KNOWN[card]) for of in REGIMES]
                ours, others = (sum(way[i] for way in ways) for i in (0, 1))
                marks = "".join(d for d, way in zip("fb", ways, strict=True) if way[2])
                row.append(f"{ours / others:.2f} {marks}".strip())
            lines.append(f"| {name} of {K}, {M} | {' | '.join(row)} |")
    return "\n".join(lines)


def cells(values: list[float]) -> str:
    """Return figures as cells of a row."""
    return " | ".join(f"{value:.2f}" for value in values)


if __name__ == "__main__":
    print(table(), group_table(), sep="\n\n")
    sys.exit(0)
