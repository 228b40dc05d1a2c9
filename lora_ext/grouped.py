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
from .bases import base_of, hooks_of, why_not_now
from .call import Call, LowRank, Weight
from .checks import fit
from .dropout import draw_keep, scale_of
from .functional import cast_by_autocast, rows_of, with_shape
from .layers import LinearWithLoRA, why_composed
from .panels import Panels

MOST_LAYERS = 8  # csrc/cpu/product.h, kMostLegs: two legs each

LEAST = 1 << 14  # elements of x, without a gradient: three layers of 1 x 64 took 1.3 times as long


class Part(NamedTuple):
    """One layer of a group as data; A and B are None for a linear without an adapter."""

    weight: Tensor  # (N, K)
    bias: Tensor | None  # (N,)
    A: Tensor | None = None  # (K, R)
    B: Tensor | None = None  # (R, N)
    scale: float = 1.0
    dropout: float = 0.0  # 0 in eval
    mask: str = "hash"
    panels: Panels | None = None


def lora_linears(x: Tensor, layers: Sequence[nn.Module | None]) -> list[Tensor | None]:
    """Run several linears, adapted or not, on one x: `[layer(x) for layer in layers]`.

    The results, gradients and random numbers are those of the single layers up to rounding; less is
    computed and kept. Where a layer has hooks, a quantised base or anything else that must be
    called, each layer is called by itself.

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


def parts_of(layers: Sequence[nn.Module], x: Tensor) -> list[Part] | str:
    """Return the layers as data, or why one of them must be called by itself now."""
    if (why := why_not_now(x)) is not None:
        return why
    if x.numel() < LEAST and not torch.is_grad_enabled():
        return "so small a call gains less than lists of operands cost"
    if torch.compiler.is_compiling():
        return "a compiler traces it, which joins what it can by itself"
    parts = []
    for layer in layers:
        part = part_of(layer)
        if type(part) is str:
            return part
        parts.append(part)
    return cast(list[Part], parts)


def part_of(layer: nn.Module) -> Part | str:
    """Return a LinearWithLoRA or an nn.Linear as data, or why it must be called."""
    own = layer.__dict__
    modules = own["_modules"]
    if not isinstance(layer, LinearWithLoRA):
        if hasattr(type(layer), "lora_part"):  # PEFT's, integrations/peft.py
            return hooks_of(own, 0) or layer.lora_part()  # type: ignore[operator]
        base = base_of(layer)
        if isinstance(base, str):
            return f"a layer {base}"
        return Part(base.data, own["_parameters"]["bias"])
    if (why := hooks_of(own, 0)) is not None:
        return f"a layer {why}"
    linear, lora = modules["linear"], modules["lora"]
    if layer._unmerged_weight or layer._parallel is not None or own["backend"] is not None:
        return "a layer is merged, split over ranks, or has a backend of its own"
    if (why := why_composed(linear, lora)) is not None:
        return why
    base, low = linear._parameters, lora._parameters
    dropout = lora.dropout if lora.training else 0.0
    panels = None if layer._panels is None else layer._fresh_panels()
    drawn = (dropout, lora.dropout_mask, panels)
    return Part(base["weight"], base["bias"], low["A"], low["B"], lora.scale, *drawn)


def is_adapted(module: nn.Module) -> bool:
    """Whether a module is an adapted linear that can be of a group: ours, or PEFT's accelerated."""
    return isinstance(module, LinearWithLoRA) or hasattr(type(module), "lora_part")


def run(x: Tensor, parts: Sequence[Part], backend: str | None = None) -> list[Tensor] | str:
    """Run the parts as one operation, or say why not; nothing is drawn then."""
    if len(parts) < 2:
        return "a group has at least 2 layers"
    group = prepared(x, parts, backend)
    if isinstance(group, str):
        return group
    if group.name is None:
        return "none of its layers has an adapter"
    group = with_masks(group, group.x)
    if torch.is_grad_enabled():
        tensors, x = tensors_of(group), group.x
        if x.requires_grad or any(t is not None and t.requires_grad for t in tensors):
            return list(_LoRALinears.apply(x, group, *tensors))
    ys, _ = forward(group)
    return [with_shape(y, x.shape) for y in ys]


class Group(NamedTuple):
    """Calls of one x, checked: what runs them, and the weights laid out once where they are."""

    x: Tensor  # (..., K), cast as autocast would
    calls: list[Any]  # Call, with A and B None in that of a layer without an adapter
    name: str | None  # of the backend; None where no layer has an adapter
    panels: list[Panels | None]
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
    for weight, bias, A, B, scale, dropout, *_ in parts:
        if autocast:
            low: Any = (A, B)
            x, weight, bias, A, B = cast_by_autocast(x, weight, bias, *low)  # type: ignore[assignment]
        scale = float(scale) * (scale_of(dropout) if dropout else 1)
        if (why := _why_alone(x, weight, bias, A, B, scale)) is not None:
            return why
        call = Call(x, Weight(weight), bias, LowRank(A, B, scale))  # type: ignore[arg-type]
        calls.append(call)
        if A is None:
            continue
        if name is None:
            name = choose(backend, call)
        elif BACKENDS[name].unsupported(call) is not None:
            return f"its layers do not all run on {name}"
    takes_panels = name == "cpp" and not autocast
    panels = [part.panels and part.panels.for_input(x) if takes_panels else None for part in parts]
    dropouts = [(0.0 if part.A is None else part.dropout, part.mask) for part in parts]
    return Group(x, calls, name, panels, dropouts)


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
    """Return weight, bias, A and B of each call: what a Function takes."""
    return [t for c in group.calls for t in (c.weight.data, c.bias, c.low.A, c.low.B)]


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
    _, calls, name, panels, _ = group
    adapted = [i for i, call in enumerate(calls) if call.low.A is not None]
    given = [
        calls[i] if (laid_out := panels[i]) is None else calls[i]._replace(weight=laid_out.forward)
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
                call.weight.data if need_dx else None,
                A if need_dx else None,
                B if need_dx or need_dA else None,
                h if need_dB else None,
                keep,
            )
            # A and B again, unversioned: of one that is not read its gradient takes the layout.
            factors.append((A, B, scale))
        ctx.save_for_backward(x if reads_x else None, *saved)
        ctx.call = (x.shape, factors, group.name, group.panels)
        ctx.set_materialize_grads(False)
        return tuple(with_shape(y, x.shape) for y in ys)

    @staticmethod
    def backward(ctx, *dys):
        x, *saved = ctx.saved_tensors
        shape, factors, name, panels = ctx.call
        need_dx, _, *needs = ctx.needs_input_grad
        rows = None if x is None else rows_of(x)
        # Grad mode is on here only under create_graph=True.
        under_create_graph = torch.is_grad_enabled()
        layers = []
        for i, dy in enumerate(dys):
            if dy is None:
                continue
            weight, _, _, h, keep = saved[5 * i : 5 * i + 5]
            base = None if weight is None else Weight(weight)
            if panels[i] is not None and weight is not None and not under_create_graph:
                base = panels[i].backward
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
