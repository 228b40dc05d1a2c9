"""Bytes, FLOPs and launches of each regime and of the plain layer, and the times that follow.

Bytes: each tensor counted once for each kernel that reads or writes it. A kernel takes the longer
of moving its bytes and of its FLOPs, in whole waves of tiles over the SMs; then a launch each.
"""

from dataclasses import dataclass
from math import ceil

from . import configs
from .cards import Card
from .configs import Tile

# A Triton base product behind cuBLAS [calc, shared/kernels.md: 3-5 % on Hopper]; on sm_100 it runs
# without the paired-SM instructions that cuBLAS has, a guess that no card of ours has tested.
GEMM_EFFICIENCY = {"sm_100": 0.7}
DEFAULT_EFFICIENCY = 0.95


@dataclass(frozen=True)
class Problem:
    """A layer's sizes: M rows, K in, N out, R rank; bytes an element of x and of A and B."""

    M: int
    K: int
    N: int
    R: int
    kind: str = "half"
    size: int = 2
    adapter_size: int = 2
    has_bias: bool = True

    @property
    def adapter_bytes(self) -> int:
        """Bytes of A or of B per in or out feature."""
        return self.R * self.adapter_size


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


def plain_forward(p: Problem) -> list[Kernel]:
    """F.linear; x @ A; h @ B; alpha * d; y + d; and the casts of wider adapters first."""
    mn, h = p.M * p.N * p.size, p.M * p.R * p.size
    return _casts(p) + [
        _linear(p),
        Kernel((p.M * p.K + p.K * p.R) * p.size + h, 2 * p.M * p.K * p.R),
        Kernel(h + p.N * p.R * p.size + mn, 2 * p.M * p.R * p.N),
        Kernel(2 * mn, 0),
        Kernel(3 * mn, 0),
    ]


def forward(name: str, p: Problem, tile: Tile, card: Card, splits: int = 1) -> list[Kernel]:
    """Return the kernels of a forward regime; `splits` is a decode's."""
    if name == "plain":
        return plain_forward(p)
    rank = configs.block_r(p.R, 1 << 30)
    x, w, y = p.M * p.K * p.size, p.N * p.K * p.size, p.M * p.N * p.size
    a, b = p.K * p.adapter_bytes, p.N * p.adapter_bytes
    h, h_parts = p.M * p.R * p.size, p.M * p.R * 4
    bias = p.N * p.size * p.has_bias
    tiles = ceil(p.M / tile.block_m) * ceil(p.N / tile.block_n)
    a_tile = 2 * tile.block_m * tile.block_n * p.K
    h_flops = 2 * tile.block_m * rank * p.K
    good = GEMM_EFFICIENCY.get(card.family, DEFAULT_EFFICIENCY)
    shrink = Kernel(x + a + h_parts, 2 * p.M * p.K * rank)
    if name == "in_loop":
        return [Kernel(x + w + bias + a + b + y + h, tiles * (a_tile + h_flops), tiles, good)]
    if name == "two_launches":
        return [shrink, Kernel(x + w + bias + b + h_parts + h + y, tiles * a_tile, tiles, good)]
    if name == "h_first":
        once = Kernel(2 * x + w + bias + a + b + 2 * h_parts + y, tiles * a_tile, tiles, good)
        return [Kernel(0, 0), once]  # the flags are zeroed first
    if name == "torch_base":
        return [_linear(p), shrink, Kernel(h_parts + b + 2 * y + h, 2 * p.M * rank * p.N)]
    parts = splits * p.M * (p.N + p.R) * 4
    return [
        Kernel(x + w + a + parts, tiles * a_tile, tiles * splits, good),
        Kernel(parts + b + bias + y + h, 2 * p.M * rank * p.N),
    ]


def plain_backward(p: Problem) -> list[Kernel]:
    """Return autograd's kernels for dx, dA and dB of the plain layer.

    dx = dy @ weight; g = alpha * dy; t = g @ B.T; dB = h.T @ g; t @ A.T; the sum; dA = x.T @ t; and
    the casts of dA and dB to wider adapters' dtype.
    """
    mn, mk, mr = (p.M * n * p.size for n in (p.N, p.K, p.R))
    a, b = p.K * p.R * p.size, p.N * p.R * p.size
    return _casts(p) + [
        Kernel(mn + p.N * p.K * p.size + mk, 2 * p.M * p.N * p.K),
        Kernel(2 * mn, 0),
        Kernel(mn + b + mr, 2 * p.M * p.N * p.R),
        Kernel(mn + mr + b, 2 * p.M * p.N * p.R),
        Kernel(mr + a + mk, 2 * p.M * p.R * p.K),
        Kernel(3 * mk, 0),
        Kernel(mk + mr + a, 2 * p.M * p.R * p.K),
    ]


def backward(name: str, p: Problem, tile: Tile, card: Card) -> list[Kernel]:
    """Return the kernels of a backward regime, for dx, dA and dB."""
    if name == "plain":
        return plain_backward(p)
    rank = configs.block_r(p.R, 1 << 30)
    dy, x, w = p.M * p.N * p.size, p.M * p.K * p.size, p.N * p.K * p.size
    a, b = p.K * p.adapter_bytes, p.N * p.adapter_bytes
    h, t = p.M * p.R * p.size, p.M * p.R * 4
    parts = configs.dB_parts(card, p.kind, p.M, p.R, p.size) * p.R * p.N * 4
    pass_over_dy = Kernel(dy + b + t + (h + parts if parts else 0), 2 * p.M * p.N * rank)
    strips = x + t + a + b + (parts or dy + h)
    strip_flops = 2 * p.M * (p.N + p.K) * rank
    if name == "torch_base":
        product = Kernel(dy + w + x, 2 * p.M * p.N * p.K)
        return [pass_over_dy, product, Kernel(2 * x + t + a + strips, strip_flops)]
    tiles = ceil(p.M / tile.block_m) * ceil(p.K / tile.block_n)
    flops = tiles * 2 * tile.block_m * tile.block_n * p.N + strip_flops
    good = GEMM_EFFICIENCY.get(card.family, DEFAULT_EFFICIENCY)
    return [pass_over_dy, Kernel(dy + w + t + a + x + strips, flops, tiles, good)]


def _casts(p: Problem) -> list[Kernel]:
    if p.adapter_size == p.size:
        return []
    return [Kernel(n * p.R * (p.size + p.adapter_size), 0) for n in (p.K, p.N)]


def _linear(p: Problem) -> Kernel:
    moved = p.M * p.K + p.N * p.K + p.M * p.N + p.N * p.has_bias
    return Kernel(moved * p.size, 2 * p.M * p.N * p.K)
