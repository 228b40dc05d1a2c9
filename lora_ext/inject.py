"""Put adapters into a model, freeze the rest, merge them into the weights and take them out."""

import re
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import Parameter

from .checks import Touched, check_dropout, check_hyperparameters
from .conv1d import is_conv1d, is_linear
from .layers import LinearWithLoRA, why_composed


def replace_linear_with_lora(
    model: nn.Module,
    rank: int,
    alpha: float,
    *,
    target_modules: str | Iterable[str] | None = None,
    exclude_modules: str | Iterable[str] | None = None,
    dtype: torch.dtype | None = None,
    scaling: str = "alpha",
    dropout: float = 0.0,
    dropout_mask: str = "hash",
) -> Touched:
    """Replace every `nn.Linear` in a model by a `LinearWithLoRA` around it, in place.

    Weights are shared, not copied, so ties hold. What is already a LinearWithLoRA is left alone,
    and so is a subclass of nn.Linear, and transformers' Conv1D, unless `target_modules` names it.
    Nothing is frozen: see `mark_only_lora_as_trainable`. What reads a linear's weight and does not
    call it (torchvision's Swin) loses the update: exclude it.

    Args:
        model: the model to change.
        rank: rank of the updates, at least 1.
        alpha: scale of the updates, or its numerator, see `scaling`.
        target_modules: which linears: a regular expression for the whole dotted name, or a list of
            names, each a dotted name or the end of one; None takes all.
        exclude_modules: which of these not to, in the same form.
        dtype: of A and B, see `LinearWithLoRA`.
        scaling: "alpha" (default), "alpha/rank", or "alpha/sqrt(rank)".
        dropout: on the low-rank part's input, in training only, see `lora_linear`.
        dropout_mask: "hash" or "torch", see `lora_linear`.

    Returns:
        The names of the layers replaced; `print` it.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: the model is itself a linear, nothing matches, a rank, scaling, dropout or
            pattern out of range, or a linear whose owner would not call it. The model is then
            unchanged.

    """
    require_module(model)
    check_hyperparameters(rank, alpha, scaling)
    check_dropout(dropout, dropout_mask)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point torch.dtype, got {dtype!r}")
    if isinstance(model, nn.Linear):
        raise ValueError(
            "model is itself an nn.Linear, which can't be replaced in place: "
            "use LinearWithLoRA(model, rank, alpha)"
        )
    targets = _matcher("target_modules", target_modules)
    excluded = _matcher("exclude_modules", exclude_modules)

    def wanted(name: str, module: nn.Module) -> bool:
        by_default = targets is None and type(module) is nn.Linear
        named = targets is not None and is_linear(module) and targets(name)
        return (by_default or named) and not (excluded is not None and excluded(name))

    places = [place for place in linears(model) if wanted(place[2], place[3])]
    already = any((targets is None or targets(name)) for name, _ in lora_layers(model))
    if not places and not already:
        raise ValueError(_nothing_to_replace(model, target_modules, exclude_modules))
    for parent, _, name, _ in places:
        if isinstance(parent, nn.MultiheadAttention):
            raise ValueError(
                f"target_modules names {name}, but nn.MultiheadAttention reads its weight and "
                "never calls it, so the low-rank part would be lost: exclude it"
            )
    wrapped: dict[nn.Module, LinearWithLoRA] = {}  # a linear with two owners keeps one adapter
    for _, _, _, linear in places:
        if linear not in wrapped:
            wrapped[linear] = LinearWithLoRA(
                linear,
                rank,
                alpha,
                scaling=scaling,
                dtype=dtype,
                dropout=dropout,
                dropout_mask=dropout_mask,
            )
    for parent, attribute, _, linear in places:
        setattr(parent, attribute, wrapped[linear])
    return Touched(f"rank {rank} adapters in", [name for _, _, name, _ in places])


def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none") -> None:
    """Freeze all of a model but its adapters: `requires_grad` stays on A and B alone.

    Args:
        model: a model with LinearWithLoRA layers.
        bias: which biases train too: "none", "lora_only" (those of adapted linears), or "all".

    Raises:
        TypeError: `model` is no nn.Module.
        ValueError: no LinearWithLoRA in the model, or an unknown `bias`. Nothing is then changed.

    """
    layers = require_lora_layers(model)
    if bias not in ("none", "lora_only", "all"):
        raise ValueError(f"bias must be 'none', 'lora_only' or 'all', got {bias!r}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(bias == "all" and name.rpartition(".")[2] == "bias")
    for layer in layers.values():
        layer.lora.A.requires_grad_(True)
        layer.lora.B.requires_grad_(True)
        if bias == "lora_only" and layer.bias is not None:
            layer.bias.requires_grad_(True)


@torch.no_grad()
def merge_(model: nn.Module, *, unload: bool = False) -> Touched:
    """Fold every adapter into its linear's weight: `weight + scale * (A @ B).T`, in place.

    The sum is taken in float32 (float64 for float64) and rounded once. The new weight is a
    Parameter of its own: the old one is kept for `unmerge_`, and a layer tied to it is not touched.
    `state_dict()` goes on giving the unmerged weight, so that a checkpoint never counts A and B
    twice. Merged layers run `linear(x)`; their A and B get no gradient. No other thread may run the
    model during `merge_` or `unmerge_`: it could add A and B to a weight that has them.

    Args:
        model: a model with LinearWithLoRA layers; those already merged are left as they are.
        unload: put the bare linears, merged, back in the model, as for shipping it.

    Returns:
        The names of the layers that were merged now; `print` it.

    Raises:
        TypeError: `model` is no nn.Module.
        ValueError: no LinearWithLoRA in the model, one over a base that can't be summed (quantised,
            hooked, a subclass), or with `unload` a model that is itself one. Nothing is changed.

    """
    layers = require_lora_layers(model)
    if unload and isinstance(model, LinearWithLoRA):
        raise ValueError("model is itself a LinearWithLoRA: merge_(model), then use model.linear")
    for name, layer in layers.items():
        if (why := why_composed(layer.linear, layer.lora)) is not None:
            raise ValueError(f"{name or 'model'} can't be merged: {why}")
    merged_now = {name: m for name, m in layers.items() if not m._unmerged_weight}
    for layer in merged_now.values():
        original, lora = layer.weight, layer.lora
        wide = torch.promote_types(original.dtype, torch.float32)
        delta = lora.scale * (lora.A.to(wide) @ lora.B.to(wide))
        delta = delta if is_conv1d(layer.linear) else delta.T
        merged = (original.to(wide) + delta).to(original.dtype)
        layer.linear.weight = Parameter(merged, requires_grad=original.requires_grad)
        layer._unmerged_weight.append(original)
    if unload:
        for parent in list(model.modules()):
            for attribute, child in parent._modules.items():
                if isinstance(child, LinearWithLoRA):
                    setattr(parent, attribute, child.linear)
    return Touched("merged and unloaded" if unload else "merged", merged_now)


def unmerge_(model: nn.Module) -> None:
    """Undo `merge_`: put back the very Parameters that were there before, bit for bit.

    Raises:
        TypeError: `model` is no nn.Module.
        ValueError: no LinearWithLoRA in the model.

    """
    for layer in require_lora_layers(model).values():
        if layer._unmerged_weight:
            original = layer._unmerged_weight.pop()
            # The model may have moved in the meantime, and an untied weight with it.
            original.data = original.data.to(layer.weight.device, layer.weight.dtype)
            layer.linear.weight = original


def lora_layers(model: nn.Module) -> Iterable[tuple[str, LinearWithLoRA]]:
    """Yield (name, layer) for each LinearWithLoRA in the model, once each."""
    return ((n, m) for n, m in model.named_modules() if isinstance(m, LinearWithLoRA))


def require_lora_layers(model: nn.Module) -> dict[str, LinearWithLoRA]:
    """Return the model's LinearWithLoRA layers by dotted name; ValueError if there are none."""
    require_module(model)
    layers = dict(lora_layers(model))
    if not layers:
        raise ValueError("model must have LinearWithLoRA layers: call replace_linear_with_lora")
    return layers


def require_module(model: object) -> None:
    """Raise TypeError unless `model` is an nn.Module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")


def linears(module: nn.Module, prefix: str = "") -> Iterable[tuple[nn.Module, str, str, nn.Module]]:
    """Yield (parent, attribute, dotted name, linear) in the reference's order, shared ones too."""
    for attribute, child in module._modules.items():
        name = f"{prefix}{attribute}"
        if child is not None and is_linear(child):
            yield module, attribute, name, child
        elif child is not None and not isinstance(child, LinearWithLoRA):
            yield from linears(child, f"{name}.")


def _matcher(argument: str, pattern: str | Iterable[str] | None):
    if pattern is None:
        return None
    if isinstance(pattern, str):
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{argument} must be a regular expression: {error}") from None
        return lambda name: compiled.fullmatch(name) is not None
    names = list(pattern) if isinstance(pattern, Iterable) else [pattern]
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"{argument} must hold strings, got {type(name).__name__}")
    return lambda name: any(name == end or name.endswith(f".{end}") for end in names)


def _nothing_to_replace(model: nn.Module, targets: object, excluded: object) -> str:
    found = [name for name, m in model.named_modules() if is_linear(m)]
    if not found:
        return f"model must have an nn.Linear in it, {type(model).__name__} has none"
    shown = ", ".join(found[:8]) + (", ..." if len(found) > 8 else "")
    return (
        f"nothing to replace: target_modules={targets!r} and exclude_modules={excluded!r} leave "
        f"none of the {len(found)} linear layers: {shown}"
    )
