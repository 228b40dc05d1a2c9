"""The cost of running calls of one x jointly, next to one call after the other.

Jointly, a forward reads x once for every layer's h; a backward writes dx once, and reads x once
for dA of all. As in costs.py; nothing here imports Triton.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from . import tiling
from .cards import Card
from .costs import Kernel, Problem, base_product, bytes_of, pass_over_dy, strips_of, time_us
from .costs import shrink as shrink_of_one
from .regimes import REGIMES, candidates
from .tiling import Tile

MOST_LEGS = 4  # group_kernels.py: an argument for each; of more layers, so many run jointly
WITH_SHRINK = ("two_launches", "persistent", "torch_base")  # forwards whose first kernel it is


class Joint(NamedTuple):
    """A way to run calls jointly: each layer's regime and tile, in a backward one tile for all."""

    choices: list[tuple[str, Tile]]
    kernels: list[Kernel]


Allowed = Callable[[str, Tile], bool]  # of a regime's name and tile


def joint(
    direction: str, problems: Sequence[Problem], card: Card, allowed: Allowed
) -> Joint | None:
    """Return the cheapest way to run a group jointly among what is allowed; None without one."""
    of = joint_forward if direction == "forward" else joint_backward
    return of(problems, card, allowed)


def apart(direction: str, problems: Sequence[Problem], card: Card) -> list[Kernel]:
    """Return the kernels of one call after the other, each by its cheapest regime."""
    kernels: list[Kernel] = []
    for p in problems:
        name, tile, _ = candidates(direction, p, card)[0]
        kernels += REGIMES[direction][name].cost(p, tile, card)
    if direction == "backward" and problems[0].needs[0]:  # dx added to the first one's
        kernels += [Kernel(3 * p.bytes.x, 0) for p in problems[1:]]
    return kernels


def gains(ours: Sequence[Kernel], others: Sequence[Kernel], card: Card, kind: str) -> bool:
    """Whether kernels move fewer bytes than others and are predicted to take no longer."""
    ours, others = list(ours), list(others)
    if bytes_of(ours) >= bytes_of(others):
        return False
    most = time_us(others, card, kind) * (1 + 1e-9)  # sums of the same times in another order
    return time_us(ours, card, kind) <= most


def joint_forward(problems: Sequence[Problem], card: Card, allowed: Allowed) -> Joint | None:
    """One shrink of x for all, then each layer's cheapest kernels without its own."""
    choices, kernels = [], [shrink_of_all(problems)]
    for p in problems:
        ways = [
            (time_us(rest, card, p.kind), name, tile, rest)
            for name in WITH_SHRINK
            for tile in REGIMES["forward"][name].tiles(p, card)
            if allowed(name, tile)
            for _, *rest in [REGIMES["forward"][name].cost(p, tile, card)]
        ]
        if not ways:
            return None
        _, name, tile, rest = min(ways, key=lambda way: way[0])
        choices.append((name, tile))
        kernels += rest
    kernels[0] = replace(kernels[0], joined=choices[0][0] == "persistent")
    return Joint(choices, kernels)


def shrink_of_all(problems: Sequence[Problem]) -> Kernel:
    """Shrink x to h of each, in float32: x once, and each layer's mask."""
    own = [shrink_of_one(p) for p in problems]
    again = (len(own) - 1) * problems[0].bytes.x
    return Kernel(bytes_of(own) - again, sum(kernel.flops for kernel in own))


def joint_backward(problems: Sequence[Problem], card: Card, allowed: Allowed) -> Joint | None:
    """Each layer's pass over dy; then one launch with dx a sum of legs, dA of all, and each dB."""
    tiles = [t for t in tiles_of_dx(problems, card) if allowed("two_launches", t)]
    ways = [Joint([("two_launches", t)], _backward(problems, t, card)) for t in tiles]
    kind = problems[0].kind
    return min(ways, key=lambda way: time_us(way.kernels, card, kind), default=None)


def tiles_of_dx(problems: Sequence[Problem], card: Card) -> Sequence[Tile]:
    """Return the tiles that every layer can take; under a mask those with registers left for it."""
    tiles = [REGIMES["backward"]["two_launches"].tiles(p, card) for p in problems]
    narrow = problems[0].needs[0] and any(p.masked for p in problems)
    return [
        t
        for t in tiles[0]
        if all(t in others for others in tiles)
        and not (narrow and t.block_m * t.block_n > tiling.MOST_MASKED * t.warps)
    ]


def _backward(problems: Sequence[Problem], tile: Tile, card: Card) -> list[Kernel]:
    passes = [pass_over_dy(p, card) for p in problems]
    own = [strips_of(p, parts) for p, (_, parts) in zip(problems, passes, strict=True)]
    x, with_dA = problems[0].bytes.x, sum(p.needs[1] for p in problems)
    # A single one's strips count x whether or not they read it.
    moved, flops = bytes_of(own) - (len(own) - min(1, with_dA)) * x, sum(k.flops for k in own)
    last = Kernel(moved, flops)
    if problems[0].needs[0]:
        legs = [base_product(p, tile, card, 0, p.N, p.K) for p in problems]
        of_legs = [p.bytes for p in problems]
        moved += x + sum(of.y + of.weight + of.h + of.A + of.keep for of in of_legs)
        flops += sum(leg.flops for leg in legs)
        last = replace(legs[0], bytes=moved, flops=flops)
    return [*(kernel for kernel, _ in passes), last]
