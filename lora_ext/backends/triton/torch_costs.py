"""The cost of the regimes that PyTorch runs, plain and addmm: their kernels, as in costs.py."""

from dataclasses import replace

from .cards import Card
from .costs import Kernel, Problem, linear
from .tiling import Tile


def plain_forward(p: Problem, tile: Tile, card: Card) -> list[Kernel]:
    """The mask; casts of wider adapters; F.linear; x @ A; h @ B; scale * d; y + d."""
    of, a, b = p.bytes, p.K * p.R * p.size, p.N * p.R * p.size
    shrink = Kernel(of.x + a + of.h, 2 * p.M * p.K * p.R)
    expand = Kernel(of.h + b + of.y, 2 * p.M * p.R * p.N)
    return [*_before(p), linear(p), shrink, expand, Kernel(2 * of.y, 0), Kernel(3 * of.y, 0)]


def plain_backward(p: Problem, tile: Tile, card: Card) -> list[Kernel]:
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


def addmm(p: Problem, tile: Tile, card: Card) -> list[Kernel]:
    """The plain layer's with h @ B added to y where that is written."""
    *rest, expand, _, _ = plain_forward(p, tile, card)
    return [*rest, replace(expand, bytes=expand.bytes + p.bytes.y)]


def addmm_backward(p: Problem, tile: Tile, card: Card) -> list[Kernel]:
    """The plain layer's without scale * dy, with t @ A.T added to dx where that is written."""
    *products, last = (kernel for kernel in plain_backward(p, tile, card) if kernel.flops)
    return [*_before(p), *products, replace(last, bytes=last.bytes + p.bytes.x * p.needs[0])]


def _before(p: Problem) -> list[Kernel]:
    """What PyTorch's products need first: x masked, A and B in x's dtype."""
    wider, size = p.adapter_size != p.size, p.size + p.adapter_size
    casts = [Kernel(n * p.R * size, 0) for n in (p.K, p.N) if wider]
    return casts + ([Kernel(2 * p.bytes.x + p.bytes.keep, 0)] if p.masked else [])
