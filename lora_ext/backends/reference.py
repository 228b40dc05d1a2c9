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
    dx = dA = None
    if need_dx or need_dA:
        t = dy @ B.to(dy.dtype).T  # (M, R)
        dx = dy @ weight + alpha * (t @ A.to(dy.dtype).T) if need_dx else None
        dA = alpha * (x.T @ t).to(A.dtype) if need_dA else None
    dweight = dy.T @ x if need_dweight else None
    dbias = dy.sum(0) if need_dbias else None
    dB = alpha * (h.T @ dy).to(B.dtype) if need_dB else None
    return dx, dweight, dbias, dA, dB
