"""What is timed: shapes, the tensors of a case, the work it costs; and how commands name them.

M rows of x, K in_features, N out_features, R rank. The commands: `python -m benchmarks.NAME --help`
for bench_linear, bench_model, bench_overhead, lower_bound, plot, routes, and of a GPU's kernels
gpu.ladder, gpu.roofline, gpu.steps and gpu.tuned.
"""

import argparse
import math
import random
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lora_ext.codes import dequantised, quantised

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODES = ("fwd", "fwd_bwd")

# Neither 1 nor a power of two: a lost or rounded scale shows in the correctness gate.
ALPHA = 0.75


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
_CUDA = (  # in this order, so that a run cut short has what is needed first
    Shape(8192, 4096, 4096, 16),
    Shape(1, 4096, 4096, 16),
    Shape(16, 4096, 4096, 16),
    Shape(512, 4096, 4096, 16),
    Shape(2048, 4096, 4096, 16),
    Shape(64, 4096, 14336, 16),
    Shape(960, 768, 768, 16),
    Shape(8192, 4096, 4096, 64),
    Shape(8192, 4096, 14336, 16),
    Shape(8192, 14336, 4096, 16),
    Shape(8192, 4096, 1024, 16),
    Shape(4096, 5120, 5120, 128),
)

_POWERS_M = tuple(2**p for p in range(15))  # 1 to 16384
_POWERS_R = tuple(2**p for p in range(8))  # 1 to 128
_WIDE = (1024, 2048, 3072, 4096)  # K

# quick: a decode step, a short batch and a training batch. rows, ranks: one size varied. strides:
# rows of x and weight that are a multiple of 4 KiB apart, in which caches hold few at once.
GRIDS: dict[str, dict[str, tuple[Shape, ...]]] = {
    "cpu": {
        "standard": _CPU,
        "quick": (_CPU[1], _CPU[3], _CPU[5]),
        "rows": tuple(Shape(M, 768, 768, 16) for M in _POWERS_M),
        "ranks": tuple(Shape(960, 768, 768, R) for R in _POWERS_R),
        "strides": tuple(Shape(M, K, 1024, 16) for K in _WIDE for M in (1, 16, 256)),
    },
    "cuda": {
        "standard": _CUDA,
        "quick": (_CUDA[1], _CUDA[3], _CUDA[4]),
        "rows": tuple(Shape(M, 4096, 4096, 16) for M in _POWERS_M),
        "ranks": tuple(Shape(8192, 4096, 4096, R) for R in _POWERS_R),
        "strides": tuple(Shape(M, K, 4096, 16) for K in _WIDE for M in (1, 16, 2048)),
    },
}


@dataclass(frozen=True)
class Case:
    """The inputs of one shape, on one device, shared by all providers.

    x (M, K), dy (M, N), weight (N, K), bias (N,) are of one dtype, A (K, R) and B (R, N) of that
    one or wider. In mode "fwd_bwd" x, A and B require a gradient; weight and bias are frozen. Of a
    base of codes, `weight` is what they stand for and `unquantised` what they were made of.
    """

    shape: Shape
    mode: str
    x: Tensor
    dy: Tensor
    weight: Tensor
    bias: Tensor
    A: Tensor
    B: Tensor
    alpha: float = ALPHA
    dropout: float = 0.0
    base: str = "plain"
    unquantised: Tensor | None = None

    @property
    def training(self) -> bool:
        """Whether gradients are part of the case."""
        return self.mode == "fwd_bwd"


def make_case(
    shape: Shape,
    device: str,
    dtype: torch.dtype,
    mode: str,
    *,
    adapter_dtype: torch.dtype | None = None,
    dropout: float = 0.0,
    base: str = "plain",
) -> Case:
    """Draw the inputs so that y, its low-rank part and every gradient are of order 1 per term.

    A and B are both random: a B of zeros, as at initialisation, would make dA zero.

    Args:
        shape: M, K, N, R.
        device: where they are.
        dtype: of all but A and B.
        mode: of MODES.
        adapter_dtype: of A and B; None takes `dtype`, so that none does more arithmetic.
        dropout: probability of a zero in the low-rank part's x.
        base: format of the weight: "plain" or one of codes.FORMATS.

    """
    M, K, N, R = shape
    generator = torch.Generator(device).manual_seed(0)
    learns = mode == "fwd_bwd"
    adapters = adapter_dtype or dtype

    def normal(*size: int, scale: float = 1.0, grad: bool = False, dtype=dtype) -> Tensor:
        values = torch.randn(*size, generator=generator, device=device)
        return (values * scale).to(dtype).requires_grad_(grad)

    case = Case(
        shape=shape,
        mode=mode,
        x=normal(M, K, grad=learns),
        dy=normal(M, N),
        weight=normal(N, K, scale=K**-0.5),
        bias=normal(N),
        A=normal(K, R, scale=K**-0.5, grad=learns, dtype=adapters),
        B=normal(R, N, scale=R**-0.5, grad=learns, dtype=adapters),
        dropout=dropout,
    )
    if base == "plain":
        return case
    codes = quantised(case.weight, base)
    weight = dequantised(codes, N, K, dtype)
    return replace(case, base=base, weight=weight, unquantised=case.weight)


def flops(shape: Shape, mode: str, *, lora: bool = True) -> int:
    """Count the multiplications and additions of one call, each as one operation.

    Forward: x @ weight.T, x @ A, h @ B. Backward: dx and, with `lora`, t, t @ A.T, dA and dB.
    """
    M, K, N, R = shape
    base, skinny = 2 * M * K * N, 2 * M * R * (K + N) if lora else 0
    return base + skinny if mode == "fwd" else 2 * base + 3 * skinny


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


def shape(text: str) -> Shape:
    """Read an argument M,K,N,R."""
    try:
        return parse_shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def positive(kind: type):
    """Return a reader of positive, finite numbers of a kind: int or float."""

    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be a positive {kind.__name__}, got {text!r}")
        return value

    return convert


def names_of(what: str, known: Collection[str]):
    """Return a reader of NAME,...: each of `known`, or all of them."""

    def convert(text: str) -> list[str]:
        names = list(known) if text == "all" else list(dict.fromkeys(text.split(",")))
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(
                f"no {what} {unknown[0]!r}, there are: {', '.join(known)}"
            )
        return names

    return convert


def device_here(text: str) -> str:
    """Type of a --device argument: refuses cuda where there is none."""
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("cuda asked for, but torch finds no CUDA device")
    return text


def writable(text: str) -> Path:
    """Take the name of a file that can be written."""
    path = Path(text)
    if not path.parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(f"no file can be written at {text}")
    return path
