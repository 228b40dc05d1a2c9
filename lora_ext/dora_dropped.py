"""DoRA in training with a small dropout: the weight meets x and the dropped x, in one product.

    z = dropped @ (weight.T + scale * A @ B),  dropped = keep * x / (1 - p)
    y = x @ weight.T + scale * dropped @ A @ B + (g - 1) * z + bias,  as in PEFT

What is dropped is few, so its part of the product is a sparse one (csrc/cpu/dora_dropped.cpp):

    y, z:  from y0 = x @ weight.T + scale * dropped @ A @ B, one call of ours, and q, what is
           dropped times weight.T:  dropped @ weight.T = (x @ weight.T - q) / (1 - p)
    dx:    dy @ weight where x is dropped; where it is kept dy @ (c * weight), c = 1 + (g - 1) /
           (1 - p), and the low-rank part's: one call of ours, as of a weight c * weight
    dg:    the sum of dy * z over rows; z is kept for the backward

Where p is larger, or there is no kernel, the caller takes two products.
"""

import torch
from torch import Tensor

from .backends import cpp, reference
from .call import Call
from .checks import HALF
from .dora import sum_of_products

# A forward of 960 rows, 768 to 3072, takes 67 ms at 0.2, two products 95. A step of 32 rows, for
# which the weight is laid out all the same, takes 1.5 times as long by two products at 2048 x 2048
# and 1.01 at 4096 x 4096 (Zen 4, AVX-512).
_MOST = 0.2
_LEAST_ROWS = 32


def is_few(call: Call, g: Tensor, p: float) -> bool:
    """Whether `dora_dropped` computes a layer here, and faster than two products.

    Args:
        call: the operands, without a mask; x (M, K).
        g: (N,).
        p: probability with which an element of x is dropped.

    """
    x, weight, bias, (A, *_) = call
    return (
        0 < p <= _MOST
        and x.is_cpu
        and len(x) >= _LEAST_ROWS
        and x.shape[1] > 0
        and cpp.unsupported(call) is None
        and weight is not None
        and weight.format == "plain"
        and not weight.data.requires_grad
        and x.dtype is weight.data.dtype
        and (bias is None or bias.dtype is x.dtype)
        and (A.dtype is x.dtype or (A.dtype is torch.float32 and x.dtype in HALF))
        and g.dtype is torch.promote_types(x.dtype, torch.float32)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def dora_dropped(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    g: Tensor,
    keep: Tensor,
    p: float,
) -> Tensor:
    """Return DoRA's y over a dropped x, (M, N), differentiable in x, bias, A, B and g.

    Args:
        x: (M, K).
        weight: (N, K), which needs no gradient.
        bias: (N,) or None.
        A: (K, R).
        B: (R, N).
        scale: factor of A @ B.
        g: (N,), the magnitude over the adapted row's norm (dora.row_scale).
        keep: dropout's mask as bits, (M, ceil(K / 8)) uint8.
        p: what an element was dropped with, below 1.

    """
    return _DoraDropped.apply(x, weight, bias, A, B, scale / (1 - p), g, keep, p)


class _DoraDropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scale, g, keep, p):
        y, h = torch.ops.lora_ext.linear_fwd.default(x, weight, None, A, B, scale, keep=keep)
        z = torch.ops.lora_ext.dora_dropped_fwd.default(
            y, x, weight, bias, h, B, keep, g - 1, scale, p
        )
        ctx.save_for_backward(x, weight, A, B, g, keep, h, z)
        ctx.scale, ctx.p = scale, p
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, A, B, g, keep, h, z = ctx.saved_tensors
        scale, needs = ctx.scale, ctx.needs_input_grad
        if torch.is_grad_enabled():  # under create_graph: by differentiable operations
            return _differentiable(ctx, dy, x, weight, A, B, g, keep)
        need_dx, _, need_dbias, need_dA, need_dB, _, need_dg, *_ = needs
        more = (g - 1) / (1 - ctx.p)
        rescaled = ((1 + more)[:, None] * weight).to(weight.dtype) if need_dx else weight
        dx, _, dbias, dA, dB = torch.ops.lora_ext.linear_bwd.default(
            dy, x, rescaled, A, (g * B).to(B.dtype), h, scale,
            [need_dx, False, need_dbias, need_dA, need_dB], keep=keep,
        )  # fmt: skip
        if need_dx:
            torch.ops.lora_ext.dora_dropped_bwd.default(dx, dy.contiguous(), weight, keep, more)
        dB = (g * dB).to(B.dtype) if need_dB else None
        dg = sum_of_products(dy, z, g.dtype) if need_dg else None
        return dx, None, dbias, dA, dB, None, dg, None, None


def _differentiable(ctx, dy, x, weight, A, B, g, keep):
    """Return the same by PyTorch's operations, in g's dtype; autograd rounds them to each one's."""
    dtypes = [tensor.dtype for tensor in (x, x, x, A, B, g, g)]
    dy, x, weight, A, B = (tensor.to(g.dtype) for tensor in (dy, x, weight, A, B))
    dropped = reference.masked(x, keep)
    low = ctx.scale * (dropped @ A)
    z = dropped @ weight.T / (1 - ctx.p) + low @ B
    dz, dlow = (g - 1) * dy, ctx.scale * ((g * dy) @ B.T)
    dx = dy @ weight + reference.masked(dz @ weight / (1 - ctx.p) + dlow @ A.T, keep)
    dA, dB = dropped.T @ dlow, low.T @ (g * dy)
    gradients = dx, None, dy.sum(0), dA, dB, None, (dy * z).sum(0)
    rounded = (
        None if d is None or not need else d.to(dtype)
        for d, need, dtype in zip(gradients, ctx.needs_input_grad, dtypes, strict=False)
    )
    return *rounded, None, None
