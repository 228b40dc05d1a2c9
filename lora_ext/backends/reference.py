"""Plain PyTorch: the specification, what every other backend is tested against, the last fallback.

y = x @ weight.T + bias + alpha * (x @ A @ B)
"""

import torch.nn.functional as F
from torch import Tensor


def unsupported(x: Tensor, weight: Tensor, A: Tensor) -> str | None:
    """Answer None: whatever PyTorch can multiply runs here."""
    return None


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    """Return y (M, N) and h = x @ A (M, R), bit for bit as the plain layer computes them."""
    h = x @ A.to(x.dtype)
    return F.linear(x, weight, bias) + alpha * (h @ B.to(x.dtype)), h


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
    """Return (dx, dweight, dbias, dA, dB), None where `needs` does not ask; t = dy @ B.T."""
    need_dx, need_dweight, need_dbias, need_dA, need_dB = needs
    t = dy @ B.to(dy.dtype).T if need_dx or need_dA else None  # (M, R)
    return (
        dy @ weight + alpha * (t @ A.to(dy.dtype).T) if need_dx else None,
        dy.T @ x if need_dweight else None,
        dy.sum(0) if need_dbias else None,
        alpha * (x.T @ t).to(A.dtype) if need_dA else None,
        alpha * (h.T @ dy).to(B.dtype) if need_dB else None,
    )
