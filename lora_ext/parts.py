"""The layers of a group as data: what one operation over several linears is made of."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .bases import base_of, hooks_of, why_not_now
from .call import Weight
from .layers import LinearWithLoRA
from .panels import Panels
from .quantised_linear import QuantisedLinear

LEAST = 1 << 14  # elements of x, without a gradient: three layers of 1 x 64 took 1.3 times as long


class Part(NamedTuple):
    """One layer of a group as data; A and B are None for a linear without an adapter."""

    weight: Tensor | Weight  # (N, K), or of codes
    bias: Tensor | None  # (N,)
    A: Tensor | None = None  # (K, R)
    B: Tensor | None = None  # (R, N)
    scale: float = 1.0
    dropout: float = 0.0  # 0 in eval
    mask: str = "hash"
    panels: Panels | None = None


def parts_of(layers: Sequence[nn.Module], x: Tensor) -> list[Part] | str:
    """Return the layers as data, or why one of them must be called by itself now."""
    if (why := why_not_now(x)) is not None:
        return why
    if torch.jit.is_tracing():
        return "torch.jit.trace takes no lists of tensors that may be None"
    if torch.compiler.is_compiling():
        return "a compiler traces it, which joins what it can by itself"
    if x.numel() < LEAST and not torch.is_grad_enabled():
        return "so small a call gains less than lists of operands cost"
    parts = []
    for layer in layers:
        part = part_of(layer, x)
        if type(part) is str:
            return part
        parts.append(part)
    return cast(list[Part], parts)


def part_of(layer: nn.Module, x: Tensor) -> Part | str:
    """Return a LinearWithLoRA or an nn.Linear as data, or why it must be called on this x."""
    own = layer.__dict__
    modules = own["_modules"]
    if not isinstance(layer, LinearWithLoRA):
        if hasattr(type(layer), "lora_part"):  # PEFT's, integrations/peft.py
            return hooks_of(own, 0) or layer.lora_part(x)  # type: ignore[operator]
        return _without_adapter(layer, x)
    if layer._unmerged_weight or layer._parallel is not None or own["backend"] is not None:
        return "a layer is merged, split over ranks, or has a backend of its own"
    if (why := hooks_of(own, 0)) is not None:
        return f"a layer {why}"
    weight = layer._weight_for(x)
    if isinstance(weight, str):
        return weight
    linear, lora = modules["linear"], modules["lora"]
    base, low = linear._parameters, lora._parameters
    dropout = lora.dropout if lora.training else 0.0
    panels = None if layer._panels is None else layer._fresh_panels()
    drawn = (dropout, lora.dropout_mask, panels)
    return Part(weight, base["bias"], low["A"], low["B"], lora.scale, *drawn)


def _without_adapter(layer: nn.Module, x: Tensor) -> Part | str:
    base = base_of(layer, x=x if type(layer) is QuantisedLinear else None)
    if isinstance(base, str):
        return f"a layer {base}"
    bias: Any = layer._parameters["bias"]
    if base.scale is None:
        return Part(base.data, bias)
    # As QuantisedLinear runs alone: a low-rank part of zeros.
    A, B = x.new_zeros(layer.in_features, 1), x.new_zeros(1, layer.out_features)  # type: ignore[call-overload]
    return Part(base, bias, A, B, 0.0)


def is_adapted(module: nn.Module) -> bool:
    """Whether a module is an adapted linear that can be of a group: ours, or PEFT's accelerated."""
    return isinstance(module, LinearWithLoRA) or hasattr(type(module), "lora_part")
