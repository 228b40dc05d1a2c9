"""lora_gated_mlp() and lora_mlp(): MLPs with adapters, a gradient by hand and little kept for it.

    y = down(act(gate(x)) * up(x))      y = down(act(up(x)))

Composed, autograd keeps gate(x), act(gate(x)), up(x) and their product. Here gate(x) and up(x) are
kept, or x alone, and the rest is computed again.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import grouped
from .acts import ACTS, UNGATED
from .backends import gated, gated_backward, reference
from .call import Call, LowRank, Weight
from .codes import VALUES
from .functional import rows_of, with_shape
from .grouped import Group, backward, forward, lora_linears, out_features, prepared, with_masks
from .parts import Part, parts_of


def lora_gated_mlp(
    x: Tensor,
    gate: nn.Module,
    up: nn.Module | None,
    down: nn.Module,
    act: str,
    *,
    recompute: str = "act",
) -> Tensor:
    """Run a gated MLP, its linears adapted or not: `down(act(gate(x)) * up(x))`.

    Differentiable any number of times. Each layer draws its own dropout, in the order gate, up,
    down. A quantised base is read where a single layer would read it. Where a layer must be called
    (hooks, for one), or none has an adapter, all are called and PyTorch keeps what it needs.

    Args:
        x: (..., in_features).
        gate: LinearWithLoRA or nn.Linear to (..., hidden).
        up: likewise; None where `gate` is to (..., 2 * hidden), gate first, and holds both.
        down: likewise, from (..., hidden).
        act: "silu", "gelu", "gelu_tanh", or "relu2", the square of relu.
        recompute: "act" keeps gate(x) and up(x) for the backward, and computes the activation
            again; "all" keeps x alone, and computes these again too.

    Returns:
        y, (..., out_features of `down`).

    Raises:
        TypeError: a layer that is no module; and what a layer's own call raises.
        ValueError: an unknown `act` or `recompute`; and what a layer's own call raises.

    Source:
        Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202.

    """
    for name, layer in (("gate", gate), ("up", up), ("down", down)):
        if not isinstance(layer, nn.Module) and (name != "up" or layer is not None):
            raise TypeError(f"{name} must be a module, got {type(layer).__name__}")
    if act not in ACTS:
        raise ValueError(f"act must be one of {', '.join(map(repr, ACTS))}, got {act!r}")
    first = [gate] if up is None else [gate, up]
    return _run_layers(x, first, down, Formula(act), recompute)


def lora_mlp(
    x: Tensor, up: nn.Module, down: nn.Module, act: str, *, recompute: str = "act"
) -> Tensor:
    """Run an MLP, its linears adapted or not: `down(act(up(x)))`.

    As `lora_gated_mlp` does; autograd would keep act(up(x)) as well, and more where the activation
    is composed of several operations.

    Args:
        x: (..., in_features).
        up: LinearWithLoRA or nn.Linear to (..., hidden).
        down: likewise, from (..., hidden).
        act: "relu", or one that `lora_gated_mlp` takes.
        recompute: "act" keeps up(x) for the backward; "all" keeps x alone.

    Returns:
        y, (..., out_features of `down`).

    Raises:
        TypeError: a layer that is no module; and what a layer's own call raises.
        ValueError: an unknown `act` or `recompute`; and what a layer's own call raises.

    """
    for name, layer in (("up", up), ("down", down)):
        if not isinstance(layer, nn.Module):
            raise TypeError(f"{name} must be a module, got {type(layer).__name__}")
    if act not in UNGATED:
        raise ValueError(f"act must be one of {', '.join(map(repr, UNGATED))}, got {act!r}")
    return _run_layers(x, [up], down, Formula(act, gated=False), recompute)


class Formula(NamedTuple):
    """What is between the linears: act(gate) * up of two results or of one's halves; or act(up)."""

    act: str
    gated: bool = True

    def of(self, ys: Sequence[Tensor], value: Any = None) -> Tensor:
        """Return the value by differentiable operations; `value` is another activation."""
        value = value or UNGATED[self.act].value
        if not self.gated:
            return value(ys[0])
        gate, up = ys if len(ys) == 2 else ys[0].chunk(2, -1)
        return value(gate) * up


def _run_layers(x: Tensor, first: list[nn.Module], down: nn.Module, act: Formula, recompute: str):
    if recompute not in ("act", "all"):
        raise ValueError(f"recompute must be 'act' or 'all', got {recompute!r}")
    parts = parts_of([*first, down], x)
    y = parts if isinstance(parts, str) else run(x, parts[:-1], parts[-1], act, recompute)
    return composed(x, first, down, act) if isinstance(y, str) else y


def composed(x: Tensor, first: Sequence[nn.Module], down: nn.Module, act: Formula) -> Tensor:
    """Call the layers; of gate and up, or of one that holds both, or of up alone."""
    ys: Any = lora_linears(x, first)
    return down(act.of(ys))


def run(
    x: Tensor,
    first: Sequence[Part],
    down: Part,
    act: Formula,
    recompute: str = "act",
    backend: str | None = None,
) -> Tensor | str:
    """Run the parts, `first` as in `composed`; or say why not, before any draw."""
    one = prepared(x, first, backend)
    if isinstance(one, str):
        return one
    N = [out_features(call) for call in one.calls]
    hidden = N[0] // 2 if act.gated and len(N) == 1 else N[0]
    if N not in ([[hidden, hidden], [2 * hidden]] if act.gated else [[hidden]]):
        return f"what comes before down has {N} features"
    # Of no rows: the product that it will get is not made yet.
    two = prepared(one.x.new_empty(0, hidden), [down], backend)
    if isinstance(two, str):
        return f"down: {two}"
    if one.name is None and two.name is None:
        return "none of its layers has an adapter"
    of_4_bits = any(call.weight.format in VALUES for call in (*one.calls, *two.calls))
    if of_4_bits and one.x.dtype is not x.dtype:
        return "over 4 bits a layer's result has x's dtype, which autocast changes"
    tensors = grouped.tensors_of(one) + grouped.tensors_of(two)
    x = one.x
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors)):
        return _GatedMLP.apply(x, one, two, act, recompute == "all", *tensors)
    y, *_ = _values(x, one, two, act)
    return with_shape(y, x.shape)


def _values(x: Tensor, one: Group, two: Group, act: Formula):
    """Return y as a matrix, the results before `down`, all h, and the groups with their masks."""
    one = with_masks(one, x)
    ys, hs = forward(one)
    hidden = _product(ys, act, one.name or two.name)
    two = with_masks(two, with_shape(hidden, x.shape))
    (y,), last_h = forward(two)
    return y, ys, [*hs, *last_h], [*one.calls, *two.calls]


def _product(ys: Sequence[Tensor], how: Formula, name: str | None) -> Tensor:
    """Return what `down` gets, in new memory."""
    act = how.act
    if not how.gated:
        return UNGATED[act].value(ys[0])
    gate, up = ys if len(ys) == 2 else ys[0].chunk(2, 1)
    return gated(name, gate, up, act)


def _gradients(
    d_hidden: Tensor, ys: Sequence[Tensor], how: Formula, name: str | None
) -> list[Tensor]:
    """Return the gradients of the results before `down`; `d_hidden` may be written over."""
    act = how.act
    if not how.gated:
        UNGATED[act].derivative(d_hidden, ys[0], d_hidden)
        return [d_hidden]
    if len(ys) == 2:
        (gate, up), (d_gate, d_up) = ys, (d_hidden, torch.empty_like(d_hidden))
        results = [d_gate, d_up]
    else:
        results = [torch.empty_like(ys[0])]
        (gate, up), (d_gate, d_up) = ys[0].chunk(2, 1), results[0].chunk(2, 1)
    gated_backward(name, d_hidden, gate, up, act, d_gate, d_up)
    return results


class _GatedMLP(torch.autograd.Function):
    """Keeps x, gate(x) and up(x), or of these x alone, and each layer's h and mask bits."""

    @staticmethod
    def forward(ctx, x, one, two, act, keeps_x_alone, *tensors):
        y, ys, hs, calls = _values(x, one, two, act)
        kept = [] if keeps_x_alone else ys
        keeps = [call.low.keep for call in calls]
        scales = [call.low.scale for call in calls]
        ctx.save_for_backward(x, *tensors, *hs, *keeps, *kept)
        ctx.call = (scales, one.name, two.name, act)
        ctx.laid_out = [*one.laid_out, *two.laid_out]
        return with_shape(y, x.shape)

    @staticmethod
    def backward(ctx, dy):
        scales, name, last_name, act = ctx.call
        count = len(scales)
        x, *saved = ctx.saved_tensors
        tensors, saved = saved[: 4 * count], saved[4 * count :]
        hs, keeps, ys = saved[:count], saved[count : 2 * count], saved[2 * count :]
        lows = [LowRank(*tensors[4 * i + 2 : 4 * i + 4], scales[i], keeps[i]) for i in range(count)]
        need_dx, *_ = ctx.needs_input_grad
        needs = ctx.needs_input_grad[5:]
        if torch.is_grad_enabled():  # under create_graph alone
            return _differentiable(ctx, dy, x, tensors, lows, act)
        rows = rows_of(x)
        calls = [
            Call(rows, _weight_of(tensors[4 * i], ctx.laid_out[i]), tensors[4 * i + 1], low)
            for i, low in enumerate(lows)
        ]
        if not ys:
            first = Group(x, calls[:-1], name, ctx.laid_out[:-1], [])
            ys, _ = forward(first)
        *first_calls, last = (
            call if of is None else call._replace(weight=of.backward)
            for call, of in zip(calls, ctx.laid_out, strict=True)
        )
        needs_of = [(need_dx, *needs[4 * i : 4 * i + 4]) for i in range(count)]
        reaches = any(map(any, needs_of[:-1]))  # what comes before `down`
        hidden = None
        if needs_of[-1][1] or needs_of[-1][3]:
            hidden = _product(ys, act, name or last_name)
        layer = (0, rows_of(dy), last._replace(x=hidden), hs[-1], (reaches, *needs_of[-1][1:]))
        d_hidden, (of_down,) = backward([layer], last_name)
        del hidden, layer
        if not reaches:
            return None, None, None, None, None, *[None] * (4 * (count - 1)), *of_down
        dys = _gradients(d_hidden, ys, act, name or last_name)
        layers = list(zip(range(len(dys)), dys, first_calls, hs, needs_of, strict=False))
        dx, of_layers = backward(layers, name)
        dx = None if dx is None else with_shape(dx, x.shape)
        return dx, None, None, None, None, *(g for own in (*of_layers, of_down) for g in own)


def _weight_of(tensor: Tensor | None, laid_out: Any) -> Weight:
    return laid_out.forward if tensor is None else Weight(tensor)


def _differentiable(ctx, dy, x, tensors, lows, act):
    """Return the gradients with a graph of their own: those of the same, composed."""

    def one(rows, i):
        weight, bias = tensors[4 * i : 4 * i + 2]
        if lows[i].A is None:
            return F.linear(rows, weight, bias)
        call = Call(rows, _weight_of(weight, ctx.laid_out[i]), bias, lows[i])
        return reference.forward(call)[0]

    with torch.enable_grad():
        ys = [one(rows_of(x), i) for i in range(len(lows) - 1)]
        y = with_shape(one(act.of(ys), len(lows) - 1), x.shape)
        given = [x, *tensors]
        wanted = [
            i for i, need in enumerate([ctx.needs_input_grad[0], *ctx.needs_input_grad[5:]]) if need
        ]
        found = torch.autograd.grad(
            y, [given[i] for i in wanted], dy, create_graph=True, allow_unused=True
        )
    gradients: list[Tensor | None] = [None] * len(given)
    for i, gradient in zip(wanted, found, strict=True):
        gradients[i] = gradient
    return gradients[0], None, None, None, None, *gradients[1:]
