"""One case: the tensors that every provider gets, and the arithmetic that it costs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .grids import Shape

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODES = ("fwd", "fwd_bwd")

# Neither 1 nor a power of two: a lost or rounded scale shows in the correctness gate.
ALPHA = 0.75


@dataclass(frozen=True)
class Case:
    """The inputs of one shape, all of one dtype on one device, shared by all providers.

    x (M, K), dy (M, N), weight (N, K), bias (N,), A (K, R), B (R, N). In mode "fwd_bwd" x, A and B
    require a gradient; weight and bias are frozen.
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

    @property
    def training(self) -> bool:
        """Whether gradients are part of the case."""
        return self.mode == "fwd_bwd"


def make_case(shape: Shape, device: str, dtype: torch.dtype, mode: str, seed: int = 0) -> Case:
    """Draw the inputs so that y, its low-rank part and every gradient are of order 1 per term.

    A and B are both random (a B of zeros, as at initialisation, would make dA zero) and have the
    base's dtype, so that no provider does more arithmetic than another.
    """
    M, K, N, R = shape
    generator = torch.Generator(device).manual_seed(seed)
    learns = mode == "fwd_bwd"

    def normal(*size: int, scale: float = 1.0, grad: bool = False) -> Tensor:
        values = torch.randn(*size, generator=generator, device=device)
        return (values * scale).to(dtype).requires_grad_(grad)

    return Case(
        shape=shape,
        mode=mode,
        x=normal(M, K, grad=learns),
        dy=normal(M, N),
        weight=normal(N, K, scale=K**-0.5),
        bias=normal(N),
        A=normal(K, R, scale=K**-0.5, grad=learns),
        B=normal(R, N, scale=R**-0.5, grad=learns),
    )


def flops(shape: Shape, mode: str, *, lora: bool = True) -> int:
    """Count the multiplications and additions of one call, each as one operation.

    Forward: x @ weight.T, x @ A, h @ B. Backward: dx and, with `lora`, t, t @ A.T, dA and dB.
    """
    M, K, N, R = shape
    base, skinny = 2 * M * K * N, 2 * M * R * (K + N) if lora else 0
    return base + skinny if mode == "fwd" else 2 * base + 3 * skinny
