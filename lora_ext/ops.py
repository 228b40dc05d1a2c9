"""The operators: schema and shape rule here, a kernel per device in the backends.

All are functional (nothing is written into an argument) and take `x` as a matrix, so that a
device file has one shape to serve. Their operands are call.py's, flat: a dispatch of nested lists
costs twice as much. What a call does not have is None.

`lora_ext` has the C++ kernels for the CPU and for CUDA. Triton's, for CUDA too, are registered
under `lora_ext_triton`: an operator takes one kernel a device.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .call import Call

SCHEMAS = {
    "linear_fwd": (
        "(Tensor x, Tensor? weight, Tensor? bias, Tensor A, Tensor B, float scale, *,"
        ' str format="plain", Tensor? keep=None, Tensor? weight_scale=None) -> (Tensor y, Tensor h)'
    ),
    # A gradient that `needs` (dx, dweight, dbias, dA, dB) does not ask for is None.
    "linear_bwd": (
        "(Tensor dy, Tensor? x, Tensor? weight, Tensor? A, Tensor? B, Tensor? h, float scale,"
        ' bool[5] needs, *, str format="plain", Tensor? keep=None, Tensor? weight_scale=None)'
        " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dA, Tensor dB)"
    ),
}


def fwd_fake(
    x, weight, bias, A, B, scale, *, format="plain", keep=None, weight_scale=None
) -> tuple[Tensor, Tensor]:
    """Shapes of linear_fwd: y (M, N) and h (M, R)."""
    _require_device_of(x, weight=weight, bias=bias, A=A, B=B, keep=keep, weight_scale=weight_scale)
    M = x.shape[0]
    return x.new_empty(M, B.shape[1]), x.new_empty(M, A.shape[1])


def bwd_fake(
    dy, x, weight, A, B, h, scale, needs, *, format="plain", keep=None, weight_scale=None
) -> tuple[Tensor | None, ...]:
    """Shapes of linear_bwd: a gradient has the shape of its argument."""
    _require_device_of(dy, x=x, weight=weight, A=A, B=B, h=h, keep=keep, weight_scale=weight_scale)
    M, N = dy.shape
    dx = dy.new_empty(M, A.shape[0]) if needs[0] else None
    dweight = dy.new_empty(N, x.shape[1]) if needs[1] else None
    dbias = dy.new_empty(N) if needs[2] else None
    dA = empty_like_factor(A) if needs[3] else None
    dB = empty_like_factor(B) if needs[4] else None
    return dx, dweight, dbias, dA, dB


def _require_device_of(first: Tensor, **others: Tensor | None) -> None:
    # Of tensors on a CPU and one on meta the dispatcher takes the shape rule, and not a kernel.
    for name, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(f"{name} must be on device {first.device}, got {tensor.device}")


def empty_like_factor(factor: Tensor) -> Tensor:
    """Return memory for the gradient of A or B, (rows, cols), laid out as the factor is.

    A transposed factor, as PEFT's `weight.T` is, gets a transposed gradient, which autograd then
    hands on without a copy.
    """
    if is_transposed(factor):
        rows, cols = factor.shape
        return torch.empty((cols, rows), dtype=factor.dtype, device=factor.device).t()
    return torch.empty(factor.shape, dtype=factor.dtype, device=factor.device)


def is_transposed(factor: Tensor) -> bool:
    """Whether a matrix is the transpose of one with dense rows."""
    return factor.layout is torch.strided and factor.stride(0) == 1 and factor.stride(1) != 1


def define(namespace: str) -> torch.library.Library:
    """Declare the operators of SCHEMAS under a namespace, with their shape rules."""
    library = torch.library.Library(namespace, "DEF")
    fakes: dict[str, Any] = {"linear_fwd": fwd_fake, "linear_bwd": bwd_fake}
    for name, schema in SCHEMAS.items():
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{namespace}::{name}", fakes[name], lib=library)
    return library


def _pack_fake(weight: Tensor, transposed: bool) -> Tensor:
    depth, cols = reversed(weight.shape) if transposed else weight.shape
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    panel = 64 // dtype.itemsize  # a row of a panel is a cache line
    if weight.dtype == torch.bfloat16 and import_module("lora_ext._C").takes_pairs():
        depth, dtype = (depth + 1) // 2 * 2, torch.bfloat16
    return weight.new_empty(depth * ((cols + panel - 1) // panel * panel), dtype=dtype)


def _linears_fwd_fake(x, weights, biases, As, Bs, scales, formats, keeps, weight_scales):
    results = [
        fwd_fake(x, *operands, 1.0, keep=keep)
        for *operands, keep in zip(weights, biases, As, Bs, keeps, strict=True)
    ]
    return [y for y, _ in results], x.new_empty(x.shape[0], sum(A.shape[1] for A in As))


def linears_bwd_fake(dys, x, weights, As, Bs, hs, scales, needs, formats, keeps, weight_scales):
    """Shapes of linears_bwd."""
    gradients: list[Tensor | None] = []
    layers = zip(dys, weights, As, Bs, hs, keeps, strict=True)
    for i, (dy, weight, A, B, h, keep) in enumerate(layers):
        own = (needs[0], *needs[1 + 4 * i : 5 + 4 * i])
        dx, *others = bwd_fake(dy, x, weight, A, B, h, 1.0, own, keep=keep)
        gradients += others if gradients else [dx, *others]
    return [dys[0].new_empty(0) if g is None else g for g in gradients]  # a list holds no None


# dx, the sum over the layers, and after it dweight, dbias, dA and dB of each, as `needs` has them.
LINEARS_BWD = (
    "linears_bwd(Tensor[] dys, Tensor? x, Tensor?[] weights, Tensor?[] As, Tensor?[] Bs,"
    " Tensor?[] hs, float[] scales, bool[] needs, str[] formats, Tensor?[] keeps,"
    " Tensor?[] weight_scales) -> Tensor[]"
)


def run_linears_bwd(
    run: Callable[..., Sequence[Tensor]],
    dys: Sequence[Tensor],
    calls: Sequence[Call],
    hs: Sequence[Tensor | None],
    needs: Sequence[tuple[bool, ...]],
) -> list[tuple[Tensor | None, ...]]:
    """Return the gradients of each call by an operator of LINEARS_BWD; dx is with the first."""
    weights, lows = [call.weight for call in calls], [call.low for call in calls]
    gradients = run(
        dys,
        next((call.x for call in calls if call.x is not None), None),
        [None if weight is None else weight.data for weight in weights],
        [low.A for low in lows],
        [low.B for low in lows],
        hs,
        [low.scale for low in lows],
        [needs[0][0], *(need for own in needs for need in own[1:])],
        ["plain" if weight is None else weight.format for weight in weights],
        [low.keep for low in lows],
        [None if weight is None else weight.scale for weight in weights],
    )
    results = []
    for i, (_, *others) in enumerate(needs):
        own = gradients[1 + 4 * i : 5 + 4 * i]
        dx = gradients[0] if needs[0][0] and i == 0 else None
        results.append((dx, *(g if n else None for g, n in zip(own, others, strict=True))))
    return results


def _draw_keep_fake(seed: Tensor, rows: int, cols: int, p: float, first_column: int = 0) -> Tensor:
    return seed.new_empty(rows, (cols + 7) // 8, dtype=torch.uint8)


def _pack_keep_fake(mask: Tensor) -> Tensor:
    return mask.new_empty(mask.shape[0], (mask.shape[1] + 7) // 8, dtype=torch.uint8)


def _draw_bernoulli_fake(state: Tensor, rows: int, cols: int, p: float) -> Tensor:
    return state.new_empty(rows, (cols + 7) // 8, dtype=torch.uint8)


def _gated_fwd_fake(gate: Tensor, up: Tensor, act: str) -> Tensor:
    return gate.new_empty(gate.shape)


def _gated_bwd_fake(d_hidden, gate, up, act, d_gate, d_up) -> None:
    pass


def _dora_norm_fake(weight, A, B, scale) -> Tensor:
    return weight.new_empty(len(weight), dtype=torch.promote_types(weight.dtype, torch.float32))


def _dora_dropped_fwd_fake(y, x, weight, bias, h, B, keep, factor, scale, p) -> Tensor:
    return y.new_empty(y.shape)


def _dora_dropped_bwd_fake(dx, dy, weight, keep, factor) -> None:
    pass


LIBRARY = define("lora_ext")
# On the CPU: layers of one x at once, with a list for each operand (their h side by side); a gated
# MLP's act(gate) * up, and its gradients, of which d_gate may be d_hidden itself; DoRA's norms
# (dora.py); DoRA over a dropped x (dora_dropped.py), and its gradient; a weight in panels; and
# dropout's mask as bits: drawn from a seed's hash (dropout.py, keep_mask), drawn as `bernoulli_`
# would from a generator's state, or packed from a mask of bytes.
for _schema, _fake in (
    (
        "linears_fwd(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor[] As, Tensor[] Bs,"
        " float[] scales, str[] formats, Tensor?[] keeps, Tensor?[] weight_scales)"
        " -> (Tensor[] ys, Tensor h)",
        _linears_fwd_fake,
    ),
    (LINEARS_BWD, linears_bwd_fake),
    ("gated_fwd(Tensor gate, Tensor up, str act) -> Tensor", _gated_fwd_fake),
    (
        "gated_bwd(Tensor d_hidden, Tensor gate, Tensor up, str act, Tensor(a!) d_gate,"
        " Tensor(b!) d_up) -> ()",
        _gated_bwd_fake,
    ),
    ("dora_norm(Tensor weight, Tensor A, Tensor B, float scale) -> Tensor", _dora_norm_fake),
    (
        "dora_dropped_fwd(Tensor(a!) y, Tensor x, Tensor weight, Tensor? bias, Tensor h, Tensor B,"
        " Tensor keep, Tensor factor, float scale, float p) -> Tensor",
        _dora_dropped_fwd_fake,
    ),
    (
        "dora_dropped_bwd(Tensor(a!) dx, Tensor dy, Tensor weight, Tensor keep, Tensor factor)"
        " -> ()",
        _dora_dropped_bwd_fake,
    ),
    ("pack_weight(Tensor weight, bool transposed) -> Tensor", _pack_fake),
    (
        "draw_keep(Tensor seed, SymInt rows, SymInt cols, float p, SymInt first_column=0)"
        " -> Tensor",
        _draw_keep_fake,
    ),
    (
        "draw_bernoulli(Tensor(a!) state, SymInt rows, SymInt cols, float p) -> Tensor",
        _draw_bernoulli_fake,
    ),
    ("pack_keep(Tensor mask) -> Tensor", _pack_keep_fake),
):
    LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"lora_ext::{_schema.split('(')[0]}", _fake, lib=LIBRARY)
