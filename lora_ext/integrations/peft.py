"""PEFT models on our operation: `accelerate(model)` and back with `restore(model)`.

A LoRA linear of PEFT keeps its parameters, adapters, configuration and the name of its class. Only
its class changes, to a subclass whose forward makes one operation of what PEFT composes
(peft_forward.py); over a base that can't be read, such as a quantised one, the base is called and
the low-rank part added to what it gives.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..bases import why_not_now
from ..checks import check_dropout, lines_by_reason
from ..group import Report as Groups
from ..group import group_, ungroup_
from ..parts import Part

try:
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    from .peft_forward import active_adapters, adapter_of, part_of, why_called
    from .peft_forward import run as run_adapters
except ImportError as error:
    needs = f"lora_ext.integrations.peft needs PEFT ({error}): pip install 'peft>=0.21'"
    raise ImportError(needs) from None


# PEFT's layers that compute base(x) + lora_B(lora_A(dropout(x))) * scaling.
_KINDS = {
    ("peft.tuners.lora.layer", "Linear"),
    ("peft.tuners.lora.bnb", "Linear4bit"),
    ("peft.tuners.lora.bnb", "Linear8bitLt"),
    ("peft.tuners.lora.torchao", "TorchaoLoraLinear"),
}
_FUSED = "one operation"
_PEFTS = "PEFT's own forward: "
_MIXED = f"adapter_names (several adapters in one batch): {_PEFTS}there is no grouped operation yet"


@dataclass
class Report:
    """What `accelerate` did, by names of layers; `print` it.

    Attributes:
        accelerated: layers that run our operation, for one of their adapters at least.
        left: layers that run PEFT's own forward, and why.
        adapters: of each adapter, active or not, how each layer would run with it alone: "one
            operation", "its base is called: " or "PEFT's own forward: " and the reason.
        groups: what `group_` found, where `groups` asked for it.

    """

    accelerated: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    adapters: dict[str, dict[str, str]] = field(default_factory=dict)
    groups: Groups | None = None

    def __str__(self) -> str:
        """Counts, a line a reason, a line for each way that an adapter runs, and mixed batches."""
        lines = [f"accelerated {len(self.accelerated)}, left {len(self.left)}"]
        lines += lines_by_reason("left", self.left)
        for name, ways in self.adapters.items():
            ours = {layer: way for layer, way in ways.items() if layer not in self.left}
            lines += lines_by_reason(f"adapter {name!r}:", ours)
        if self.accelerated and len(self.adapters) > 1:
            lines.append(_MIXED)
        if self.groups:
            lines.append(str(self.groups))
        return "\n".join(lines)


class AcceleratedLinear:
    """Above PEFT's class of a LoRA linear: one operation wherever that computes the same."""

    dropout_mask = "torch"  # how dropout's mask is drawn: see `accelerate`

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return what PEFT's forward returns, (..., out_features) for x (..., in_features)."""
        if not (args or kwargs or self.disable_adapters or self.merged):
            adapters = active_adapters(self)
            now = why_not_now(x) is None and not torch.jit.is_tracing()
            if type(adapters) is list and adapters and now:
                y = run_adapters(self, x, adapters, self.dropout_mask)
                if y is not None:
                    return y
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]

    def lora_part(self: Any, x: Tensor) -> Part | str:
        """Return the layer as one of a group (grouped.py), or why it runs by itself on this x."""
        if self.disable_adapters or self.merged:
            return "its adapter is merged or switched off"
        adapters = active_adapters(self)
        if isinstance(adapters, str):
            return adapters
        return part_of(self, x, adapters, self.dropout_mask)

    def __reduce__(self: Any) -> Any:
        """Copy and pickle by PEFT's class: the class made here has no name to be found by."""
        return _blank, (pefts_class(type(self)),), self.__dict__.copy()


_made: dict[type, type] = {}


def accelerated_class(kind: type) -> type:
    """Return the subclass of one of PEFT's classes that runs our operation; it has its name."""
    if kind not in _made:
        named = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
        named |= {"__doc__": kind.__doc__, "_pefts_class": kind}  # type: ignore[dict-item]
        _made[kind] = type(kind.__name__, (AcceleratedLinear, kind), named)
    return _made[kind]


def pefts_class(kind: type) -> type:
    """Return the class of PEFT that an accelerated one stands for, any other as it is."""
    return kind.__dict__.get("_pefts_class", kind)


def _blank(kind: type) -> Any:
    made: Any = accelerated_class(kind)
    return made.__new__(made)


def accelerate(model: nn.Module, *, dropout_mask: str = "torch", groups: bool = False) -> Report:
    """Run a PEFT model's LoRA linears on our operation, in place.

    Parameters, keys, adapters, configuration and names of classes stay PEFT's: scaling, merging,
    switching, disabling and hot-swapping adapters, `save_pretrained` work as before. Several active
    adapters, lora_bias, DoRA and quantised bases run on ours too. A layer goes back to PEFT's own
    forward, call by call, where ours would compute something else: other variants,
    `adapter_names`, hooks on its adapters. Calling it again takes layers that were added since. A
    model pickled whole names this package: `restore` it first if it is to load without.

    Args:
        model: a PeftModel, or any module with PEFT LoRA layers in it.
        dropout_mask: how lora_dropout draws its mask in training: "torch" as PEFT does, so that
            under a seed a CPU run has PEFT's own masks and generator state; "hash" from a drawn
            seed, which is faster. Compiled code draws masks of its own either way, as PEFT's does.
        groups: run q, k and v, and MLPs, as one operation each: `lora_ext.group_`.

    Returns:
        The layers accelerated, those left with the reason, and how each adapter would run, active
        or not; `print` it.

    Raises:
        TypeError: `model` is no nn.Module.
        ValueError: no PEFT layer in the model, or an unknown dropout_mask.

    """
    check_dropout(0.0, dropout_mask)
    report = Report()
    layers = _tuner_layers(model)
    ungroup_(model)
    for name, layer in layers.items():
        kind = pefts_class(type(layer))
        if not isinstance(layer, AcceleratedLinear) and _key(kind) not in _KINDS:
            where = "" if isinstance(layer, LoraLayer) else f" of {kind.__module__}"
            report.left[name] = f"is a {kind.__name__}{where}, not a linear of PEFT's LoRA"
            continue
        ways = {adapter: _way(layer, adapter) for adapter in layer.lora_A}
        for adapter, way in ways.items():
            report.adapters.setdefault(adapter, {})[name] = way
        if ways and all(way.startswith(_PEFTS) for way in ways.values()):
            report.left[name] = next(iter(ways.values())).removeprefix(_PEFTS)
        else:
            report.accelerated.append(name)
        if not isinstance(layer, AcceleratedLinear):
            layer.__class__ = accelerated_class(kind)
        layer.dropout_mask = dropout_mask
    if groups and report.accelerated:
        report.groups = group_(model)
    return report


def restore(model: nn.Module) -> int:
    """Undo `accelerate`: every layer is PEFT's own class again.

    Returns:
        How many layers were restored.

    Raises:
        TypeError: `model` is no nn.Module.
        ValueError: no PEFT layer in the model, or one that something else has subclassed since, as
            `fully_shard` does. Nothing is then changed.

    """
    layers = _tuner_layers(model)
    ungroup_(model)
    ours = {n: m for n, m in layers.items() if isinstance(m, AcceleratedLinear)}
    for name, layer in ours.items():
        if "_pefts_class" not in type(layer).__dict__:
            got = type(layer).__name__
            raise ValueError(f"{name} must be as accelerate left it to be restored, got a {got}")
    for layer in ours.values():
        layer.__dict__.pop("dropout_mask", None)
        layer.__class__ = pefts_class(type(layer))
    return len(ours)


def _way(layer: Any, name: str) -> str:
    """Say how a layer runs with one adapter, as things are now."""
    adapter = adapter_of(layer, name)
    if isinstance(adapter, str):
        return _PEFTS + adapter
    called = why_called(layer)
    return _FUSED if called is None else f"its base is called: it {called}"


def _key(kind: type) -> tuple[str, str]:
    return kind.__module__, kind.__name__


def _tuner_layers(model: nn.Module) -> dict[str, Any]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    if not layers:
        raise ValueError("model must have PEFT layers: make it with peft.get_peft_model")
    return layers
