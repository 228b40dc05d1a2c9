"""Adapters as files: the trainable part of a model, read and written with safetensors."""

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .checks import HALF, check_hyperparameters
from .inject import linears, require_lora_layers, require_module
from .layers import LinearWithLoRA, lora_layers

_FORMAT = "lora_ext.adapter"
_VERSION = "1"


def lora_state_dict(model: nn.Module, bias: str = "none") -> dict[str, Tensor]:
    """Return the adapter part of a model's state_dict: every `lora.A` and `lora.B`.

    Args:
        model: a model with LinearWithLoRA layers.
        bias: which biases come with it: "none", "lora_only" (of adapted linears), or "all".

    Raises:
        TypeError: `model` is no nn.Module.
        ValueError: no LinearWithLoRA in the model, or an unknown `bias`.

    """
    layers = require_lora_layers(model)
    if bias not in ("none", "lora_only", "all"):
        raise ValueError(f"bias must be 'none', 'lora_only' or 'all', got {bias!r}")
    state = model.state_dict()
    wanted = {_join(name, f"lora.{factor}") for name in layers for factor in "AB"}
    if bias == "lora_only":
        wanted |= {_join(name, "linear.bias") for name in layers}
    elif bias == "all":
        wanted |= {key for key in state if key.rpartition(".")[2] == "bias"}
    return {key: value for key, value in state.items() if key in wanted}


def save_adapter(
    model: nn.Module, path: str | os.PathLike[str], *, modules_to_save: Iterable[str] = ()
) -> None:
    """Write a model's adapters to a safetensors file, with what is needed to rebuild them.

    The metadata holds `rank`, `alpha` and `scaling` as JSON: one value where all layers agree, else
    an object from layer name to value. The file appears whole or not at all.

    Args:
        model: a model with LinearWithLoRA layers.
        path: the file to write; one that is there is replaced.
        modules_to_save: dotted names of further modules to store whole, such as a trained head.

    Raises:
        TypeError: `model` is no nn.Module.
        ValueError: no LinearWithLoRA in the model, or no module of a name in `modules_to_save`.
        OSError: the file can't be written.

    """
    layers = require_lora_layers(model)
    tensors = lora_state_dict(model)
    extra = _names(modules_to_save)
    for name in extra:
        tensors.update(_module_state(model, name))
    metadata = {
        "format": _FORMAT,
        "version": _VERSION,
        "rank": _one_or_each({n: layer.lora.rank for n, layer in layers.items()}),
        "alpha": _one_or_each({n: layer.lora.alpha for n, layer in layers.items()}),
        "scaling": _one_or_each({n: layer.lora.scaling for n, layer in layers.items()}),
        "modules_to_save": json.dumps(extra),
    }
    write_whole(Path(path), tensors, metadata)


def write_whole(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all."""
    # A copy of each: safetensors refuses tensors that share memory, as tied adapters do.
    tensors = {k: v.detach().clone().contiguous() for k, v in tensors.items()}
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    try:
        save_file(tensors, temporary, metadata)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load adapters from a file of `save_adapter` into a model, in place.

    A linear of the name that is still plain becomes a LinearWithLoRA with the file's rank, alpha,
    scaling and dtype, so a freshly built base model is enough. Everything is checked first: after
    an error the model is as it was.

    Args:
        model: the model that was saved, adapted or not yet.
        path: the file to read; pickle is never used.

    Raises:
        TypeError: `model` is no nn.Module.
        FileNotFoundError: no file there.
        ValueError: the file is damaged or no adapter, or one of its layers, shapes, dtypes, ranks,
            alphas or scalings does not fit the model.

    """
    require_module(model)
    install(model, *_read(Path(path)))


def install(model: nn.Module, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Put the contents of an adapter file into a model, once all of it is found to fit."""
    extra = _field(metadata, "modules_to_save", [])
    if not isinstance(extra, list) or not all(isinstance(name, str) for name in extra):
        raise ValueError(f"the adapter file's modules_to_save must be names, got {extra!r}")
    expected = {key: value for name in extra for key, value in _module_state(model, name).items()}
    layers = _adapted_layers(model, tensors, metadata)
    for name, layer in layers.items():
        expected[_join(name, "lora.A")] = layer.lora.A
        expected[_join(name, "lora.B")] = layer.lora.B
    _check_tensors(tensors, expected)

    adapted = {layer.linear: layer for layer in layers.values()}
    for parent, attribute, _, linear in list(linears(model)):  # a shared one in all its places
        if linear in adapted:
            setattr(parent, attribute, adapted[linear])
    with torch.no_grad():
        for key, target in expected.items():
            target.copy_(tensors[key])


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise FileNotFoundError(f"path must be an adapter file, there is none at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"path must be a safetensors file, {path} is not: {error}") from None
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"path must be a file of save_adapter, {path} has no such metadata")
    if metadata.get("version") != _VERSION:
        got = metadata.get("version")
        raise ValueError(f"path must hold an adapter of version {_VERSION}, got version {got}")
    return tensors, metadata


def _adapted_layers(
    model: nn.Module, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> dict[str, LinearWithLoRA]:
    """Return the layer for each adapter in the file: the model's own, or a new one beside it."""
    rank, alpha, scaling = (_field(metadata, key) for key in ("rank", "alpha", "scaling"))
    names = [k.removesuffix("lora.A").rstrip(".") for k in tensors if f".{k}".endswith(".lora.A")]
    if not names:
        raise ValueError("path must hold at least one adapter, no key ends in 'lora.A'")
    missing = set(dict(lora_layers(model))) - set(names)
    if missing:
        raise ValueError(f"the adapter file lacks layers that the model has: {_shown(missing)}")
    layers: dict[str, LinearWithLoRA] = {}
    fresh: dict[nn.Module, LinearWithLoRA] = {}
    for name in names:
        want: tuple[Any, ...] = tuple(
            v.get(name) if isinstance(v, dict) else v for v in (rank, alpha, scaling)
        )
        try:
            check_hyperparameters(*want)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"the adapter file's entry for {name!r} is damaged: {error}") from None
        module = _module(model, name)
        if isinstance(module, LinearWithLoRA):
            lora = module.lora
            if (have := (lora.rank, lora.alpha, lora.scaling)) != want:
                raise ValueError(
                    f"{name} must have rank, alpha, scaling {want} as in the adapter file, "
                    f"the model has {have}"
                )
            if module._unmerged_weight:
                raise ValueError(f"{name} is merged: call unmerge_(model) before loading")
            layers[name] = module
        elif isinstance(module, nn.Linear) and name:
            if module not in fresh:
                A = tensors[_join(name, "lora.A")]
                _check_factor(_join(name, "lora.A"), A, module, want[0])
                fresh[module] = _without_rng(module, want, A.dtype)
            layers[name] = fresh[module]
        else:
            got = "no such module" if module is None else f"a {type(module).__name__}"
            raise ValueError(f"{name or 'model'} must be a linear layer, the model has {got}")
    return layers


def _check_factor(key: str, A: Tensor, linear: nn.Linear, rank: int) -> None:
    """Check A before a layer is made to hold it: its rank and dtype come from a file."""
    if (want := (linear.in_features, rank)) != A.shape:
        raise ValueError(f"{key} must have shape {want}, the file has {tuple(A.shape)}")
    base = linear.weight.dtype
    if not base.is_floating_point:  # quantised: x decides, and A and B are cast to it
        base = A.dtype
    if A.dtype != base and not (base in HALF and A.dtype == torch.float32):
        raise ValueError(f"{key} must have the model's dtype {base}, the file has {A.dtype}")


def _without_rng(linear: nn.Module, want: tuple, dtype: torch.dtype) -> LinearWithLoRA:
    """Make a LinearWithLoRA whose A is about to be loaded: the caller's random state stays."""
    rank, alpha, scaling = want
    with torch.random.fork_rng(devices=[]):
        return LinearWithLoRA(linear, rank, alpha, scaling=scaling, dtype=dtype)


def _check_tensors(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    if unknown := set(tensors) - set(expected):
        raise ValueError(f"the adapter file holds tensors that fit nowhere: {_shown(unknown)}")
    if missing := set(expected) - set(tensors):
        raise ValueError(f"the adapter file lacks {_shown(missing)}")
    for key, target in expected.items():
        got = tensors[key]
        if got.shape != target.shape:
            want = tuple(target.shape)
            raise ValueError(f"{key} must have shape {want}, the file has {tuple(got.shape)}")
        if got.dtype != target.dtype:
            raise ValueError(f"{key} must have dtype {target.dtype}, the file has {got.dtype}")


def _module_state(model: nn.Module, name: str) -> dict[str, Tensor]:
    module = _module(model, name)
    if module is None or not name:
        raise ValueError(f"modules_to_save must name modules of the model, it has no {name!r}")
    return {_join(name, key): value for key, value in module.state_dict().items()}


def _module(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _field(metadata: dict[str, str], key: str, default: object = None):
    try:
        return json.loads(metadata[key]) if key in metadata else default
    except (ValueError, RecursionError) as error:  # not JSON, a number too long, nested too deep
        raise ValueError(f"the adapter file's {key} is damaged: {error}") from None


def _one_or_each(values: dict[str, object]) -> str:
    first = next(iter(values.values()))
    return json.dumps(first if all(v == first for v in values.values()) else values)


def _names(names: Iterable[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _shown(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
