"""The shapes that are timed: M rows of x, K in_features, N out_features, R rank."""

import math
import random
from typing import NamedTuple


class Shape(NamedTuple):
    """Sizes of one adapted linear layer and its input, in elements."""

    M: int
    K: int
    N: int
    R: int

    def __str__(self) -> str:
        return ",".join(map(str, self))


_CPU = (
    Shape(1, 768, 768, 8),
    Shape(1, 2048, 2048, 16),
    Shape(16, 768, 768, 16),
    Shape(64, 768, 3072, 16),
    Shape(128, 576, 1536, 16),
    Shape(960, 768, 768, 16),
    Shape(960, 768, 3072, 16),
    Shape(960, 3072, 768, 16),
    Shape(1024, 384, 384, 8),
    Shape(1024, 768, 768, 64),
    Shape(512, 2048, 2048, 16),
    Shape(2048, 1024, 1024, 128),
)
_CUDA = (
    Shape(1, 4096, 4096, 16),
    Shape(16, 4096, 4096, 16),
    Shape(64, 4096, 14336, 16),
    Shape(512, 4096, 4096, 16),
    Shape(960, 768, 768, 16),
    Shape(2048, 4096, 4096, 16),
    Shape(8192, 4096, 4096, 16),
    Shape(8192, 4096, 4096, 64),
    Shape(8192, 4096, 14336, 16),
    Shape(8192, 14336, 4096, 16),
    Shape(8192, 4096, 1024, 16),
    Shape(4096, 5120, 5120, 128),
)

_POWERS_M = tuple(2**p for p in range(15))  # 1 to 16384
_POWERS_R = tuple(2**p for p in range(8))  # 1 to 128

# quick: a decode step, a short batch and a training batch. rows, ranks: one size varied.
GRIDS: dict[str, dict[str, tuple[Shape, ...]]] = {
    "cpu": {
        "standard": _CPU,
        "quick": (_CPU[1], _CPU[3], _CPU[5]),
        "rows": tuple(Shape(M, 768, 768, 16) for M in _POWERS_M),
        "ranks": tuple(Shape(960, 768, 768, R) for R in _POWERS_R),
    },
    "cuda": {
        "standard": _CUDA,
        "quick": (_CUDA[0], _CUDA[3], _CUDA[5]),
        "rows": tuple(Shape(M, 4096, 4096, 16) for M in _POWERS_M),
        "ranks": tuple(Shape(8192, 4096, 4096, R) for R in _POWERS_R),
    },
}


def random_shapes(count: int, seed: int) -> tuple[Shape, ...]:
    """Draw shapes, evenly in their logs: M 1 to 4096, K and N 32 to 4096, R 1 to 128."""
    draw = random.Random(seed)

    def size(least: int, most: int) -> int:
        return round(math.exp(draw.uniform(math.log(least), math.log(most))))

    return tuple(
        Shape(size(1, 4096), size(32, 4096), size(32, 4096), size(1, 128)) for _ in range(count)
    )


def parse_shape(text: str) -> Shape:
    """Read a shape written as "M,K,N,R".

    Raises:
        ValueError: not four integers, or one below 1.

    """
    parts = text.split(",")
    if len(parts) != 4 or not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"a shape must be four integers M,K,N,R, got {text!r}")
    shape = Shape(*map(int, parts))
    if min(shape) < 1:
        raise ValueError(f"M, K, N and R must be at least 1, got {text!r}")
    return shape
