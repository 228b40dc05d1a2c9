"""Plain PyTorch: the specification, what every other backend is tested against, the last fallback.

y = x @ weight.T + bias + scale * ((keep * x) @ A @ B)
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call import Call, Weight
from ..codes import dequantised
from ..dropout import unpack_bits
from ..ops import is_transposed


def unsupported(call: Call) -> str | None:
    """Answer None for whatever PyTorch can multiply."""
    if call.weight is not None and call.weight.format == "panels":
        return "takes no weight in panels"
    return None


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Return y (M, N) and h (M, R), without a mask bit for bit as the plain layer computes them."""
    x, weight, bias, (A, B, scale, keep) = call
    h = masked(x, keep) @ A.to(x.dtype)
    low = scale * (h @ B.to(x.dtype))
    return low if weight is None else F.linear(x, matrix_of(weight, A, B, x), bias) + low, h


def backward(
    dy: Tensor, call: Call, h: Tensor | None, needs: tuple[bool, bool, bool, bool, bool]
) -> tuple[Tensor | None, ...]:
    """Return (dx, dweight, dbias, dA, dB), None where `needs` does not ask; t = dy @ B.T.

    By differentiable operations: under create_graph they are the gradients' own graph.
    """
    x, weight, _, (A, B, scale, keep) = call
    need_dx, need_dweight, need_dbias, need_dA, need_dB = needs
    dx = dA = None
    if need_dx or need_dA:
        t = dy @ B.to(dy.dtype).T  # (M, R)
    if need_dx:
        dx = masked(scale * (t @ A.to(dy.dtype).T), keep)
        dx = dx if weight is None else dy @ matrix_of(weight, A, B, dy) + dx
    if need_dA:
        dA = scale * product_like(A, masked(x, keep).T, t).to(A.dtype)
    dweight = dy.T @ x if need_dweight else None
    dbias = dy.sum(0) if need_dbias else None
    dB = None
    if need_dB and h is not None:
        dB = scale * product_like(B, h.T, dy).to(B.dtype)
    return dx, dweight, dbias, dA, dB


def matrix_of(weight: Weight, A: Tensor, B: Tensor, like: Tensor) -> Tensor:
    """Return the weight, (N, K), in the dtype of `like` where codes stand for it."""
    if weight.format == "plain":
        return weight.data
    return dequantised(weight, B.shape[1], A.shape[0], like.dtype)


def masked(x: Tensor, keep: Tensor | None) -> Tensor:
    """Return keep * x, (M, K)."""
    return x if keep is None else x.masked_fill(~unpack_bits(keep, x.shape[1]), 0)


def product_like(factor: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right in the memory layout of `factor`, whose gradient it is.

    Compiled code lays its own results out, and may not ask for strides in a backward.
    """
    if not torch.compiler.is_compiling() and is_transposed(factor):
        return (right.T @ left.T).T
    return left @ right


def addmm_factor(scale: float) -> float:
    """Return scale as addmm takes it, which raises beyond float32 where `*` gives an infinity."""
    return math.copysign(math.inf, scale) if abs(scale) > torch.finfo(torch.float32).max else scale
