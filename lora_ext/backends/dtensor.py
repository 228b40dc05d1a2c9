"""Sharded tensors (DTensor): the C++ operators, each rank on its own part of x, weight, A and B.

How the parts of the result follow from the parts of the arguments is said by the sharding rules in
lora_ext/distributed.py, which adds its tensor type to TYPES when it is imported.
"""

from typing import Any

from torch import Tensor

from . import cpp

TYPES: set[type] = set()


def unsupported(x: Tensor, weight: Tensor, A: Tensor) -> str | None:
    """Say why the operators can't run on these tensors; None when they can."""
    for name, tensor in (("x", x), ("weight", weight), ("A", A)):
        if type(tensor) not in TYPES:
            return f"takes DTensors once lora_ext.distributed is imported, {name} is no such"
    # Not x's own part: it may still be on its way here, a tensor of another class.
    part, factor = (t._local_tensor for t in (weight, A))  # type: ignore[attr-defined]
    return cpp.unsupported(part, part, factor)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    """Return y (M, N) and h = x @ A (M, R), sharded as the rules say."""
    return cpp.forward(x, weight, bias, A, B, alpha)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    h: Tensor,
    alpha: float,
    needs: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Return (dx, dweight, dbias, dA, dB), None where `needs` does not ask.

    A parameter's gradient that each rank has a summand of is summed here, so that what an optimiser
    reads is whole; dx is left to the communication that brought x.
    """
    dx, *others = cpp.backward(dy, x, weight, A, B, h, alpha, needs)
    return (dx, *(None if g is None else _summed(g) for g in others))


def _summed(gradient: Any) -> Tensor:
    if not any(placement.is_partial() for placement in gradient.placements):
        return gradient
    from torch.distributed.tensor import Replicate

    whole = [Replicate() if p.is_partial() else p for p in gradient.placements]
    return gradient.redistribute(placements=whole)
