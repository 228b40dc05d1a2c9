"""Put the contents of an adapter file into a model, once all of it is found to fit."""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .checks import HALF, Touched, check_hyperparameters
from .conv1d import is_linear, sizes_of
from .files import quoted
from .inject import linears, lora_layers
from .layers import LinearWithLoRA


def install(
    model: nn.Module, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> Touched:
    """Load tensors into a model's adapters, new ones where its linears are plain.

    Args:
        model: the model. After an error it is as it was.
        tensors: what `save_adapter` writes, by keys of the model's future state_dict.
        metadata: `rank`, `alpha`, `scaling` and `modules_to_save` as JSON, see there.

    Returns:
        The names of the layers that were loaded.

    Raises:
        ValueError: something does not fit the model.

    """
    extra = _field(metadata, "modules_to_save", [])
    if not isinstance(extra, list) or not all(isinstance(name, str) for name in extra):
        raise ValueError(f"the adapter file's modules_to_save must be names, got {quoted(extra)}")
    layers, fresh = _adapted_layers(model, tensors, metadata)
    state = state_of(model, extra, fresh).items()
    expected = {key: value for key, value in state if isinstance(value, Tensor)}
    for name, layer in layers.items():
        expected[join(name, "lora.A")] = layer.lora.A
        expected[join(name, "lora.B")] = layer.lora.B
    _check_tensors(tensors, expected)

    with torch.no_grad():
        for key, target in expected.items():
            target.copy_(tensors[key])
    for parent, attribute, _, linear in list(linears(model)):  # a shared one in all its places
        if linear in fresh:
            setattr(parent, attribute, fresh[linear])
    return Touched("loaded adapters into", layers)


def _adapted_layers(
    model: nn.Module, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[dict[str, LinearWithLoRA], dict[nn.Module, LinearWithLoRA]]:
    """Return the layer for each adapter in the file, and by their linears those that are new."""
    fields = [_field(metadata, key) for key in ("rank", "alpha", "scaling")]
    keys = [key for key in tensors if f".{key}".endswith(".lora.A")]
    names = [key.removesuffix("lora.A").removesuffix(".") for key in keys]
    if not names:
        raise ValueError("path must hold at least one adapter, no key ends in 'lora.A'")
    missing = set(dict(lora_layers(model))) - set(names)
    if missing:
        raise ValueError(f"the adapter file lacks layers that the model has: {_shown(missing)}")
    layers: dict[str, LinearWithLoRA] = {}
    fresh: dict[nn.Module, LinearWithLoRA] = {}
    for key, name in zip(keys, names, strict=True):
        module: Any = module_named(model, name)
        # A model that is itself an nn.Linear can't be replaced in place.
        replaceable = module is not None and module is not model and is_linear(module)
        if not (replaceable or isinstance(module, LinearWithLoRA)):
            got = "no such module" if module is None else f"a {type(module).__name__}"
            shown = quoted(name) or "model"
            raise ValueError(f"{shown} must be a linear layer, the model has {got}")
        want: tuple[Any, ...] = tuple(v.get(name) if isinstance(v, dict) else v for v in fields)
        try:
            check_hyperparameters(*want)
        except (TypeError, ValueError, OverflowError) as error:
            why = f"{quoted(repr(name), 70)} is damaged: {quoted(str(error), 130)}"
            raise ValueError(f"the adapter file's entry for {why}") from None
        if not isinstance(module, LinearWithLoRA):
            if module not in fresh:
                _check_factor(key, tensors[key], module, want[0])
                fresh[module] = _new_layer(module, want, tensors[key].dtype)
            module = fresh[module]
        _check_layer(quoted(name) or "model", module, want)
        layers[name] = module
    return layers, fresh


def _check_layer(name: str, layer: LinearWithLoRA, want: tuple[Any, ...]) -> None:
    lora = layer.lora
    if (have := (lora.rank, lora.alpha, lora.scaling)) != want:
        raise ValueError(
            f"{name} must have rank, alpha, scaling {quoted(want)} as in the adapter file, "
            f"the model has {have}"
        )
    if layer._unmerged_weight:
        raise ValueError(f"{name} is merged: call unmerge_(model) before loading")


def _check_factor(key: str, A: Tensor, linear: Any, rank: int) -> None:
    """Check A before a layer is made to hold it: its rank and dtype come from a file."""
    if (want := (sizes_of(linear)[0], rank)) != A.shape:
        raise ValueError(_differs(key, "shape", want, tuple(A.shape)))
    base = linear.weight.dtype
    if not base.is_floating_point and A.dtype in (torch.float32, torch.float64, *HALF):
        base = A.dtype  # quantised: x decides, and A and B are cast to it
    if A.dtype != base and not (base in HALF and A.dtype == torch.float32):
        raise ValueError(_differs(key, "the model's dtype", base, A.dtype))


def _new_layer(linear: nn.Module, want: tuple[Any, ...], dtype: torch.dtype) -> LinearWithLoRA:
    """Make a LinearWithLoRA whose A is about to be loaded."""
    rank, alpha, scaling = want
    with _NoRandomNumbers():
        return LinearWithLoRA(linear, rank, alpha, scaling=scaling, dtype=dtype)


class _NoRandomNumbers(TorchDispatchMode):
    """Leave A as it is: a draw would change what other threads draw, and so would undoing it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.uniform_.default:
            return args[0]
        return func(*args, **(kwargs or {}))


def _check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    if unknown := set(tensors) - set(expected):
        raise ValueError(f"the adapter file holds tensors that fit nowhere: {_shown(unknown)}")
    if missing := set(expected) - set(tensors):
        raise ValueError(f"the adapter file lacks {_shown(missing)}")
    first: dict[object, str] = {}
    for key, target in expected.items():
        got = tensors[key]
        if got.shape != target.shape:
            raise ValueError(_differs(key, "shape", tuple(target.shape), tuple(got.shape)))
        if got.dtype != target.dtype:
            raise ValueError(_differs(key, "dtype", target.dtype, got.dtype))
        if target.is_meta:
            raise ValueError(f"{quoted(key)} can't be loaded: the model's is on the meta device")
        other = first.setdefault(_memory(target), key)
        if other != key and not torch.equal(_bytes(got), _bytes(tensors[other])):
            both = f"{quoted(key)} must equal {quoted(other)}"
            raise ValueError(f"{both}, they are the same tensor in the model")


def _differs(key: str, what: str, want: object, got: object) -> str:
    # A shape holds the rank, which is the file's, too.
    return f"{quoted(key, 80)} must have {what} {quoted(want, 60)}, the file has {quoted(got, 60)}"


def _memory(tensor: Tensor) -> object:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.numel()
    return (tensor.data_ptr(), tensor.shape, tensor.stride()) if plain else id(tensor)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def state_of(
    model: nn.Module, names: Iterable[str], fresh: Mapping[nn.Module, LinearWithLoRA]
) -> dict[str, Any]:
    """Return what the state of modules will be once linears are replaced by the `fresh` layers."""
    wanted, found = set(names), set()
    chosen: dict[str, Any] = {}
    if not wanted:
        return chosen
    for key, value in _state_with(model, fresh).items():
        if inside := wanted.intersection(_parents(key)):
            found |= inside
            chosen[key] = value
    for name in wanted - found:
        if not name or module_named(model, name) is None:
            raise ValueError(
                f"modules_to_save must name modules of the model, it has no {quoted(repr(name))}"
            )
    return chosen


def _state_with(model: nn.Module, fresh: Mapping[nn.Module, LinearWithLoRA]) -> dict[str, Any]:
    places = {name: fresh[linear] for _, _, name, linear in linears(model) if linear in fresh}
    state = {}
    for key, value in model.state_dict().items():
        place = next((name for name in _parents(key) if name in places), None)
        state[key if place is None else f"{place}.linear{key[len(place) :]}"] = value
    for name, layer in places.items():
        state[f"{name}.lora.A"] = layer.lora.A
        state[f"{name}.lora.B"] = layer.lora.B
    return state


def _parents(key: str) -> Iterator[str]:
    """Yield the names of the modules that a key of a state_dict is inside of."""
    for i, character in enumerate(key):
        if character == ".":
            yield key[:i]


def module_named(model: nn.Module, name: str) -> nn.Module | None:
    """Return a model's module by its dotted name; unlike get_submodule runs no property for it."""
    module: nn.Module | None = model
    for part in name.split(".") if name else ():
        module = None if module is None else module._modules.get(part)
    return module


def _field(metadata: Mapping[str, str], key: str, default: object = None) -> Any:
    try:
        return json.loads(metadata[key]) if key in metadata else default
    except (ValueError, RecursionError) as error:  # not JSON, a number too long, nested too deep
        raise ValueError(f"the adapter file's {key} is damaged: {quoted(str(error))}") from None


def _shown(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return quoted(", ".join(names[:5]), 200) + more


def join(name: str, key: str) -> str:
    """Return the key of a module's tensor in the state_dict of the model."""
    return f"{name}.{key}" if name else key
