"""The regimes: the ways to run a forward or a backward, with the tiles and the cost of each.

One table, REGIMES. A new regime is an entry there, its cost in costs.py, and a function of its name
in forward_launches.py or backward_launches.py. Nothing here imports Triton.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from . import costs, tiling, torch_costs
from .cards import Card
from .costs import Kernel, Problem, bytes_of, time_us
from .tiling import Tile


def _gemm_tiles(p: Problem, card: Card) -> tuple[Tile, ...]:
    can = p.descriptors and card.has_descriptors
    return tuple(t for t in tiling.gemm_tiles(card, p.kind) if can or not t.descriptors)


def _in_loop_tiles(p: Problem, card: Card) -> tuple[Tile, ...]:
    return tuple(t for t in _gemm_tiles(p, card) if p.R <= t.max_r)


def _persistent_tiles(p: Problem, card: Card) -> tuple[Tile, ...]:
    """Those for a result that a descriptor can describe too."""
    can = p.descriptors and card.persists and p.N * p.size % 16 == 0
    return tiling.persistent_tiles(card, p.kind, p.R) if can else ()


def _persistent_tiles_of_y(p: Problem, card: Card) -> tuple[Tile, ...]:
    """Those without the wide one for more than 32 ranks of an h in parts: on sm_90 it spills."""
    tiles, shrink = _persistent_tiles(p, card), tiling.shrink_tile(card, p.kind, p.M, joined=True)
    blocks = -(-p.M // shrink.block_m) * -(-p.R // tiling.block_r(p.R))
    in_parts = tiling.splits(card, blocks, p.K, shrink.block_k) > 1
    narrow = in_parts and p.R > tiling.EPILOGUE_R
    return tuple(t for t in tiles if not narrow or t.block_n < 256)


def _persistent_tiles_of_dx(p: Problem, card: Card) -> tuple[Tile, ...]:
    """Those of its twin, where t is summed in one part: fewer rows have no tile for each SM.

    None on sm_100: Triton 3.8's compiler crashes on it at rank 16 there (TritonGPUHoistTMEMAlloc).
    """
    can = p.needs[0] and card.family != "sm_100"
    can = can and tiling.dy_splits(card, p.kind, p.M, p.N, p.R) == 1
    return _persistent_tiles(replace(p, N=p.K, K=p.N), card) if can else ()


def _decode_tiles(p: Problem, card: Card) -> tuple[Tile, ...]:
    return tiling.decode_tiles(card, p.kind, p.M) if p.M <= card.few_rows else ()


def _delta_tiles(p: Problem, card: Card) -> tuple[Tile, ...]:
    return (tiling.delta_tile(card),)


def _addmm_tiles(p: Problem, card: Card) -> tuple[Tile, ...]:
    return () if p.masked else _delta_tiles(p, card)


def _dx_tiles(p: Problem, card: Card) -> tuple[Tile, ...]:
    return _gemm_tiles(p, card) if p.needs[0] else (tiling.strip_tile(card, p.kind),)


def _delta_tiles_of_dx(p: Problem, card: Card) -> tuple[Tile, ...]:
    return _delta_tiles(p, card) if p.needs[0] else ()


class Regime(NamedTuple):
    """A way to run a forward or a backward.

    Attributes:
        tiles: (problem, card) -> the tiles it can run with, none where it can't run.
        cost: (problem, tile, card) -> its kernels.

    """

    tiles: Callable[[Problem, Card], tuple[Tile, ...]]
    cost: Callable[[Problem, Tile, Card], list[Kernel]]


REGIMES: dict[str, dict[str, Regime]] = {
    "forward": {
        # One launch; each tile accumulates its own h next to the base product.
        "in_loop": Regime(_in_loop_tiles, costs.in_loop),
        # h = x @ A, split over K where rows are few; then the base product with h at hand.
        "two_launches": Regime(_gemm_tiles, costs.two_launches),
        # The same two at the same time: programs that stay for tile after tile, and wait for h
        # after the first one's base product.
        "persistent": Regime(_persistent_tiles_of_y, costs.persistent),
        # One launch with base product and h split over K, for few rows; who comes last sums.
        "decode": Regime(_decode_tiles, costs.decode),
        # F.linear, h = x @ A, then y += scale * h @ B in place while y is in L2.
        "torch_base": Regime(_delta_tiles, costs.torch_base),
        # F.linear, x @ A, then h @ B added to y by one more product, all of them PyTorch's.
        "addmm": Regime(_addmm_tiles, torch_costs.addmm),
        # PyTorch's own operators, where every other regime would move more bytes than they do: a
        # rank beyond the features, over few rows, makes float32 h and t outweigh what is saved.
        "plain": Regime(_delta_tiles, torch_costs.plain_forward),
    },
    "backward": {
        # t = dy @ B.T and dB's parts; then dx with t at hand, dA, and dB's sum.
        "two_launches": Regime(_dx_tiles, costs.two_launches_backward),
        # The same two at the same time, as in the forward; dA and dB where the tiles end.
        "persistent": Regime(_persistent_tiles_of_dx, costs.persistent_backward),
        # dx = dy @ weight by PyTorch between the two; the second then adds scale * t @ A.T to it.
        "torch_base": Regime(_delta_tiles_of_dx, costs.torch_base_backward),
        # Each product by PyTorch, t @ A.T added to dx by its own.
        "addmm": Regime(_addmm_tiles, torch_costs.addmm_backward),
        "plain": Regime(_delta_tiles, torch_costs.plain_backward),
    },
}


class Candidate(NamedTuple):
    """A way to run a problem: a regime's name, a tile, and the microseconds its cost comes to."""

    name: str
    tile: Tile
    time_us: float


def candidates(direction: str, p: Problem, card: Card) -> list[Candidate]:
    """Return what the library may choose among, cheapest first.

    Never what moves more bytes than the plain layer.
    """
    regimes = REGIMES[direction]
    most = bytes_of(regimes["plain"].cost(p, tiling.delta_tile(card), card))
    found = []
    for name, regime in regimes.items():
        for tile in regime.tiles(p, card):
            kernels = regime.cost(p, tile, card)
            if bytes_of(kernels) <= most:
                found.append(Candidate(name, tile, time_us(kernels, card, p.kind)))
    return sorted(found, key=lambda candidate: candidate.time_us)
