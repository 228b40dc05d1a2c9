"""The cost of each regime: what its launches move and compute, and the time that comes to.

Each tensor's bytes count once for each kernel that reads or writes it. A kernel takes the longer of
moving its bytes and of its FLOPs, in whole waves of tiles over the SMs; then a launch. Nothing here
imports Triton.
"""

from dataclasses import dataclass, replace
from math import ceil
from typing import NamedTuple

from . import tiling
from .cards import Card
from .tiling import Tile

# A Triton base product behind cuBLAS, estimated; on sm_100 without cuBLAS's paired-SM instructions.
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

    `cached` bytes are scratch, small enough for L2. `joined`: the next one runs at the same time,
    and waits for it only where its work ends. `under_way`: bytes that its programs ask for ahead,
    all together (0: enough of them). `extra_us` is what it takes besides.
    """

    bytes: int
    flops: int
    tiles: int = 0
    efficiency: float = 1.0
    cached: int = 0
    joined: bool = False
    under_way: int = 0
    extra_us: float = 0.0

    def time_us(self, card: Card, kind: str) -> float:
        """Return its time: the longer of bytes and FLOPs, and a launch.

        Fewer tiles than SMs leave bandwidth idle too: one SM draws at most twice its share. And so
        do fewer bytes under way than the memory delivers while one of them comes.
        """
        waves = ceil(self.tiles / card.sms) * card.sms / self.tiles if self.tiles else 1.0
        drawn = min(1.0, 2 * self.tiles / card.sms) if self.tiles else 1.0
        if self.under_way:
            drawn = min(drawn, self.under_way / (card.bytes_per_us * card.latency_us))
        flops_us = self.flops * waves / card.flops_per_us(kind) / self.efficiency
        moved_us = (self.bytes + self.cached / card.l2_speedup) / card.bytes_per_us / drawn
        return max(moved_us, flops_us) + card.launch_us + self.extra_us


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
    """Return into how many parts a decode splits K: those of the shortest time, 8 at most."""
    counts = range(1, min(_parts_of_k(p, tile, card), 2 * tiling.MAX_SPLITS) + 1)
    times = (time_us(decode(p, tile, card, n), card, p.kind) for n in counts)
    return counts[-1] if card.interpreted else min(zip(times, counts, strict=True))[1]


def decode_h_splits(p: Problem, tile: Tile, card: Card) -> int:
    """Return into how many parts it splits h: as many as may be, so that h is there in time."""
    return min(_parts_of_k(p, tile, card), tiling.MAX_SPLITS)


def _parts_of_k(p: Problem, tile: Tile, card: Card) -> int:
    """Return how many parts of at least two steps K has: a shorter one is all start and end."""
    return max(1, p.K // ((1 if card.interpreted else 2) * tile.block_k))


def padded(R: int) -> int:
    """Return R padded as in a product."""
    return tiling.block_r(R, 1 << 30)


def linear(p: Problem) -> Kernel:
    """PyTorch's base product."""
    x, weight, y, bias = p.bytes[:4]
    return Kernel(x + weight + y + bias, 2 * p.M * p.N * p.K)


def shrink(p: Problem) -> Kernel:
    """Shrink x to h = (keep * x) @ A, in float32."""
    of = p.bytes
    return Kernel(of.x + of.keep + of.A + of.parts, 2 * p.M * p.K * padded(p.R))


def base_product(p: Problem, tile: Tile, card: Card, moved: int, summed: int, cols: int) -> Kernel:
    """A base product of ours (M, cols) over `summed`, which moves `moved` bytes."""
    tiles = ceil(p.M / tile.block_m) * ceil(cols / tile.block_n)
    flops = tiles * 2 * tile.block_m * tile.block_n * summed
    return Kernel(moved, flops, tiles, GEMM_EFFICIENCY.get(card.family, DEFAULT_EFFICIENCY))


def in_loop(p: Problem, tile: Tile, card: Card) -> list[Kernel]:
    """One launch, each tile with its own h."""
    moved = sum(p.bytes) - p.bytes.parts
    base = base_product(p, tile, card, moved, p.K, p.N)
    h_flops = base.tiles * 2 * tile.block_m * padded(p.R) * p.K
    return [replace(base, flops=base.flops + h_flops)]


def two_launches(p: Problem, tile: Tile, card: Card) -> list[Kernel]:
    """The shrink, then the base product with h at hand."""
    of = p.bytes
    moved = of.x + of.weight + of.bias + of.B + of.parts + of.h + of.y
    return [shrink(p), base_product(p, tile, card, moved, p.K, p.N)]


def persistent(p: Problem, tile: Tile, card: Card) -> list[Kernel]:
    """The same two at once."""
    return _stay(two_launches(p, tile, card), card)


def _stay(kernels: list[Kernel], card: Card) -> list[Kernel]:
    """Two launches, the second one of programs that stay, joined to the first."""
    first, base = kernels
    efficiency = PERSISTENT_EFFICIENCY.get(card.family, DEFAULT_EFFICIENCY)
    return [replace(first, joined=True), replace(base, efficiency=efficiency)]


def torch_base(p: Problem, tile: Tile, card: Card) -> list[Kernel]:
    """The shrink, PyTorch's base product, one pass over y."""
    of = p.bytes
    delta = Kernel(of.parts + of.h + of.B + 2 * of.y, 2 * p.M * padded(p.R) * p.N)
    return [shrink(p), linear(p), delta]


def decode(p: Problem, tile: Tile, card: Card, splits: int = 0) -> list[Kernel]:
    """One launch: the base product and h split over K, parts of y summed by the last to come."""
    splits, of = splits or decode_splits(p, tile, card), p.bytes
    moved = of.x + of.keep + of.weight + of.A + of.B + of.bias + of.y + of.h
    base = base_product(p, tile, card, moved, p.K, p.N)
    stage = tile.block_k * (tile.block_m + tile.block_n) * p.size
    resident = card.sms * max(1, card.shared_bytes // (tile.stages * stage))
    under_way = min(splits * base.tiles, resident) * (tile.stages - 1) * stage
    # Its counters are there for h, also where y is in one part.
    kernel = replace(base, tiles=splits * base.tiles, under_way=under_way, extra_us=card.fill_us)
    return [kernel if splits == 1 else _with_arrivals(kernel, splits * p.M * p.N * 4, card)]


def pass_over_dy(p: Problem, card: Card) -> tuple[Kernel, int]:
    """Return launch (i) of a backward and the bytes of dB's parts, 0 without."""
    of, parts = p.bytes, tiling.dB_parts(card, p.kind, p.M, p.R, p.size) * p.R * p.N * 4
    moved = of.y + of.B + of.h + (of.h + parts if parts else 0)
    kernel = Kernel(moved, 2 * p.M * p.N * padded(p.R))
    if (splits := tiling.dy_splits(card, p.kind, p.M, p.N, p.R)) > 1:
        kernel = _with_arrivals(kernel, 4 * p.M * p.R * splits, card)
    return kernel, parts


def _with_arrivals(kernel: Kernel, parts: int, card: Card) -> Kernel:
    """Return it with sums in `parts` bytes, by the last to come: through L2, counters cleared."""
    return replace(kernel, cached=2 * parts, extra_us=card.fill_us + card.arrival_us)


def strips_of(p: Problem, parts: int) -> Kernel:
    """What launch (ii) moves and computes for dA and dB."""
    of = p.bytes
    moved = of.x + of.keep + of.h + of.A + of.B + (parts or of.y + of.h)
    return Kernel(moved, 2 * p.M * (p.N + p.K) * padded(p.R))


def two_launches_backward(p: Problem, tile: Tile, card: Card) -> list[Kernel]:
    """The pass over dy, then dx, dA and dB."""
    first, parts = pass_over_dy(p, card)
    strips, of = strips_of(p, parts), p.bytes
    if not p.needs[0]:
        return [first, strips]
    moved = of.y + of.weight + of.h + of.A + of.x + of.keep + strips.bytes
    base = base_product(p, tile, card, moved, p.N, p.K)
    return [first, replace(base, flops=base.flops + strips.flops)]


def persistent_backward(p: Problem, tile: Tile, card: Card) -> list[Kernel]:
    """The same two at once."""
    return _stay(two_launches_backward(p, tile, card), card)


def torch_base_backward(p: Problem, tile: Tile, card: Card) -> list[Kernel]:
    """The same with PyTorch's base product between."""
    first, parts = pass_over_dy(p, card)
    strips, of = strips_of(p, parts), p.bytes
    product = Kernel(of.y + of.weight + of.x, 2 * p.M * p.N * p.K)
    delta = 2 * of.x + of.keep + of.h + of.A
    return [first, product, replace(strips, bytes=strips.bytes + delta)]
