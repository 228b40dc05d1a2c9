"""lora_linears(): several adapted linears of one x, as q, k and v of an attention are.

    y_g = x @ weight_g.T + bias_g + scale_g * ((keep_g * x) @ A_g @ B_g)
    dx  = sum over g of dy_g @ weight_g + scale_g * keep_g * (dy_g @ B_g.T @ A_g.T)

One autograd Function for all of them: x is cast, checked and kept once, and dx is summed in one
buffer. What it does not take falls back to one call a layer.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backends import BACKENDS, backward_group, choose, forward_group, reference
from .call import Call, LowRank, Weight
from .checks import fit
from .codes import VALUES
from .dropout import draw_keep, scale_of
from .functional import Codes, cast_by_autocast, rows_of, with_shape
from .panels import Panels
from .parts import Part, parts_of

MOST_LAYERS = 8  # csrc/cpu/product.h, kMostLegs: two legs each


def lora_linears(x: Tensor, layers: Sequence[nn.Module | None]) -> list[Tensor | None]:
    """Run several linears, adapted or not, on one x: `[layer(x) for layer in layers]`.

    The results, gradients and random numbers are those of the single layers up to rounding; less is
    computed and kept. A quantised base is read where a single layer would read it. Where a layer
    has hooks or anything else that must be called, each layer is called by itself.

    Args:
        x: (..., in_features).
        layers: LinearWithLoRA or nn.Linear modules, or None, for which the result is None.

    Returns:
        A y for each layer, (..., out_features of that layer).

    Raises:
        TypeError: a layer that is neither a module nor None; and what a layer's own call raises.
        ValueError: likewise.

    """
    for layer in layers:
        if layer is not None and not isinstance(layer, nn.Module):
            raise TypeError(f"layers must hold modules or None, got {type(layer).__name__}")
    present = [layer for layer in layers if layer is not None]
    parts = parts_of(present, x)
    ys = parts if isinstance(parts, str) else run(x, parts)
    if isinstance(ys, str):
        ys = [layer(x) for layer in present]
    remaining = iter(ys)
    return [None if layer is None else next(remaining) for layer in layers]


def run(x: Tensor, parts: Sequence[Part], backend: str | None = None) -> list[Tensor] | str:
    """Run the parts as one operation, or say why not; nothing is drawn then."""
    if len(parts) < 2:
        return "a group has at least 2 layers"
    group = prepared(x, parts, backend)
    if isinstance(group, str):
        return group
    if group.name is None:
        return "none of its layers has an adapter"
    dtype, group = x.dtype, with_masks(group, group.x)
    tensors, x = tensors_of(group), group.x
    needs = x.requires_grad or any(t is not None and t.requires_grad for t in tensors)
    if torch.is_grad_enabled() and needs:
        ys = _LoRALinears.apply(x, group, *tensors)
    else:
        ys = [with_shape(y, x.shape) for y in forward(group)[0]]
    # Over 4 bits y has the dtype that x came in, in autocast too: see functional.adapted.
    return [
        y.to(dtype) if call.weight.format in VALUES else y
        for y, call in zip(ys, group.calls, strict=True)
    ]


class Group(NamedTuple):
    """Calls of one x, checked: what runs them, and the weights laid out once where they are."""

    x: Tensor  # (..., K), cast as autocast would
    calls: list[Any]  # Call, with A and B None in that of a layer without an adapter
    name: str | None  # of the backend; None where no layer has an adapter
    laid_out: list[Panels | Codes | None]  # what is read in place of a weight, in each direction
    dropouts: list[tuple[float, str]]  # of each: probability, and how its mask is drawn


def prepared(x: Tensor, parts: Sequence[Part], backend: str | None = None) -> Group | str:
    """Check and cast all and choose a backend; or say why not. Nothing is drawn or computed."""
    if len(parts) > MOST_LAYERS:
        return f"a group has at most {MOST_LAYERS} layers, this one {len(parts)}"
    if type(x) is not Tensor or x.dim() == 0:
        return f"takes a plain tensor, x is a {type(x).__name__}"
    autocast = not x.is_meta and torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type)
    calls: list[Any] = []
    name = None
    for of_part, bias, A, B, scale, dropout, *_ in parts:
        codes = of_part if isinstance(of_part, Weight) else None
        weight: Any = None if codes else of_part
        if autocast:
            low: Any = (A, B)
            x, weight, bias, A, B = cast_by_autocast(x, weight, bias, *low)  # type: ignore[assignment]
        scale = float(scale) * (scale_of(dropout) if dropout else 1)
        if (why := _why_alone(x, weight, bias, A, B, scale)) is not None:
            return why
        call = Call(x, codes or Weight(weight), bias, LowRank(A, B, scale))  # type: ignore[arg-type]
        calls.append(call)
        if A is None:
            continue
        if name is None:
            name = choose(backend, call)
        elif BACKENDS[name].unsupported(call) is not None:
            return f"its layers do not all run on {name}"
    takes_panels = name == "cpp" and not autocast
    laid_out: list[Panels | Codes | None] = [
        Codes(part.weight, part.weight)
        if isinstance(part.weight, Weight)
        else part.panels.for_input(x)
        if part.panels and takes_panels
        else None
        for part in parts
    ]
    dropouts = [(0.0 if part.A is None else part.dropout, part.mask) for part in parts]
    return Group(x, calls, name, laid_out, dropouts)


def with_masks(group: Group, x: Tensor) -> Group:
    """Draw the masks in order, and give each call x as a matrix and its mask."""
    rows = rows_of(x)
    calls = []
    for (_, weight, bias, low), (p, mask) in zip(group.calls, group.dropouts, strict=True):
        if p:
            low = low._replace(keep=draw_keep(x, p, mask))
        calls.append(Call(rows, weight, bias, low))
    return group._replace(x=x, calls=calls)


def tensors_of(group: Group) -> list[Tensor | None]:
    """Return weight, bias, A and B of each call: what a Function takes; of codes no weight."""
    return [
        t
        for weight, bias, low in (call[1:] for call in group.calls)
        for t in (weight.data if weight.scale is None else None, bias, low.A, low.B)
    ]


def out_features(call: Any) -> int:
    """Return N of a call."""
    return call.weight.data.shape[0] if call.low.B is None else call.low.B.shape[1]


def _why_alone(x: Tensor, weight, bias, A, B, scale: float) -> str | None:
    """Say why a layer can't be of a group now: the single call says what is wrong, if it is."""
    if A is None:
        K = weight.shape[1]
        if x.shape[-1] != K or weight.dtype != x.dtype or weight.device != x.device:
            return "a layer without an adapter does not fit x"
        return None
    if not fit(x, weight, bias, A, B, scale):
        return "the arguments of a layer do not fit each other"
    if B.requires_grad and not A.requires_grad and torch.is_grad_enabled():
        return "A is frozen and B is not, so that a layer keeps no x"
    return None


def forward(group: Group) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
    """Return y of each call, and h of each, None for those without an adapter."""
    _, calls, name, laid_out, _ = group
    adapted = [i for i, call in enumerate(calls) if call.low.A is not None]
    given = [
        calls[i] if (of := laid_out[i]) is None else calls[i]._replace(weight=of.forward)
        for i in adapted
    ]
    ys, hs = forward_group(name, given) if name is not None else ([], [])
    if len(adapted) == len(calls):
        return ys, hs
    all_ys: list[Any] = [
        F.linear(c.x, c.weight.data, c.bias) if c.low.A is None else None for c in calls
    ]
    all_hs: list[Tensor | None] = [None] * len(calls)
    for i, y, h in zip(adapted, ys, hs, strict=True):
        all_ys[i], all_hs[i] = y, h
    return all_ys, all_hs


class _LoRALinears(torch.autograd.Function):
    """The gradient of a group: keeps x once, and h, the masks' bits and what dx reads of each."""

    @staticmethod
    def forward(ctx, x, group, *tensors):
        ys, hs = forward(group)
        need_dx, _, *needs = ctx.needs_input_grad
        saved, factors = [], []
        reads_x = False
        for i, (call, h) in enumerate(zip(group.calls, hs, strict=True)):
            A, B, scale, keep = call.low
            need_dweight, _, need_dA, need_dB = needs[4 * i : 4 * i + 4]
            reads_x = reads_x or need_dweight or need_dA
            saved += (
                call.weight.data if need_dx and call.weight.scale is None else None,
                A if need_dx else None,
                B if need_dx or need_dA else None,
                h if need_dB else None,
                keep,
            )
            # A and B again, unversioned: of one that is not read its gradient takes the layout.
            factors.append((A, B, scale))
        ctx.save_for_backward(x if reads_x else None, *saved)
        ctx.call = (x.shape, factors, group.name, group.laid_out)
        ctx.set_materialize_grads(False)
        return tuple(with_shape(y, x.shape) for y in ys)

    @staticmethod
    def backward(ctx, *dys):
        x, *saved = ctx.saved_tensors
        shape, factors, name, laid_out = ctx.call
        need_dx, _, *needs = ctx.needs_input_grad
        rows = None if x is None else rows_of(x)
        # Grad mode is on here only under create_graph=True.
        under_create_graph = torch.is_grad_enabled()
        layers = []
        for i, dy in enumerate(dys):
            if dy is None:
                continue
            weight, _, _, h, keep = saved[5 * i : 5 * i + 5]
            base, of = None if weight is None else Weight(weight), laid_out[i]
            if of is not None and (isinstance(of, Codes) or (base and not under_create_graph)):
                base = of.backward
            call = Call(rows, base, None, LowRank(*factors[i], keep))
            layers.append((i, rows_of(dy), call, h, (need_dx, *needs[4 * i : 4 * i + 4])))
        dx, of_layers = (_differentiable if under_create_graph else backward)(layers, name)
        gradients: list[Tensor | None] = [None] * len(needs)
        for (i, *_), own in zip(layers, of_layers, strict=True):
            gradients[4 * i : 4 * i + 4] = own
        dx = None if dx is None else with_shape(dx, shape)
        return dx, None, *gradients


def backward(layers, name):
    """Return dx, summed in one buffer, and the other gradients of each layer."""
    adapted = [layer for layer in layers if layer[2].low.A is not None]
    found = {}
    dx = None
    if adapted:
        where, *lists = zip(*adapted, strict=True)
        for i, (one, *others) in zip(where, backward_group(name, *lists), strict=True):
            dx = one if dx is None else dx
            found[i] = others
    for i, dy, call, _, (need_dx, need_dweight, need_dbias, *_) in layers:
        if i in found:
            continue
        if need_dx:
            weight = cast(Weight, call.weight).data
            dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
        dweight = dy.T @ call.x if need_dweight else None
        found[i] = [dweight, dy.sum(0) if need_dbias else None, None, None]
    return dx, [found[layer[0]] for layer in layers]


def _differentiable(layers, name):
    """Return the same by operations that have a gradient: under create_graph."""
    dx, of_layers = None, []
    for _, dy, call, h, (need_dx, need_dweight, need_dbias, *low_needs) in layers:
        if call.low.A is None:
            one = dy @ call.weight.data if need_dx else None
            others = [dy.T @ call.x if need_dweight else None]
            others += [dy.sum(0) if need_dbias else None, None, None]
        else:
            if h is not None:  # again, with its graph
                h = reference.masked(call.x, call.low.keep) @ call.low.A.to(call.x.dtype)
            needs = (need_dx, need_dweight, need_dbias, *low_needs)
            one, *others = reference.backward(dy, call, h, needs)
        if one is not None:
            dx = one if dx is None else dx + one
        of_layers.append(others)
    return dx, of_layers
