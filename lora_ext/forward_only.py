"""Linears of other libraries whose product has no gradient of x, or a wrong one.

y is that of the library; dx is the dequantised weight's, made again in each backward.
"""

from typing import Any

import torch
from torch import Tensor, nn

from . import fp8, int4


def format_of(module: nn.Module) -> Any:
    """Return the module with `product`, `parts_of` and `weight_of` of such a linear, or None."""
    if fp8.is_fp8(module):
        return fp8
    return int4 if int4.is_int4(module) else None


def call(module: Any, x: Tensor, format: Any) -> Tensor:
    """Return x @ weight.T + bias, differentiable in x and bias.

    Args:
        module: a linear that `format_of` knows.
        x: (..., in_features).
        format: what `format_of` returned.

    """
    return _ForwardOnly.apply(x, module.bias, module, format)


class _ForwardOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, module, format):
        ctx.save_for_backward(*format.parts_of(module))
        ctx.call = (module, format, x.dtype, None if bias is None else bias.dtype)
        return format.product(module, x)

    @staticmethod
    def backward(ctx, dy):
        module, format, dtype, bias = ctx.call
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ format.weight_of(module, ctx.saved_tensors, dy.dtype)).to(dtype)
        if ctx.needs_input_grad[1]:
            dbias = dy.flatten(0, -2).sum(0).to(bias)
        return dx, dbias, None, None
