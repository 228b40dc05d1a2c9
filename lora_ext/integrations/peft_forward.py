"""One forward of a PEFT LoRA layer: who is active, whether ours computes the same, and the call.

    y = base(x) + sum over the active adapters of  lora_B(lora_A(dropout(x))) * scaling
    x (..., in), lora_A.weight (rank, in), lora_B.weight (out, rank), y (..., out)

Judged again at each call, because adapters, hooks and weights may change between two.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.nn import Parameter

from ..bases import base_of, hooks_of, parameter_of
from ..call import Weight
from ..called import add_low_rank, call_base
from ..checks import HALF
from ..dora import rescaled, row_scale
from ..dora_dropped import both_products, is_few
from ..dropout import draw_keep
from ..functional import adapted, rows_of
from ..parts import Part


class Adapter(NamedTuple):
    """What one adapter adds.

    Attributes:
        A: (in, rank), PEFT's lora_A transposed.
        B: (rank, out), likewise.
        scale: PEFT's scaling: a number, or a tensor once a model is prepared for hot-swapping.
        dropout: probability of a zero, 0 outside training.
        bias: (out,) of lora_bias, which is scaled too; or None.
        magnitude: (out,) of DoRA, or None.
        drops: whether PEFT takes DoRA's way for an x that is dropped.

    """

    A: Tensor
    B: Tensor
    scale: Any
    dropout: float
    bias: Tensor | None
    magnitude: Tensor | None
    drops: bool


def adapter_of(layer: Any, name: str) -> Adapter | str:
    """Return an adapter of a LoRA layer, or why the layer must run PEFT's own forward for it."""
    modules = layer._modules  # by attribute each would cost 1 us
    low_A, low_B = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
    A, B = parameter_of(low_A), parameter_of(low_B)
    if type(A) is str:
        return f"its lora_A {A}"
    if type(B) is str:
        return f"its lora_B {B}"
    dropout = modules["lora_dropout"]._modules[name]
    kind = type(dropout)
    if kind is not nn.Identity and kind is not nn.Dropout:
        return f"its dropout is a {kind.__name__}"
    own = dropout.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"]:
        return "its dropout has hooks"
    p = dropout.p if kind is nn.Dropout and dropout.training else 0.0
    bias = low_B._parameters["bias"]
    magnitude: Any = None
    if layer.lora_variant and name in layer.lora_variant:
        magnitude = _magnitude_of(layer, name)
        if isinstance(magnitude, str):
            return magnitude
        if bias is not None:
            return f"adapter {name!r} has DoRA and a bias (lora_bias)"
    drops = magnitude is not None and kind is nn.Dropout and layer.training
    # By t(): a step is 3 us shorter than by T, whose gradient is a permutation's.
    return Adapter(A.t(), B.t(), layer.scaling[name], p, bias, magnitude, drops)  # type: ignore[union-attr]


def _magnitude_of(layer: Any, name: str) -> Tensor | str:
    variant = type(layer.lora_variant[name])
    if variant is not DoraLinearVariant:
        return f"adapter {name!r} is a {variant.__name__}"
    module = layer.lora_magnitude_vector._modules[name]
    magnitude = module._parameters["weight"]
    if type(module) is not DoraLinearLayer or hooks_of(module.__dict__, 0) is not None:
        return f"adapter {name!r} has hooks on its magnitude"
    if type(magnitude) is not Parameter:
        return f"adapter {name!r} has a magnitude that is a {type(magnitude).__name__}"
    if magnitude.device != layer.lora_A[name].weight.device:
        return f"adapter {name!r} has a magnitude on another device"
    return magnitude


def active_adapters(layer: Any) -> list[Adapter] | str:
    """Return the active adapters that a layer has, or why it must run PEFT's own forward."""
    names = layer._modules["lora_A"]._modules
    found: list[Adapter] = []
    for name in layer.active_adapters:
        if name in names:
            adapter = adapter_of(layer, name)
            if isinstance(adapter, str):
                return adapter
            found.append(adapter)
    if len(found) > 1 and any(_dora_of(a) for a in found):
        if any(a.bias is not None for a in found):
            return "an adapter with DoRA and one with a bias (lora_bias) are active"
    return found


def why_called(layer: Any) -> str | None:
    """Say why a layer's base is called and not read, now, for an x of its dtype; None if read."""
    base = layer.base_layer
    like = next(
        (p for p in base.parameters() if p.is_floating_point()), torch.empty(0, device="cpu")
    )
    dtype = getattr(base, "compute_dtype", None) or like.dtype
    x = torch.empty(0, layer.in_features, dtype=dtype, device=like.device)
    judged = base_of(base, x=x)
    return judged if isinstance(judged, str) else None


def run(layer: Any, x: Tensor, adapters: list[Adapter], mask: str) -> Tensor | None:
    """Return the layer's y, (..., out); None where PEFT's own forward must run on this x.

    Args:
        layer: a LoRA linear of PEFT.
        x: (..., in).
        adapters: what `active_adapters` gave.
        mask: how dropout's mask is drawn, see `lora_linear`.

    """
    base = layer._modules["base_layer"]
    weight = base_of(base, x=x)
    if isinstance(weight, str) or (weight.scale is not None and any(map(_dora_of, adapters))):
        return _over_called(base, x, adapters, mask) if x.is_floating_point() else None
    if not _takes(x, weight, adapters):
        return None if weight.scale is None else _over_called(base, x, adapters, mask)
    if len(adapters) > 1 and _sums_up(adapters):
        adapters = [_together(adapters)]
    y, bias = None, base._parameters["bias"]
    if len(adapters) == 1 and adapters[0].magnitude is None:
        return _plain(x, weight, bias, adapters[0], mask)
    for adapter in adapters:
        if adapter.magnitude is not None:
            y = _dora(y, x, weight, bias, adapter, mask)
        elif y is None:
            y = _plain(x, weight, bias, adapter, mask)
        else:
            y = _added(y, x, adapter, mask, fresh=True)
    return y


def part_of(layer: Any, x: Tensor, adapters: list[Adapter], mask: str) -> Part | str:
    """Return a layer as one of a group (grouped.py), or why it must run by itself.

    Args:
        layer: a LoRA linear of PEFT.
        x: (..., in).
        adapters: what `active_adapters` gave.
        mask: how dropout's mask is drawn, see `lora_linear`.

    """
    weight = base_of(layer._modules["base_layer"], x=x)
    if isinstance(weight, str):
        return f"its base_layer {weight}"
    if weight.scale is not None and not _takes(x, weight, adapters):
        return "its adapter's dtype is not what the kernels take over codes"
    if len(adapters) > 1 and _sums_up(adapters):
        adapters = [_together(adapters)]
    if len(adapters) != 1:
        return f"{len(adapters)} adapters are active that are not one operation"
    A, B, scale, dropout, bias, magnitude, _ = adapters[0]
    if bias is not None or magnitude is not None or isinstance(scale, Tensor):
        return "its adapter has DoRA, a bias (lora_bias) or a scale that is a tensor"
    bias = layer._modules["base_layer"]._parameters["bias"]
    data = weight.data if weight.scale is None else weight
    return Part(data, bias, A, B, scale, dropout, mask)


def _plain(x: Tensor, weight: Weight, bias: Tensor | None, adapter: Adapter, mask: str) -> Tensor:
    A, B, scale, dropout, low_bias, _, _ = adapter
    data: Any = weight.data if weight.format == "plain" else weight
    if type(scale) is not float:
        scale, B = _numbers(adapter)
    if low_bias is not None:
        low_bias = low_bias * adapter.scale
        bias = low_bias if bias is None else (bias + low_bias).to(bias.dtype)
    return adapted(x, data, bias, A, B, scale, None, dropout, mask)


def _added(y: Tensor, x: Tensor, adapter: Adapter, mask: str, *, fresh: bool) -> Tensor:
    """Return y with what a plain adapter adds."""
    scale, B = _numbers(adapter)
    y = add_low_rank(y, x, adapter.A, B, scale, fresh=fresh, dropout=adapter.dropout, mask=mask)
    return y if adapter.bias is None else y.add_(adapter.bias * adapter.scale)


def _over_called(base: Any, x: Tensor, adapters: list[Adapter], mask: str) -> Tensor:
    """Call a base whose weight can't be read, and add to what it gives."""
    y, fresh = call_base(base, x)
    if len(adapters) > 1 and _sums_up(adapters):
        adapters = [_together(adapters)]
    for adapter in adapters:
        if adapter.magnitude is None:
            y = _added(y, x, adapter, mask, fresh=fresh)
        else:
            weight = Weight(dequantize_module_weight(base).detach())
            y = _dora(y, x, weight, base.bias, adapter, mask)
        fresh = True
    return y


def _dora(
    y: Tensor | None,
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    adapter: Adapter,
    mask: str,
) -> Tensor:
    """Return y with what an adapter with DoRA adds; y None is that of the base, not computed yet.

    g * (result - bias) + g * low + bias; and over a dropped x, result + (g - 1) * base + g * low.
    """
    scale, B = _numbers(adapter)
    assert adapter.magnitude is not None
    g = row_scale(adapter.magnitude, weight.data, adapter.A, B, scale)
    if not adapter.drops:
        if y is None:
            z = adapted(x, weight.data, None, adapter.A, B, scale)
            return rescaled(z, g, bias)
        z = add_low_rank(y, x, adapter.A, B, scale, fresh=False)
        return rescaled(z, g, None if bias is None else (1 - g) * bias)
    data, p = weight.data.to(x.dtype), adapter.dropout
    if y is None and is_few(x, data, p):
        keep = draw_keep(x, p, mask)
        plain, z = both_products(rows_of(x), data, keep, p)
        more = rescaled(z, g - 1, bias).add_(plain).view(*x.shape[:-1], len(data))
        B = B * g.to(B.dtype)
        return add_low_rank(more, x, adapter.A, B, scale, fresh=True, dropout=p, keep=keep)
    dropped = F.dropout(x, p, True)
    result = F.linear(x, data, bias) if y is None else y
    more = rescaled(F.linear(dropped, data), g - 1, None).add_(result)
    return add_low_rank(more, dropped, adapter.A, B * g.to(B.dtype), scale, fresh=True)


def _takes(x: Tensor, weight: Weight, adapters: list[Adapter]) -> bool:
    """Whether dtypes are such that lora_linear takes them; what is odd is PEFT's."""
    if torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type):
        return True
    dtype = x.dtype
    if weight.data.dtype is not dtype and weight.format == "plain":
        return False
    for adapter in adapters:
        of = adapter.A.dtype
        if of is not dtype and not (of is torch.float32 and dtype in HALF):
            return False
    return True


def _sums_up(adapters: list[Adapter]) -> bool:
    """Whether adapters may be one of the sum of their ranks: no mask of their own, no DoRA."""
    first = adapters[0].A.dtype
    return all(
        not a.dropout and a.magnitude is None and a.A.dtype is first and a.B.dtype is first
        for a in adapters
    )


def _together(adapters: list[Adapter]) -> Adapter:
    """Return adapters as one: ranks next to each other, scales in B where they differ."""
    scales = [adapter.scale for adapter in adapters]
    same = all(type(s) in (float, int) and s == scales[0] for s in scales)
    A = torch.cat([a.A.T for a in adapters]).T
    B = torch.cat([a.B.T if same else a.B.T * a.scale for a in adapters], 1).T
    biases = [a.bias if same else a.bias * a.scale for a in adapters if a.bias is not None]
    bias = sum(biases[1:], biases[0]) if biases else None
    return Adapter(A, B, scales[0] if same else 1.0, 0.0, bias, None, False)


def _dora_of(adapter: Adapter) -> bool:
    return adapter.magnitude is not None


def _numbers(adapter: Adapter) -> tuple[float, Tensor]:
    """Return scale and B. A scale that is a tensor goes into B, where it gets its gradient."""
    scale = adapter.scale
    if not isinstance(scale, Tensor):
        return scale, adapter.B
    if scale.is_cpu and not (scale.requires_grad or torch.compiler.is_compiling()):
        return float(scale), adapter.B
    return 1.0, adapter.B * scale.reshape(()).to(adapter.B.device)
