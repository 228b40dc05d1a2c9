"""Dropout on the low-rank branch, from a seed instead of a kept mask.

    y = x @ weight.T + bias + alpha / (1 - p) * ((keep * x) @ A @ B)

keep (M, K) holds 0 with probability p. An element of it is a hash of the seed, its row and its
column, so the backward computes it anew, the same on every device, and what is kept is the seed.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backends import reference

_MASK = 0xFFFFFFFF


def draw_seed(x: Tensor) -> Tensor:
    """Draw a seed, (2,) int64 on x's device, from torch's default generator there."""
    return torch.randint(2**31, (2,), device=x.device)


def keep_mask(seed: Tensor, shape: tuple[int, int], p: float) -> Tensor:
    """Return keep, (M, K) bool: False with probability p, each element by itself.

    Rows and columns are hashed one by one; an element is a multiply-xorshift-multiply of the two
    hashes, in int32, where products wrap (six passes over (M, K), the most of what this costs).
    Multipliers: C. Wellons, hash-prospector.
    """
    M, K = shape
    rows = torch.arange(M, device=seed.device)
    columns = torch.arange(K, device=seed.device)
    row = _mix(_mix((rows & _MASK) ^ seed[0]) ^ (rows >> 32) ^ seed[1])  # (M,)
    column = _mix(_mix(columns ^ seed[1]) ^ seed[0])  # (K,)
    n = (_signed(row)[:, None] ^ _signed(column)) * 0x21F0AAAD  # (M, K)
    n = (n ^ (n >> 15)) * 0x735A2D97
    return n >= min(round(p * 2**32), 2**32 - 1) - 2**31


def _mix(n: Tensor) -> Tensor:
    """Hash 32-bit numbers held in int64, where no product overflows."""
    n = (n ^ (n >> 16)) * 0x21F0AAAD & _MASK
    n = (n ^ (n >> 15)) * 0x735A2D97 & _MASK
    return n ^ (n >> 15)


def _signed(n: Tensor) -> Tensor:
    return (n - 2**31).to(torch.int32)


def drop(x: Tensor, p: float) -> Tensor:
    """Return keep * x, not scaled, for a new seed; differentiable, keeping the seed alone.

    Args:
        x: (..., K), a plain tensor.
        p: probability of a zero, from 0 to below 1.

    Raises:
        ValueError: x is nested or sharded.

    """
    _require_plain(x)
    rows = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.reshape(0, 0)
    return _Drop.apply(rows, draw_seed(x), p).view(x.shape)


def _require_plain(x: Tensor) -> None:
    if x.is_nested or hasattr(x, "device_mesh"):
        got = "a nested tensor" if x.is_nested else f"a {type(x).__name__}"
        raise ValueError(f"x must be a plain tensor where dropout is on, got {got}")


class _Drop(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, seed, p):
        return x.masked_fill(~keep_mask(seed, x.shape, p), 0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])
        ctx.p = inputs[2]

    @staticmethod
    def backward(ctx, dy):
        (seed,) = ctx.saved_tensors
        return dy.masked_fill(~keep_mask(seed, dy.shape, ctx.p), 0), None, None


def linear_with_dropout(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    alpha: float,
    p: float,
) -> Tensor:
    """Return y (M, N) of the equation above, for x (M, K), by PyTorch's products."""
    _require_plain(x)
    return _LoRALinearDropout.apply(x, weight, bias, A, B, alpha / (1 - p), p, draw_seed(x))


class _LoRALinearDropout(torch.autograd.Function):
    """As functional._LoRALinear, the low-rank part over keep * x; saves the seed for keep."""

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scale, p, seed):
        dropped = x.masked_fill(~keep_mask(seed, x.shape, p), 0)
        h = dropped @ A.to(x.dtype)  # (M, R)
        need_dx, need_dweight, _, need_dA, need_dB = ctx.needs_input_grad[:5]
        ctx.save_for_backward(
            x if need_dA or need_dweight else None,
            weight if need_dx else None,
            A if need_dx or need_dA else None,
            B if need_dx or need_dA or need_dB else None,
            h if need_dB else None,
            seed,
        )
        ctx.scale, ctx.p, ctx.shape = scale, p, x.shape
        return F.linear(x, weight, bias) + scale * (h @ B.to(x.dtype))

    @staticmethod
    def backward(ctx, dy):
        return (_gradients_once if torch.is_grad_enabled() else _gradients)(ctx, dy)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradient of each argument of _LoRALinearDropout."""
    x, weight, A, B, h, seed = ctx.saved_tensors
    need_dx, need_dweight, need_dbias, need_dA, need_dB = ctx.needs_input_grad[:5]
    dropping = ~keep_mask(seed, ctx.shape, ctx.p) if need_dx or need_dA else None
    dx = None
    if need_dx:
        low = (dy @ B.to(dy.dtype).T) @ A.to(dy.dtype).T  # (M, K)
        dx = dy @ weight + (ctx.scale * low).masked_fill(dropping, 0)
    dropped = x.masked_fill(dropping, 0) if need_dA else x
    needs = (False, False, need_dbias, need_dA, need_dB)
    _, _, dbias, dA, dB = reference.backward(dy, dropped, weight, A, B, h, ctx.scale, needs)
    dweight = dy.T @ x if need_dweight else None
    return dx, dweight, dbias, dA, dB, None, None, None


_gradients_once = once_differentiable(_gradients)
