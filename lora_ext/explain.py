"""explain(): which backend a layer runs on an input, and why the others don't."""

import torch
from torch import Tensor

from .backends import unsupported_reasons
from .layers import LinearWithLoRA, why_composed


def explain(layer: LinearWithLoRA, x: Tensor | None = None) -> str:
    """Say which backend a layer runs on an input, and why each other one does not.

    Args:
        layer: a LinearWithLoRA.
        x: an input for it, (..., in_features); None takes one row of the weight's dtype.

    Returns:
        A line for what runs, then one for each other backend.

    Raises:
        TypeError: `layer` is no LinearWithLoRA.

    """
    if not isinstance(layer, LinearWithLoRA):
        raise TypeError(f"layer must be a LinearWithLoRA, got {type(layer).__name__}")
    weight = layer.weight
    if x is None:
        like = weight if isinstance(weight, Tensor) else layer.lora.A  # quantised: no tensor
        x = torch.empty(1, layer.in_features, dtype=like.dtype, device=like.device)
    if layer._unmerged_weight:
        return "runs linear(x): the adapter is merged into its weight"
    if (why := why_composed(layer.linear, layer.lora, x)) is not None:
        return f"runs linear(x) + lora(x), composed: {why}"
    reasons = unsupported_reasons(x, weight, layer.lora.A)
    if layer.lora.dropout and layer.lora.training:
        no_mask = "takes no dropout mask, as this layer has in training"
        reasons = {n: None if n == "reference" else r or no_mask for n, r in reasons.items()}
    chosen = layer.backend or next(name for name, reason in reasons.items() if reason is None)
    lines = [f"{chosen}: {'asked for, but ' + r if (r := reasons.pop(chosen)) else 'runs'}"]
    if chosen == "cpp" and layer._packed is not None:
        lines[0] += ", its weight laid out by prepack_"
    for name, reason in reasons.items():
        lines.append(f"{name}: {reason or f'can run, comes after {chosen}'}")
    return "\n".join(lines)
