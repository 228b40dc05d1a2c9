"""Adapters as files: the trainable part of a model, read and written with safetensors."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

from .adapters_fit import install, join, state_of
from .checks import Touched
from .files import Draft, quoted, read_tensors, to_bytes
from .inject import require_lora_layers, require_module
from .layers import LinearWithLoRA

_FORMAT = "lora_ext.adapter"
_VERSION = "1"


def lora_state_dict(model: nn.Module, bias: str = "none") -> dict[str, Tensor]:
    """Return the adapter part of a model's state_dict: every `lora.A` and `lora.B`.

    Args:
        model: a model with LinearWithLoRA layers.
        bias: which biases come with it: "none", "lora_only" (of adapted linears), or "all".

    Raises:
        TypeError: `model` is no nn.Module.
        ValueError: no LinearWithLoRA in the model, one whose A or B has another name in its
            state_dict (pruned or parametrized, for instance), or an unknown `bias`.

    """
    layers = require_lora_layers(model)
    if bias not in ("none", "lora_only", "all"):
        raise ValueError(f"bias must be 'none', 'lora_only' or 'all', got {bias!r}")
    state = model.state_dict()
    wanted = {join(name, f"lora.{factor}") for name in layers for factor in "AB"}
    if missing := sorted(wanted - state.keys()):
        raise ValueError(
            f"model must have {missing[0]} in its state_dict, got another name for it: undo what "
            "renamed it (pruning, a parametrization, a wrapper)"
        )
    if bias == "lora_only":
        wanted |= {join(name, "linear.bias") for name in layers}
    elif bias == "all":
        wanted |= {key for key in state if key.rpartition(".")[2] == "bias"}
    return {key: value for key, value in state.items() if key in wanted}


def save_adapter(
    model: nn.Module, path: str | os.PathLike[str], *, modules_to_save: Iterable[str] = ()
) -> None:
    """Write a model's adapters to a safetensors file, with what is needed to rebuild them.

    The metadata holds `rank`, `alpha` and `scaling` as JSON: one value where all layers agree, else
    an object from layer name to value. The file appears whole or not at all, even if the process is
    killed or the power fails.

    Args:
        model: a model with LinearWithLoRA layers.
        path: the file to write; one that is there is replaced, behind a symbolic link too.
        modules_to_save: dotted names of further modules to store whole, such as a trained head.

    Raises:
        TypeError: `model` is no nn.Module, or a name in `modules_to_save` no string.
        ValueError: what `lora_state_dict` refuses, or no module of a name in `modules_to_save`.
        OSError: the file can't be written. One that was there is as it was.

    """
    require_lora_layers(model)
    tensors = lora_state_dict(model)
    extra = _names(modules_to_save)
    tensors.update(state_of(model, extra, {}))
    for key, value in tensors.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"modules_to_save must name modules of tensors, {key} is none")
    loras = {  # by every name that a tensor has, where a layer has several
        name: layer.lora
        for name, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, LinearWithLoRA) and join(name, "lora.A") in tensors
    }
    metadata = {
        "format": _FORMAT,
        "version": _VERSION,
        "rank": _one_or_each({name: lora.rank for name, lora in loras.items()}),
        "alpha": _one_or_each({name: lora.alpha for name, lora in loras.items()}),
        "scaling": _one_or_each({name: lora.scaling for name, lora in loras.items()}),
        "modules_to_save": json.dumps(extra),
    }
    with Draft(path, to_bytes(tensors, metadata)) as draft:
        draft.publish()


def load_adapter(model: nn.Module, path: str | os.PathLike[str]) -> Touched:
    """Load adapters from a file of `save_adapter` into a model, in place.

    A linear of the name that is still plain becomes a LinearWithLoRA with the file's rank, alpha,
    scaling and dtype, so a freshly built base model is enough. Everything is checked first: after
    an error the model is as it was.

    Args:
        model: the model that was saved, adapted or not yet.
        path: the file to read; pickle is never used.

    Returns:
        The names of the layers whose adapters were loaded; `print` it.

    Raises:
        TypeError: `model` is no nn.Module.
        FileNotFoundError: no file there.
        OSError: the file can't be read.
        ValueError: the file is damaged or no adapter, or one of its layers, shapes, dtypes, ranks,
            alphas or scalings does not fit the model.

    """
    require_module(model)
    return install(model, *_read(Path(path)))


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors, metadata = read_tensors(path, "path must be an adapter file")
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"path must be a file of save_adapter, {path} has no such metadata")
    if metadata.get("version") != _VERSION:
        got = quoted(str(metadata.get("version")))
        raise ValueError(f"path must hold an adapter of version {_VERSION}, got version {got}")
    return tensors, metadata


def _one_or_each(values: Mapping[str, object]) -> str:
    first = next(iter(values.values()))
    return json.dumps(first if all(v == first for v in values.values()) else values)


def _names(names: Iterable[str]) -> list[str]:
    names = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"modules_to_save must hold strings, got {type(name).__name__}")
    return names
