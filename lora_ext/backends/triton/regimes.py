"""The regimes: the ways to run a forward or a backward, with the tiles and the cost of each.

One table, REGIMES. A new regime is an entry there, and a function of its name in
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
PERSISTENT_EFFICIENCY = {"sm_90": 0.96, "sm_100": 0.7}  # loads go on during an epilogue


class Bytes(NamedTuple):
    """Bytes of a call's tensors; h is t in a backward, `parts` its float32 sum."""

    x: int
    weight: int
    y: int
    bias: int
    h: int
    A: int
    B: int
    parts: int
    keep: int


@dataclass(frozen=True)
class Problem:
    """A call's sizes: M rows, K in, N out, R rank, and what else the choice of a regime depends on.

    Attributes:
        kind: of product: half, tf32 or fp32.
        size: bytes an element of x.
        adapter_size: bytes an element of A and of B.
        has_bias: whether a forward adds one.
        descriptors: whether tensor descriptors can describe both operands of the base product.
        masked: whether dropout's mask is on x.
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

    @property
    def bytes(self) -> "Bytes":
        """The bytes of each tensor."""
        M, K, N, R, size = self.M, self.K, self.N, self.R, self.size
        x, weight, y = M * K * size, N * K * size, M * N * size
        A, B = K * R * self.adapter_size, R * N * self.adapter_size
        bias, keep = N * size * self.has_bias, M * ceil(K / 8) * self.masked
        return Bytes(x, weight, y, bias, M * R * size, A, B, 4 * M * R, keep)

    def bucketed(self) -> "Problem":
        """Return it with M rounded up to the power of two, at least 16, that it is chosen by."""
        return replace(self, M=max(16, 1 << (self.M - 1).bit_length()))


@dataclass(frozen=True)
class Kernel:
    """What one launch moves and computes; `tiles` of it run one an SM (0: as many as fit).

    `cached` bytes are scratch that one launch writes and the next reads, small enough for L2.
    `joined`: the next one runs at the same time, and waits for it only where its work ends.
    """

    bytes: int
    flops: int
    tiles: int = 0
    efficiency: float = 1.0
    cached: int = 0
    joined: bool = False

    def time_us(self, card: Card, kind: str) -> float:
        """Return its time: the longer of bytes and FLOPs, and a launch.

        Fewer tiles than SMs leave bandwidth idle too: one SM draws at most twice its share.
        """
        waves = ceil(self.tiles / card.sms) * card.sms / self.tiles if self.tiles else 1.0
        drawn = min(1.0, 2 * self.tiles / card.sms) if self.tiles else 1.0
        flops_us = self.flops * waves / card.flops_per_us(kind) / self.efficiency
        moved_us = (self.bytes + self.cached / card.l2_speedup) / card.bytes_per_us / drawn
        return max(moved_us, flops_us) + card.launch_us


def time_us(kernels: list[Kernel], card: Card, kind: str) -> float:
    """Return the time of kernels one after the other, of joined ones at once."""
    return sum(kernel.time_us(card, kind) for kernel in together(kernels))


def together(kernels: list[Kernel]) -> list[Kernel]:
    """Return kernels with what a joined one moves and computes added to the next one's."""
    found: list[Kernel] = []
    first = Kernel(0, 0)
    for kernel in kernels:
        whole = replace(kernel, bytes=first.bytes + kernel.bytes, flops=first.flops + kernel.flops)
        first = whole if kernel.joined else Kernel(0, 0)
        if not kernel.joined:
            found.append(whole)
    return found


def bytes_of(kernels: list[Kernel]) -> int:
    """Return the bytes that kernels move."""
    return sum(kernel.bytes for kernel in kernels)


def decode_splits(p: Problem, tile: Tile, card: Card) -> int:
    """Return into how many parts a decode splits K: those of the shortest time, 4 at most."""
    steps = max(1, p.K // ((1 if card.interpreted else 4) * tile.block_k))
    counts = range(1, min(steps, cards.MAX_SPLITS) + 1)
    return min(counts, key=lambda n: time_us(_decode(p, tile, card, n), card, p.kind))


def _padded(R: int) -> int:
    return cards.block_r(R, 1 << 30)


def _linear(p: Problem) -> Kernel:
    x, weight, y, bias = p.bytes[:4]
    return Kernel(x + weight + y + bias, 2 * p.M * p.N * p.K)


def _shrink(p: Problem) -> Kernel:
    """Shrink x to h = (keep * x) @ A, in float32."""
    of = p.bytes
    return Kernel(of.x + of.keep + of.A + of.parts, 2 * p.M * p.K * _padded(p.R))


def _base(p: Problem, tile: Tile, card: Card, moved: int, summed: int, cols: int) -> Kernel:
    """A base product of ours (M, cols) over `summed`, which moves `moved` bytes."""
    tiles = ceil(p.M / tile.block_m) * ceil(cols / tile.block_n)
    flops = tiles * 2 * tile.block_m * tile.block_n * summed
    return Kernel(moved, flops, tiles, GEMM_EFFICIENCY.get(card.family, DEFAULT_EFFICIENCY))


def _in_loop(p: Problem, tile: Tile, card: Card) -> list[Kernel]:
    moved = sum(p.bytes) - p.bytes.parts
    base = _base(p, tile, card, moved, p.K, p.N)
    h_flops = base.tiles * 2 * tile.block_m * _padded(p.R) * p.K
    return [replace(base, flops=base.flops + h_flops)]


def _two_launches(p: Problem, tile: Tile, card: Card) -> list[Kernel]:
    of = p.bytes
    moved = of.x + of.weight + of.bias + of.B + of.parts + of.h + of.y
    return [_shrink(p), _base(p, tile, card, moved, p.K, p.N)]


def _persistent(p: Problem, tile: Tile, card: Card) -> list[Kernel]:
    return _stay(_two_launches(p, tile, card), card)


def _stay(kernels: list[Kernel], card: Card) -> list[Kernel]:
    """Two launches, the second one of programs that stay, joined to the first."""
    first, base = kernels
    efficiency = PERSISTENT_EFFICIENCY.get(card.family, DEFAULT_EFFICIENCY)
    return [replace(first, joined=True), replace(base, efficiency=efficiency)]


def _torch_base(p: Problem, tile: Tile, card: Card) -> list[Kernel]:
    of = p.bytes
    delta = Kernel(of.parts + of.h + of.B + 2 * of.y, 2 * p.M * _padded(p.R) * p.N)
    return [_linear(p), _shrink(p), delta]


def _decode(p: Problem, tile: Tile, card: Card, splits: int = 0) -> list[Kernel]:
    splits, of = splits or decode_splits(p, tile, card), p.bytes
    parts = splits * p.M * (p.N + p.R) * 4
    base = _base(p, tile, card, of.x + of.keep + of.weight + of.A, p.K, p.N)
    moved = of.B + of.bias + of.y + of.h
    sums = Kernel(moved, 2 * p.M * _padded(p.R) * p.N, cached=parts)
    return [replace(base, tiles=base.tiles * splits, cached=parts), sums]


def _plain_forward(p: Problem, tile: Tile, card: Card) -> list[Kernel]:
    """The mask; casts of wider adapters; F.linear; x @ A; h @ B; scale * d; y + d."""
    of, a, b = p.bytes, p.K * p.R * p.size, p.N * p.R * p.size
    shrink = Kernel(of.x + a + of.h, 2 * p.M * p.K * p.R)
    expand = Kernel(of.h + b + of.y, 2 * p.M * p.R * p.N)
    return [*_before(p), _linear(p), shrink, expand, Kernel(2 * of.y, 0), Kernel(3 * of.y, 0)]


def _plain_backward(p: Problem, tile: Tile, card: Card) -> list[Kernel]:
    """Return autograd's kernels for dx, dA and dB of the plain layer.

    The mask and casts; g = scale * dy; t = g @ B.T; dB = h.T @ g; then dx = dy @ weight, t @ A.T
    and their sum; dA = x.T @ t.
    """
    of, a, b = p.bytes, p.K * p.R * p.size, p.N * p.R * p.size
    over_n, over_k = 2 * p.M * p.R * p.N, 2 * p.M * p.R * p.K
    kernels = [Kernel(2 * of.y, 0), *[Kernel(of.y + b + of.h, over_n)] * 2]
    if p.needs[0]:
        base = Kernel(of.y + of.weight + of.x, 2 * p.M * p.N * p.K)
        kernels += [base, Kernel(of.h + a + of.x, over_k), Kernel(3 * of.x, 0)]
    return [*_before(p), *kernels, Kernel(of.x + of.h + a, over_k)]


def _addmm(p: Problem, tile: Tile, card: Card) -> list[Kernel]:
    """The plain layer's with h @ B added to y where that is written."""
    *rest, expand, _, _ = _plain_forward(p, tile, card)
    return [*rest, replace(expand, bytes=expand.bytes + p.bytes.y)]


def _addmm_backward(p: Problem, tile: Tile, card: Card) -> list[Kernel]:
    """The plain layer's without scale * dy, with t @ A.T added to dx where that is written."""
    *products, last = (kernel for kernel in _plain_backward(p, tile, card) if kernel.flops)
    return [*_before(p), *products, replace(last, bytes=last.bytes + p.bytes.x * p.needs[0])]


def _before(p: Problem) -> list[Kernel]:
    """What PyTorch's products need first: x masked, A and B in x's dtype."""
    wider, size = p.adapter_size != p.size, p.size + p.adapter_size
    casts = [Kernel(n * p.R * size, 0) for n in (p.K, p.N) if wider]
    return casts + ([Kernel(2 * p.bytes.x + p.bytes.keep, 0)] if p.masked else [])


def _pass_over_dy(p: Problem, card: Card) -> tuple[Kernel, int]:
    """Return launch (i) of a backward and the bytes of dB's parts, 0 without."""
    of, parts = p.bytes, cards.dB_parts(card, p.kind, p.M, p.R, p.size) * p.R * p.N * 4
    moved = of.y + of.B + of.parts + (of.h + parts if parts else 0)
    return Kernel(moved, 2 * p.M * p.N * _padded(p.R)), parts


def _strips(p: Problem, parts: int) -> Kernel:
    """What launch (ii) moves and computes for dA and dB."""
    of = p.bytes
    moved = of.x + of.keep + of.parts + of.A + of.B + (parts or of.y + of.h)
    return Kernel(moved, 2 * p.M * (p.N + p.K) * _padded(p.R))


def _two_launches_backward(p: Problem, tile: Tile, card: Card) -> list[Kernel]:
    first, parts = _pass_over_dy(p, card)
    strips, of = _strips(p, parts), p.bytes
    if not p.needs[0]:
        return [first, strips]
    moved = of.y + of.weight + of.parts + of.A + of.x + of.keep + strips.bytes
    base = _base(p, tile, card, moved, p.N, p.K)
    return [first, replace(base, flops=base.flops + strips.flops)]


def _persistent_backward(p: Problem, tile: Tile, card: Card) -> list[Kernel]:
    return _stay(_two_launches_backward(p, tile, card), card)


def _torch_base_backward(p: Problem, tile: Tile, card: Card) -> list[Kernel]:
    first, parts = _pass_over_dy(p, card)
    strips, of = _strips(p, parts), p.bytes
    product = Kernel(of.y + of.weight + of.x, 2 * p.M * p.N * p.K)
    delta = 2 * of.x + of.keep + of.parts + of.A
    return [first, product, replace(strips, bytes=strips.bytes + delta)]


def _gemm_tiles(p: Problem, card: Card) -> tuple[Tile, ...]:
    can = p.descriptors and card.has_descriptors
    return tuple(t for t in cards.gemm_tiles(card, p.kind) if can or not t.descriptors)


def _in_loop_tiles(p: Problem, card: Card) -> tuple[Tile, ...]:
    return tuple(t for t in _gemm_tiles(p, card) if p.R <= t.max_r)


def _persistent_tiles(p: Problem, card: Card) -> tuple[Tile, ...]:
    """Those for a result that a descriptor can describe too."""
    can = p.descriptors and card.persists and p.N * p.size % 16 == 0
    return cards.persistent_tiles(card, p.kind, p.R) if can else ()


def _persistent_tiles_of_dx(p: Problem, card: Card) -> tuple[Tile, ...]:
    """Those of its twin, where t comes in one part: fewer rows have no tile for each SM.

    None on sm_100: Triton 3.8's compiler crashes on it at rank 16 there (TritonGPUHoistTMEMAlloc).
    """
    can = p.needs[0] and card.family != "sm_100"
    can = can and cards.dy_splits(card, p.kind, p.M, p.N, p.R) == 1
    return _persistent_tiles(replace(p, N=p.K, K=p.N), card) if can else ()


def _decode_tiles(p: Problem, card: Card) -> tuple[Tile, ...]:
    return cards.decode_tiles(card, p.kind, p.M) if p.M <= card.few_rows else ()


def _delta_tiles(p: Problem, card: Card) -> tuple[Tile, ...]:
    return (cards.delta_tile(card),)


def _addmm_tiles(p: Problem, card: Card) -> tuple[Tile, ...]:
    return () if p.masked else _delta_tiles(p, card)


def _dx_tiles(p: Problem, card: Card) -> tuple[Tile, ...]:
    return _gemm_tiles(p, card) if p.needs[0] else (cards.strip_tile(card, p.kind),)


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
        "in_loop": Regime(_in_loop_tiles, _in_loop),
        # h = x @ A, split over K where rows are few; then the base product with h at hand.
        "two_launches": Regime(_gemm_tiles, _two_launches),
        # The same two at the same time: programs that stay for tile after tile, and wait for h
        # after the first one's base product.
        "persistent": Regime(_persistent_tiles, _persistent),
        # Two launches with the base product split over K too, for few rows.
        "decode": Regime(_decode_tiles, _decode),
        # F.linear, h = x @ A, then y += scale * h @ B in place while y is in L2.
        "torch_base": Regime(_delta_tiles, _torch_base),
        # F.linear, x @ A, then h @ B added to y by one more product, all of them PyTorch's.
        "addmm": Regime(_addmm_tiles, _addmm),
        # PyTorch's own operators, where every other regime would move more bytes than they do: a
        # rank beyond the features, over few rows, makes float32 h and t outweigh what is saved.
        "plain": Regime(_delta_tiles, _plain_forward),
    },
    "backward": {
        # t = dy @ B.T and dB's parts; then dx with t at hand, dA, and dB's sum.
        "two_launches": Regime(_dx_tiles, _two_launches_backward),
        # The same two at the same time, as in the forward; dA and dB where the tiles end.
        "persistent": Regime(_persistent_tiles_of_dx, _persistent_backward),
        # dx = dy @ weight by PyTorch between the two; the second then adds scale * t @ A.T to it.
        "torch_base": Regime(_delta_tiles_of_dx, _torch_base_backward),
        # Each product by PyTorch, t @ A.T added to dx by its own.
        "addmm": Regime(_addmm_tiles, _addmm_backward),
        "plain": Regime(_delta_tiles, _plain_backward),
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
    most = bytes_of(regimes["plain"].cost(p, cards.delta_tile(card), card))
    found = []
    for name, regime in regimes.items():
        for tile in regime.tiles(p, card):
            kernels = regime.cost(p, tile, card)
            if bytes_of(kernels) <= most:
                found.append(Candidate(name, tile, time_us(kernels, card, p.kind)))
    return sorted(found, key=lambda candidate: candidate.time_us)
