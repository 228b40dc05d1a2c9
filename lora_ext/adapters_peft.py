"""Adapters in PEFT's layout: a folder with adapter_config.json and adapter_model.safetensors.

    ours    lora.A (in, rank)               lora.B (rank, out)
    PEFT    lora_A.weight (rank, in)        lora_B.weight (out, rank)

PEFT multiplies by lora_alpha / r, or by lora_alpha / sqrt(r) under use_rslora. PEFT itself is not
needed to read or write this.

The two files of a folder belong together: tensors next to another save's lora_alpha would load and
be wrong. So the tensors' metadata holds the configuration too, and while a save replaces both there
is no adapter_config.json: whenever it is there, it is that of the tensors.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapters_fit import install, module_named
from .checks import HALF, Touched
from .files import Draft, one_at_a_time, publish_both, quoted, read_tensors, to_bytes
from .inject import require_lora_layers, require_module
from .layers import LinearWithLoRA
from .patterns import Patterns

_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_EMBEDDED = "lora_ext.adapter_config"  # a key of the tensors' metadata
_PREFIX = "base_model.model."
_DTYPES = (torch.float32, torch.float64, *HALF)
# What changes the meaning of an adapter, and the value that ours has.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "fan_in_fan_out": (False, True, None),  # how the base is stored: its module says so too
    "modules_to_save": ([], None),
    "trainable_token_indices": ({}, [], None),
    "target_parameters": ([], None),
    "layer_replication": ([], None),
    "use_qalora": (False, None),
    "use_bdlora": (None,),
    "alora_invocation_tokens": ([], None),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    # Not those that change the base's weights: pissa, olora, corda, loftq, lora_ga.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "mica"),
    "use_rslora": (True, False, None),
}


def save_peft_adapter(
    model: nn.Module, folder: str | os.PathLike[str], *, base_model: str | None = None
) -> None:
    """Write a model's adapters as PEFT writes its own: `PeftModel.from_pretrained` loads them.

    A scaling that PEFT has no rule for goes into lora_alpha: "alpha" becomes alpha * rank under
    lora_alpha / r. Ranks and alphas that differ from the most common go into rank_pattern and
    alpha_pattern.

    If the process is killed, the folder holds the old adapter or the new one for
    `load_peft_adapter`. PEFT finds the old, the new, or no adapter_config.json where that changes.

    Args:
        model: a model with LinearWithLoRA layers.
        folder: where to write; made if it is not there. Files of these names are replaced, behind
            symbolic links too.
        base_model: name or path of the base model, for PEFT's base_model_name_or_path.

    Raises:
        TypeError: `model` is no nn.Module.
        ValueError: no LinearWithLoRA in the model, or the model is itself one.
        OSError: the folder can't be written. An adapter that was there is as it was.

    """
    layers = require_lora_layers(model)
    if isinstance(model, LinearWithLoRA):
        raise ValueError("model is itself a LinearWithLoRA: PEFT adapts layers inside a model")
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = layer.lora.A.T
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = layer.lora.B.T
    config = _config_of(model, layers) | {"base_model_name_or_path": base_model}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (
        one_at_a_time(folder),
        Draft(folder / _TENSORS, to_bytes(tensors, {"format": "pt", _EMBEDDED: text})) as first,
        Draft(folder / _CONFIG, text.encode()) as second,
    ):
        if second.changes_nothing:
            first.publish()
        else:
            publish_both(first, second)


def load_peft_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> Touched:
    """Load a LoRA adapter that PEFT saved into a model, in place.

    Linears that are still plain become LinearWithLoRA layers with scaling "alpha/rank", or
    "alpha/sqrt(rank)" under use_rslora. As with `load_adapter` all is checked first: after an error
    the model is as it was. `lora_dropout` is not taken over: pass `dropout` to
    `replace_linear_with_lora` to train on.

    Args:
        model: the base model, adapted or not yet; names as in the model that PEFT was given.
        folder: a folder with adapter_config.json and adapter_model.safetensors.

    Returns:
        The names of the layers whose adapters were loaded; `print` it.

    Raises:
        TypeError: `model` is no nn.Module.
        FileNotFoundError: one of the files is missing.
        OSError: one of the files can't be read.
        ValueError: a damaged file, something of PEFT's that a LinearWithLoRA has not (DoRA, biases,
            modules_to_save, layers that are no linear), a pattern that `re` would not take or that
            can't be matched in bounded time, or a layer that does not fit the model.

    """
    require_module(model)
    config, tensors = _read(Path(folder))
    r, lora_alpha = (_patterns(config, field) for field in ("rank_pattern", "alpha_pattern"))
    ours: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for key, tensor in tensors.items():
        name, end, factor = key.removeprefix(_PREFIX).rpartition(".lora_")
        right = tensor.dim() == 2 and tensor.dtype in _DTYPES
        if not (end and factor in ("A.weight", "B.weight") and right):
            got = quoted(key)
            raise ValueError(f"folder must hold LoRA factors of linear layers, got {got}")
        ours[f"{name}.lora.{factor[0]}"] = tensor.T.contiguous()
        # Names that the model has: how long a match takes depends on them.
        if name not in ranks and module_named(model, name) is not None:
            ranks[name] = _value_for(r, "rank_pattern", name, config.get("r"))
            alphas[name] = _value_for(lora_alpha, "alpha_pattern", name, config.get("lora_alpha"))
    metadata = {"rank": json.dumps(ranks), "alpha": json.dumps(alphas)}
    metadata["scaling"] = json.dumps(
        "alpha/sqrt(rank)" if config.get("use_rslora") else "alpha/rank"
    )
    return install(model, ours, metadata)


def _config_of(model: nn.Module, layers: Mapping[str, LinearWithLoRA]) -> dict[str, Any]:
    rules = {layer.lora.scaling for layer in layers.values()}
    rslora = rules == {"alpha/sqrt(rank)"}
    ranks, alphas = {}, {}
    for name, layer in layers.items():
        lora = layer.lora
        kept = rslora or lora.scaling == "alpha/rank"
        ranks[name] = lora.rank
        alphas[name] = lora.alpha if kept else lora.scale * lora.rank
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    dropouts = {layer.lora.dropout for layer in layers.values()}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {_exactly(n): v for n, v in ranks.items() if v != r},
        "alpha_pattern": {_exactly(n): v for n, v in alphas.items() if v != alpha},
        "use_rslora": rslora,
        "lora_dropout": max(dropouts),
        "target_modules": _targets(model, layers),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def _targets(model: nn.Module, layers: Mapping[str, LinearWithLoRA]) -> list[str] | str:
    """Last names, as PEFT lists them, where these select our layers alone; else an expression."""
    last = {name.rpartition(".")[2] for name in layers}
    inside = tuple(f"{name}." for name in layers)
    named = {n for n, _ in model.named_modules() if n.rpartition(".")[2] in last}
    if {n for n in named if not n.startswith(inside)} == set(layers):
        return sorted(last)
    return "|".join(re.escape(name) for name in layers)


def _exactly(name: str) -> str:
    """Return PEFT's pattern for one layer: it matches ends of names, `^` binds it to the start."""
    return f"^{re.escape(name)}"


def _patterns(config: dict[str, Any], field: str) -> Patterns:
    patterns = config.get(field) or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{_CONFIG} must hold an object as {field}, got {quoted(patterns)}")
    return Patterns(patterns)


def _value_for(patterns: Patterns, field: str, name: str, default: Any) -> Any:
    try:
        return patterns.value_for(name, default)
    except ValueError as error:
        raise ValueError(f"{_CONFIG} has a damaged {field}: {error}") from None


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read both files, of one save even if another process is saving."""
    what = "folder must be a PEFT adapter's"
    path = folder / _TENSORS
    for _ in range(100):
        before = _identity(path)
        tensors, metadata = read_tensors(path, what)
        try:
            text = (folder / _CONFIG).read_bytes()
        except FileNotFoundError:  # a save is between its two renames, or was killed there
            if _EMBEDDED not in metadata:
                raise FileNotFoundError(f"{what}, there is no {folder / _CONFIG}") from None
            text = metadata[_EMBEDDED].encode()
        if _identity(path) == before:
            return _checked_config(folder / _CONFIG, text), tensors
    raise OSError(f"{what}, {path} was replaced again and again while it was read")


def _identity(path: Path) -> tuple[int, ...] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _checked_config(path: Path, text: bytes) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON: {quoted(str(error))}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        got = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{path} must have peft_type 'LORA', got {quoted(repr(got))}")
    for field, neutral in _NEUTRAL.items():
        if (value := config.get(field)) not in neutral:
            shown = quoted(repr(value))
            raise ValueError(f"{path} has {field}={shown}, which a LinearWithLoRA has not")
    return config
