"""The regimes: the ways to run a forward or a backward, with the tiles and the cost of each.

One table, REGIMES. A new regime is an entry there and a function of its name in
forward_launches.py or backward_launches.py. Nothing here imports Triton.

Cost: each tensor's bytes count once for each kernel that reads or writes it. A kernel takes the
longer of moving its bytes and of its FLOPs, in whole waves of tiles over the SMs; then a launch.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil
from typing import NamedTuple

from . import cards
from .cards import Card, Tile

# A Triton base product behind cuBLAS: estimates that no card of ours has tested; on sm_100 it runs
# without the paired-SM instructions that cuBLAS has.
GEMM_EFFICIENCY = {"sm_100": 0.7}
DEFAULT_EFFICIENCY = 0.95


@dataclass(frozen=True)
class Problem:
    """A call's sizes: M rows, K in, N out, R rank, and what else the choice of a regime depends on.

    Attributes:
        kind: of product: half, tf32 or fp32.
        size: bytes an element of x.
        adapter_size: bytes an element of A and of B.
        has_bias: whether a forward adds one.
        descriptors: whether tensor descriptors can describe both operands of the base product.
        masked: whether dropout's mask lies on x.
        needs: which of dx, dA and dB a backward returns.

    """

    M: int
    K: int
    N: int
    R: int
    kind: str = "half"
    size: int = 2
    adapter_size: int = 2
    has_bias: bool = True
    descriptors: bool = True
    masked: bool = False
    needs: tuple[bool, bool, bool] = (True, True, True)

    def bytes(self, rows: int, cols: int) -> int:
        """Return the bytes of a matrix in x's dtype."""
        return rows * cols * self.size

    @property
    def adapters(self) -> tuple[int, int]:
        """Bytes of A and of B."""
        return self.K * self.R * self.adapter_size, self.N * self.R * self.adapter_size

    @property
    def mask(self) -> int:
        """Bytes of dropout's bits."""
        return self.M * ceil(self.K / 8) * self.masked

    def bucketed(self) -> "Problem":
        """Return it with M rounded up to the power of two, at least 16, that it is chosen by."""
        return replace(self, M=max(16, 1 << (self.M - 1).bit_length()))


@dataclass(frozen=True)
class Kernel:
    """What one launch moves and computes; `tiles` of it run one an SM (0: as many as fit)."""

    bytes: int
    flops: int
    tiles: int = 0
    efficiency: float = 1.0

    def time_us(self, card: Card, kind: str) -> float:
        """Return its time: the longer of bytes and FLOPs, and a launch.

        Fewer tiles than SMs leave bandwidth idle too: one SM draws at most twice its share.
        """
        waves = ceil(self.tiles / card.sms) * card.sms / self.tiles if self.tiles else 1.0
        drawn = min(1.0, 2 * self.tiles / card.sms) if self.tiles else 1.0
        flops_us = self.flops * waves / card.flops_per_us(kind) / self.efficiency
        return max(self.bytes / card.bytes_per_us / drawn, flops_us) + card.launch_us


def time_us(kernels: list[Kernel], card: Card, kind: str) -> float:
    """Return the time of kernels one after the other."""
    return sum(kernel.time_us(card, kind) for kernel in kernels)


def bytes_of(kernels: list[Kernel]) -> int:
    """Return the bytes that kernels move."""
    return sum(kernel.bytes for kernel in kernels)


def decode_splits(p: Problem, tile: Tile, card: Card) -> int:
    """Return into how many parts a decode splits K: a program for each SM, at least 4 steps each.

    Fewer where the parts' sums would move more bytes than the plain layer does.
    """
    tiles = ceil(p.M / tile.block_m) * ceil(p.N / tile.block_n)
    splits = cards.splits(card, tiles, p.K, tile.block_k)
    most = bytes_of(_plain_forward(p, tile, card))
    while splits > 1 and bytes_of(_decode(p, tile, card, splits)) > most:
        splits -= 1
    return splits


def _linear(p: Problem) -> Kernel:
    moved = p.bytes(p.M, p.K) + p.bytes(p.N, p.K) + p.bytes(p.M, p.N) + p.bytes(1, p.N) * p.has_bias
    return Kernel(moved, 2 * p.M * p.N * p.K)


def _shrink(p: Problem) -> Kernel:
    """h = (keep * x) @ A, its parts in float32."""
    moved = p.bytes(p.M, p.K) + p.mask + p.adapters[0] + p.M * p.R * 4
    return Kernel(moved, 2 * p.M * p.K * _padded(p.R))


def _base(p: Problem, tile: Tile, card: Card, moved: int, summed: int, cols: int) -> Kernel:
    """A base product of ours (M, cols) over `summed`, which moves `moved` bytes beside weight."""
    tiles = ceil(p.M / tile.block_m) * ceil(cols / tile.block_n)
    flops = tiles * 2 * tile.block_m * tile.block_n * summed
    efficiency = GEMM_EFFICIENCY.get(card.family, DEFAULT_EFFICIENCY)
    return Kernel(p.bytes(p.N, p.K) + moved, flops, tiles, efficiency)


def _padded(R: int) -> int:
    return cards.block_r(R, 1 << 30)


def _casts(p: Problem) -> list[Kernel]:
    if p.adapter_size == p.size:
        return []
    return [Kernel(n * p.R * (p.size + p.adapter_size), 0) for n in (p.K, p.N)]


def _in_loop(p: Problem, tile: Tile, card: Card) -> list[Kernel]:
    moved = p.bytes(p.M, p.K) + p.mask + sum(p.adapters) + p.bytes(1, p.N) * p.has_bias
    moved += p.bytes(p.M, p.N) + p.bytes(p.M, p.R)
    base = _base(p, tile, card, moved, p.K, p.N)
    h_flops = base.tiles * 2 * tile.block_m * _padded(p.R) * p.K
    return [replace(base, flops=base.flops + h_flops)]


def _two_launches(p: Problem, tile: Tile, card: Card) -> list[Kernel]:
    moved = p.bytes(p.M, p.K) + p.bytes(1, p.N) * p.has_bias + p.adapters[1]
    moved += p.M * p.R * 4 + p.bytes(p.M, p.R) + p.bytes(p.M, p.N)
    return [_shrink(p), _base(p, tile, card, moved, p.K, p.N)]


def _torch_base(p: Problem, tile: Tile, card: Card) -> list[Kernel]:
    h = p.M * p.R * 4 + p.bytes(p.M, p.R)
    delta = Kernel(h + p.adapters[1] + 2 * p.bytes(p.M, p.N), 2 * p.M * _padded(p.R) * p.N)
    return [_linear(p), _shrink(p), delta]


def _decode(p: Problem, tile: Tile, card: Card, splits: int = 0) -> list[Kernel]:
    splits = splits or decode_splits(p, tile, card)
    parts = splits * p.M * (p.N + p.R) * 4
    base = _base(p, tile, card, p.bytes(p.M, p.K) + p.mask + p.adapters[0] + parts, p.K, p.N)
    moved = parts + p.adapters[1] + p.bytes(1, p.N) * p.has_bias + p.bytes(p.M, p.N + p.R)
    return [replace(base, tiles=base.tiles * splits), Kernel(moved, 2 * p.M * _padded(p.R) * p.N)]


def _plain_forward(p: Problem, tile: Tile, card: Card) -> list[Kernel]:
    """F.linear; x @ A; h @ B; scale * d; y + d; and first the casts of wider adapters, the mask."""
    y, x, h = p.bytes(p.M, p.N), p.bytes(p.M, p.K), p.bytes(p.M, p.R)
    a, b = p.bytes(p.K, p.R), p.bytes(p.N, p.R)
    products = [Kernel(x + a + h, 2 * p.M * p.K * p.R), Kernel(h + b + y, 2 * p.M * p.R * p.N)]
    return _masking(p) + _casts(p) + [_linear(p), *products, Kernel(2 * y, 0), Kernel(3 * y, 0)]


def _plain_backward(p: Problem, tile: Tile, card: Card) -> list[Kernel]:
    """Return autograd's kernels for dx, dA and dB of the plain layer.

    dx = dy @ weight; g = scale * dy; t = g @ B.T; dB = h.T @ g; t @ A.T; the sum; dA = x.T @ t; and
    the casts of dA and dB to wider adapters' dtype, the mask.
    """
    dy, x, t = p.bytes(p.M, p.N), p.bytes(p.M, p.K), p.bytes(p.M, p.R)
    a, b = p.bytes(p.K, p.R), p.bytes(p.N, p.R)
    up, down = 2 * p.M * p.R * p.N, 2 * p.M * p.R * p.K
    kernels = [Kernel(2 * dy, 0), Kernel(dy + b + t, up), Kernel(dy + t + b, up)]
    if p.needs[0]:
        base = Kernel(dy + p.bytes(p.N, p.K) + x, 2 * p.M * p.N * p.K)
        kernels += [base, Kernel(t + a + x, down), Kernel(3 * x, 0)]
    return _masking(p) + _casts(p) + kernels + [Kernel(x + t + a, down)]


def _masking(p: Problem) -> list[Kernel]:
    return [Kernel(2 * p.bytes(p.M, p.K) + p.mask, 0)] if p.masked else []


def _pass_over_dy(p: Problem, card: Card) -> tuple[Kernel, int]:
    """Return launch (i) of a backward and the bytes of dB's parts, 0 without."""
    parts = cards.dB_parts(card, p.kind, p.M, p.R, p.size) * p.R * p.N * 4
    moved = p.bytes(p.M, p.N) + p.adapters[1] + p.M * p.R * 4
    moved += p.bytes(p.M, p.R) + parts if parts else 0
    return Kernel(moved, 2 * p.M * p.N * _padded(p.R)), parts


def _strips(p: Problem, parts: int) -> Kernel:
    """What launch (ii) moves and computes for dA and dB."""
    moved = p.bytes(p.M, p.K) + p.mask + p.M * p.R * 4 + sum(p.adapters)
    moved += parts or p.bytes(p.M, p.N + p.R)
    return Kernel(moved, 2 * p.M * (p.N + p.K) * _padded(p.R))


def _two_launches_backward(p: Problem, tile: Tile, card: Card) -> list[Kernel]:
    first, parts = _pass_over_dy(p, card)
    strips = _strips(p, parts)
    if not p.needs[0]:
        return [first, strips]
    moved = p.bytes(p.M, p.N) + p.bytes(p.M, p.K) + p.mask + p.M * p.R * 4 + p.adapters[0]
    base = _base(p, tile, card, moved + strips.bytes, p.N, p.K)
    return [first, replace(base, flops=base.flops + strips.flops)]


def _torch_base_backward(p: Problem, tile: Tile, card: Card) -> list[Kernel]:
    first, parts = _pass_over_dy(p, card)
    strips, dx = _strips(p, parts), p.bytes(p.M, p.K)
    product = Kernel(p.bytes(p.M, p.N) + p.bytes(p.N, p.K) + dx, 2 * p.M * p.N * p.K)
    delta = 2 * dx + p.mask + p.M * p.R * 4 + p.adapters[0]
    return [first, product, replace(strips, bytes=strips.bytes + delta)]


def _gemm_tiles(p: Problem, card: Card) -> tuple[Tile, ...]:
    can = p.descriptors and card.has_descriptors
    return tuple(t for t in cards.gemm_tiles(card, p.kind) if can or not t.descriptors)


def _delta_tiles(p: Problem, card: Card) -> tuple[Tile, ...]:
    return (cards.delta_tile(card),)


class Regime(NamedTuple):
    """A way to run a forward or a backward.

    Attributes:
        direction: "forward" or "backward": its launches are in forward_launches.py or the other.
        name: for `backends.triton.regime`, the tuning file and the benchmarks.
        tiles: (problem, card) -> the tiles it can run with, none where it can't run.
        cost: (problem, tile, card) -> its kernels.

    """

    direction: str
    name: str
    tiles: Callable[[Problem, Card], tuple[Tile, ...]]
    cost: Callable[[Problem, Tile, Card], list[Kernel]]


REGIMES = (
    # One launch; each tile accumulates its own h beside the base product.
    Regime(
        "forward",
        "in_loop",
        lambda p, card: tuple(t for t in _gemm_tiles(p, card) if p.R <= t.max_r),
        _in_loop,
    ),
    # h = x @ A, split over K where rows are few; then the base product with h at hand.
    Regime("forward", "two_launches", _gemm_tiles, _two_launches),
    # Two launches with the base product split over K too, for few rows.
    Regime(
        "forward",
        "decode",
        lambda p, card: cards.decode_tiles(card, p.kind, p.M) if p.M <= card.few_rows else (),
        _decode,
    ),
    # F.linear, h = x @ A, then y += scale * h @ B in place while y is in L2.
    Regime("forward", "torch_base", _delta_tiles, _torch_base),
    # PyTorch's own operators, where every other regime would move more bytes than they do: a rank
    # beyond the features, over few rows, makes float32 h and t outweigh what a regime saves.
    Regime("forward", "plain", _delta_tiles, _plain_forward),
    # t = dy @ B.T and dB's parts; then dx with t at hand, dA, and dB's sum.
    Regime(
        "backward",
        "two_launches",
        lambda p, card: (_gemm_tiles if p.needs[0] else _delta_tiles)(p, card),
        _two_launches_backward,
    ),
    # dx = dy @ weight by PyTorch between the two; the second then adds scale * t @ A.T to it.
    Regime(
        "backward",
        "torch_base",
        lambda p, card: _delta_tiles(p, card) if p.needs[0] else (),
        _torch_base_backward,
    ),
    Regime("backward", "plain", _delta_tiles, _plain_backward),
)
DIRECTIONS = {d: {r.name: r for r in REGIMES if r.direction == d} for d in ("forward", "backward")}


class Candidate(NamedTuple):
    """A way to run a problem: a regime's name, a tile, and the microseconds its cost comes to."""

    name: str
    tile: Tile
    time_us: float


def candidates(direction: str, p: Problem, card: Card) -> list[Candidate]:
    """Return what the library may choose among, cheapest first.

    Never what moves more bytes than the plain layer.
    """
    plain = DIRECTIONS[direction]["plain"]
    most = bytes_of(plain.cost(p, cards.delta_tile(card), card))
    found = []
    for regime in DIRECTIONS[direction].values():
        for tile in regime.tiles(p, card):
            kernels = regime.cost(p, tile, card)
            if bytes_of(kernels) <= most:
                found.append(Candidate(regime.name, tile, time_us(kernels, card, p.kind)))
    return sorted(found, key=lambda candidate: candidate.time_us)
