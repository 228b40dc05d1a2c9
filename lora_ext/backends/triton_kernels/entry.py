"""The way in from backends/triton.py: a call, its regime and tile, the kernels."""

from typing import Any

from torch import Tensor
from triton import knobs

from . import interpreter, tuning
from .cards import card_of
from .gradients import BACKWARD, Backward
from .regimes import FORWARD, Forward

if knobs.runtime.interpret:
    interpreter.mend()


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    alpha: float,
    forced: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Return (y, h); nothing is empty."""
    call = Forward(x, weight, bias, A, B, alpha, card_of(x.device))
    name, tile = tuning.choose_forward(call, forced["forward"], forced["descriptors"])
    return FORWARD[name](call, tile)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    h: Tensor,
    alpha: float,
    needs: tuple[bool, ...],
    forced: dict[str, Any],
) -> tuple[Tensor | None, ...]:
    """Return (dx, dA, dB), None where `needs` does not ask; nothing that is read is empty."""
    call = Backward(dy, x, weight, A, B, h, alpha, needs, card_of(dy.device))
    name, tile = tuning.choose_backward(call, forced["backward"], forced["descriptors"])
    return BACKWARD[name](call, tile)
