"""DoRA: the rows of the adapted weight are rescaled to a trained magnitude.

    n = norm of each row of weight + scale * (A @ B).T;  g = magnitude / n, n taken as a constant
    y = g * (x @ weight.T + scale * (x @ A @ B)) + bias

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353. As in PEFT the bias is
not rescaled, and where dropout is on it drops what is rescaled, but not what the base gets.
"""

import torch
from torch import Tensor

from .backends import cpp
from .call import Call, LowRank, Weight
from .checks import HALF

_PIECE = 1 << 17  # elements worked on at a time: they stay in a core's cache


def row_scale(magnitude: Tensor, weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Return g = magnitude / n, (N,), differentiable in magnitude.

    Args:
        magnitude: (N,).
        weight: (N, K), of any strides.
        A: (K, R).
        B: (R, N).
        scale: factor of A @ B.

    """
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        norm = _norm(weight, A, B, scale)
    return magnitude / norm


def _norm(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Return the norms, (N,), in float32 or wider; the adapted weight is never there whole."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    call = Call(weight[:0], Weight(weight), None, LowRank(A, B, scale))
    of = {A.dtype, B.dtype}
    if (
        weight.is_cpu
        and (of == {weight.dtype} or (of == {torch.float32} and weight.dtype in HALF))
        and not torch.compiler.is_compiling()
        and cpp.unsupported(call) is None
    ):
        return torch.ops.lora_ext.dora_norm.default(weight, A, B, scale)
    left, right = B.T.to(wide), A.T.to(wide)
    norm = torch.empty(len(weight), dtype=wide, device=weight.device)
    for some in _pieces(weight):
        adapted = torch.addmm(weight[some].to(wide), left[some], right, alpha=scale)
        norm[some] = torch.linalg.vector_norm(adapted, dim=1)
    return norm


def rescaled(z: Tensor, g: Tensor, bias: Tensor | None) -> Tensor:
    """Return g * z + bias in z's dtype, (..., N), differentiable in all three.

    Args:
        z: (..., N); kept for the backward.
        g: (N,), float32 or wider.
        bias: (N,) or None.

    """
    if torch.compiler.is_compiling():
        y = g * z if bias is None else g * z + bias
        return y.to(z.dtype)
    return _Rescaled.apply(z, g, bias)


class _Rescaled(torch.autograd.Function):
    """The gradient reads dy and z once, and makes dz and g's sums of the same rows."""

    @staticmethod
    def forward(ctx, z, g, bias):
        ctx.save_for_backward(z, g)
        ctx.bias_dtype = None if bias is None else bias.dtype
        if z.dtype == g.dtype and (bias is None or bias.dtype == g.dtype):
            return z * g if bias is None else torch.addcmul(bias, z, g)
        y = torch.empty_like(z)
        rows, of = y.view(-1, y.shape[-1]), z.reshape(-1, z.shape[-1])
        wide_bias = torch.zeros_like(g) if bias is None else bias.to(g.dtype)
        for some in _pieces(rows):
            rows[some] = torch.addcmul(wide_bias, of[some].to(g.dtype), g)
        return y

    @staticmethod
    def backward(ctx, dy):
        z, g = ctx.saved_tensors
        need_dz, need_dg, need_dbias = ctx.needs_input_grad
        N = z.shape[-1]
        dz = dg = dbias = None
        if need_dbias:
            dbias = dy.reshape(-1, N).sum(0).to(ctx.bias_dtype)
        if torch.is_grad_enabled():  # under create_graph: by differentiable operations
            dz, dg = (dy * g).to(z.dtype), (dy.to(g.dtype) * z).reshape(-1, N).sum(0)
        else:
            dz, dg = torch.empty(z.shape, dtype=z.dtype, device=z.device), torch.zeros_like(g)
            to, of, by = dz.view(-1, N), z.reshape(-1, N), dy.reshape(-1, N)
            for some in _pieces(to):
                part = by[some].to(g.dtype)
                torch.mul(part, g, out=to[some]) if z.dtype == g.dtype else to[some].copy_(part * g)
                if need_dg:
                    dg += torch.mul(part, of[some]).sum(0)
        return dz if need_dz else None, dg if need_dg else None, dbias


def sum_of_products(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum over rows of a * b, (N,) in a dtype, of matrices (M, N)."""
    total = torch.zeros(b.shape[1], dtype=dtype, device=b.device)
    for some in _pieces(b):
        total += torch.mul(a[some].to(dtype), b[some]).sum(0)
    return total


def _pieces(matrix: Tensor) -> list[slice]:
    """Cut the rows of a matrix into pieces; on a GPU, and in compiled code, there is one."""
    rows, columns = matrix.shape
    step = rows
    if matrix.is_cpu and not torch.compiler.is_compiling():
        step = max(_PIECE // max(columns, 1), 16)
    return [slice(start, start + step) for start in range(0, rows, max(step, 1))]
