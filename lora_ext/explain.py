"""explain(): which backend a layer runs on an input, and why the others don't."""

from typing import cast

import torch
from torch import Tensor

from .backends import choose, unsupported_reasons
from .call import Call, LowRank, Weight
from .checks import check_arguments
from .functional import cast_by_autocast
from .layers import LinearWithLoRA


def explain(layer: LinearWithLoRA, x: Tensor | None = None) -> str:
    """Say which backend a layer runs on an input, and why each other one does not.

    Asks the function that each call asks, in the autocast region and training mode it is called
    in; runs nothing and draws no random number.

    Args:
        layer: a LinearWithLoRA.
        x: an input for it, (..., in_features); None takes one row of the weight's dtype.

    Returns:
        A line for what runs, or for the error that the call would raise, then one for each other
        backend.

    Raises:
        TypeError: `layer` is no LinearWithLoRA.

    """
    if not isinstance(layer, LinearWithLoRA):
        raise TypeError(f"layer must be a LinearWithLoRA, got {type(layer).__name__}")
    weight = layer.weight
    if x is None:
        plain = isinstance(weight, Tensor) and weight.is_floating_point()  # else quantised
        like = weight if plain else layer.lora.A
        x = torch.empty(1, layer.in_features, dtype=like.dtype, device=like.device)
    if layer._unmerged_weight:
        return "runs linear(x): the adapter is merged into its weight"
    if layer._parallel is not None:
        return layer._parallel.explain(layer, x)
    judged = layer._weight_for(x)
    if isinstance(judged, str):
        if layer.backend is not None:
            return f"raises: backend {layer.backend!r} can't run this layer: {judged}"
        return f"runs linear(x) + lora(x), composed: {judged}"
    try:
        call = _call_of(layer, x, judged)
        chosen = choose(layer.backend, call)
    except (TypeError, ValueError) as error:
        return f"raises: {error}"
    first = f"{chosen}: runs"
    if (
        chosen == "cpp"
        and layer._panels is not None
        and layer._panels.for_input(x) is not None
        and call.weight is not None
        and weight is call.weight.data
    ):
        first += ", its weight laid out by prepack_"
    return "\n".join([first, *other_backends(call, chosen)])


def _call_of(layer: LinearWithLoRA, x: Tensor, read: Tensor | Weight) -> Call:
    """Return the call that the layer would make, its mask not drawn; raise what that raises."""
    codes = read if isinstance(read, Weight) else None
    weight, bias, lora = None if isinstance(read, Weight) else read, layer.bias, layer.lora
    A, B = lora.A, lora.B
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        x, weight, bias, A, B = cast_by_autocast(x, weight, bias, A, B)  # type: ignore[assignment]
    check_arguments(x, weight, bias, A, B, lora.scale)
    keep = None
    if lora.dropout and lora.training:
        rows = x.numel() // max(x.shape[-1], 1)
        keep = torch.empty(rows, -(-x.shape[-1] // 8), dtype=torch.uint8, device=x.device)
    return Call(x, codes or Weight(cast(Tensor, weight)), bias, LowRank(A, B, lora.scale, keep))


def other_backends(call: Call, chosen: str) -> list[str]:
    """Return a line for each backend but the chosen one."""
    return [
        f"{name}: {reason or f'can run, comes after {chosen}'}"
        for name, reason in unsupported_reasons(call).items()
        if name != chosen
    ]
