"""Adapters in PEFT's layout: a folder with adapter_config.json and adapter_model.safetensors.

    ours    lora.A (in, rank)               lora.B (rank, out)
    PEFT    lora_A.weight (rank, in)        lora_B.weight (out, rank)

PEFT multiplies by lora_alpha / r, or by lora_alpha / sqrt(r) under use_rslora. PEFT itself is not
needed to read or write this.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .adapters import install, write_whole
from .inject import require_lora_layers, require_module
from .layers import LinearWithLoRA

_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# What changes the meaning of an adapter, and the value that ours has.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
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
}


def save_peft_adapter(
    model: nn.Module, folder: str | os.PathLike[str], *, base_model: str | None = None
) -> None:
    """Write a model's adapters as PEFT writes its own: `PeftModel.from_pretrained` loads them.

    A scaling that PEFT has no rule for goes into lora_alpha: "alpha" becomes alpha * rank under
    lora_alpha / r. Ranks and alphas that differ from the most common go into rank_pattern and
    alpha_pattern.

    Args:
        model: a model with LinearWithLoRA layers.
        folder: where to write; made if it is not there. Files of these names are replaced.
        base_model: name or path of the base model, for PEFT's base_model_name_or_path.

    Raises:
        TypeError: `model` is no nn.Module.
        ValueError: no LinearWithLoRA in the model, or the model is itself one.
        OSError: the folder can't be written.

    """
    layers = require_lora_layers(model)
    if isinstance(model, LinearWithLoRA):
        raise ValueError("model is itself a LinearWithLoRA: PEFT adapts layers inside a model")
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = layer.lora.A.T
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = layer.lora.B.T
    config = _config_of(model, layers) | {"base_model_name_or_path": base_model}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / _TENSORS, tensors, {"format": "pt"})
    temporary = folder / f".{_CONFIG}.tmp"
    temporary.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    os.replace(temporary, folder / _CONFIG)


def load_peft_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Load a LoRA adapter that PEFT saved into a model, in place.

    Linears that are still plain become LinearWithLoRA layers with scaling "alpha/rank", or
    "alpha/sqrt(rank)" under use_rslora. As with `load_adapter` all is checked first: after an error
    the model is as it was. `lora_dropout` is not taken over: pass `dropout` to
    `replace_linear_with_lora` to train on.

    Args:
        model: the base model, adapted or not yet; names as in the model that PEFT was given.
        folder: a folder with adapter_config.json and adapter_model.safetensors.

    Raises:
        TypeError: `model` is no nn.Module.
        FileNotFoundError: one of the files is missing.
        ValueError: a damaged file, something of PEFT's that a LinearWithLoRA has not (DoRA, biases,
            modules_to_save, layers that are no linear), or a layer that does not fit the model.

    """
    require_module(model)
    folder = Path(folder)
    config = _read_config(folder / _CONFIG)
    tensors = _read_tensors(folder / _TENSORS)
    ours: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for key, tensor in tensors.items():
        name, end, factor = key.removeprefix(_PREFIX).rpartition(".lora_")
        if not end or factor not in ("A.weight", "B.weight") or tensor.dim() != 2:
            raise ValueError(f"folder must hold LoRA factors of linear layers, got {key}")
        ours[f"{name}.lora.{factor[0]}"] = tensor.T.contiguous()
        ranks[name] = _by_pattern(config, "rank_pattern", name, config.get("r"))
        alphas[name] = _by_pattern(config, "alpha_pattern", name, config.get("lora_alpha"))
    metadata = {"rank": json.dumps(ranks), "alpha": json.dumps(alphas)}
    metadata["scaling"] = json.dumps(
        "alpha/sqrt(rank)" if config.get("use_rslora") else "alpha/rank"
    )
    install(model, ours, metadata)


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


def _by_pattern(config: dict[str, Any], field: str, name: str, default: Any) -> Any:
    patterns = config.get(field) or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{_CONFIG} must hold an object as {field}, got {patterns!r}")
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", name):
                return value
        except re.error as error:
            raise ValueError(f"{_CONFIG} has a damaged {field}: {pattern!r}: {error}") from None
    return default


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"folder must be a PEFT adapter's, there is no {path}")
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        got = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{path} must have peft_type 'LORA', got {got!r}")
    for field, neutral in _NEUTRAL.items():
        if (value := config.get(field)) not in neutral:
            raise ValueError(f"{path} has {field}={value!r}, which a LinearWithLoRA has not")
    return config


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"folder must be a PEFT adapter's, there is no {path}")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} must be a safetensors file: {error}") from None
