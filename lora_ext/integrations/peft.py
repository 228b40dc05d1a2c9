"""PEFT models on our operation: `accelerate(model)` and back with `restore(model)`.

A LoRA linear of PEFT keeps its parameters, adapters and configuration. Only its class changes, to a
subclass whose forward makes one operation of what PEFT composes:

    y = base(x) + lora_B(lora_A(dropout(x))) * scaling
    x (..., in), lora_A.weight (rank, in), lora_B.weight (out, rank), y (..., out)
"""

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..bases import base_of, why_not_now
from ..call import Weight
from ..checks import HALF, check_dropout, lines_by_reason
from ..functional import lora_linear
from ..group import Report as Groups
from ..group import group_, ungroup_
from ..grouped import Part

try:
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import Linear as PeftLinear
    from peft.tuners.tuners_utils import BaseTunerLayer
except ImportError as error:
    needs = f"lora_ext.integrations.peft needs PEFT ({error}): pip install 'peft>=0.21'"
    raise ImportError(needs) from None


@dataclass
class Report:
    """What `accelerate` did: names of layers, and for those left as they are the reason.

    Attributes:
        accelerated: layers that run our operation.
        left: layers that keep PEFT's own forward, and why.
        groups: what `group_` found, where `groups` asked for it.

    """

    accelerated: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    groups: Groups | None = None

    def __str__(self) -> str:
        """Counts, and a line for each reason."""
        lines = [f"accelerated {len(self.accelerated)}, left {len(self.left)}"]
        lines += lines_by_reason("left", self.left)
        return "\n".join([*lines, *([str(self.groups)] if self.groups else [])])


class AcceleratedLinear(PeftLinear):
    """PEFT's LoRA linear, run as one operation wherever that computes the same."""

    dropout_mask = "torch"  # how dropout's mask is drawn: see `accelerate`

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return what PEFT's forward returns, (..., out_features) for x (..., in_features)."""
        if not (args or kwargs or self.disable_adapters or self.merged):
            parts = _parts(self)
            if not isinstance(parts, str):
                base, A, B, dropout, name = parts
                weight = base._parameters["weight"]
                if _takes(x, weight, A):
                    p = dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0
                    return lora_linear(
                        x,
                        weight,
                        base._parameters["bias"],
                        A.T,
                        B.T,
                        self.scaling[name],
                        dropout=p,
                        dropout_mask=self.dropout_mask,
                    )
        return super().forward(x, *args, **kwargs)

    def lora_part(self) -> Part | str:
        """Return the layer as one of a group (grouped.py), or why it runs by itself now."""
        if self.disable_adapters or self.merged:
            return "its adapter is merged or switched off"
        parts = _parts(self)
        if isinstance(parts, str):
            return parts
        base, A, B, dropout, name = parts
        p = dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0
        of_base = base._parameters["weight"], base._parameters["bias"]
        return Part(*of_base, A.T, B.T, self.scaling[name], p, self.dropout_mask)


def accelerate(model: nn.Module, *, dropout_mask: str = "torch", groups: bool = False) -> Report:
    """Run a PEFT model's LoRA linears on our operation, in place.

    Parameters, keys, adapters and configuration stay PEFT's: scaling (rsLoRA too), merging,
    switching and disabling adapters, `save_pretrained` work as before. A layer goes back to PEFT's
    own forward, call by call, where ours would compute something else: several active adapters,
    `adapter_names`, hooks on its parts. Calling it again takes layers that were added since. A
    model pickled whole names our class: `restore` it first if it is to load without this package.

    Args:
        model: a PeftModel, or any module with PEFT LoRA layers in it.
        dropout_mask: how lora_dropout draws its mask in training: "torch" as PEFT does, so that
            under a seed a CPU run has PEFT's own masks and generator state; "hash" from a drawn
            seed, which is faster. Compiled code draws masks of its own either way, as PEFT's does.
        groups: run q, k and v, and gated MLPs, as one operation each: `lora_ext.group_`.

    Returns:
        The layers accelerated, and those left with the reason; `print` it.

    Raises:
        TypeError: `model` is no nn.Module.
        ValueError: no PEFT layer in the model, or an unknown dropout_mask.

    """
    check_dropout(0.0, dropout_mask)
    report = Report()
    layers = _tuner_layers(model)
    ungroup_(model)
    for name, layer in layers.items():
        why = None if type(layer) is AcceleratedLinear else _why_never(layer)
        parts = why or _parts(layer)
        if isinstance(parts, str):
            report.left[name] = parts
            continue
        layer.__class__ = AcceleratedLinear
        layer.dropout_mask = dropout_mask
        report.accelerated.append(name)
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
        if type(layer) is not AcceleratedLinear:
            got = type(layer).__name__
            raise ValueError(f"{name} must be an AcceleratedLinear to be restored, got a {got}")
    for layer in ours.values():
        layer.__class__ = PeftLinear  # type: ignore[assignment]
    return len(ours)


def why_own_forward(layer: Any) -> str | None:
    """Say why a LoRA linear must run PEFT's own forward now; None if our operation can.

    Args:
        layer: a `peft.tuners.lora.Linear`.

    """
    parts = _parts(layer)
    return parts if isinstance(parts, str) else None


def _parts(layer: Any) -> tuple[Any, Tensor, Tensor, nn.Module, str] | str:
    """Return base, A and B as PEFT has them, dropout of the active adapter, its name; or why not.

    A is lora_A's weight, (rank, in), and B lora_B's, (out, rank).
    """
    modules = layer._modules  # by attribute each would cost 1 us
    lora_A = modules["lora_A"]._modules
    active = [name for name in layer.active_adapters if name in lora_A]
    if len(active) != 1:
        return f"{len(active)} adapters are active, our operation takes one"
    name = active[0]
    if name in layer.lora_variant:
        return f"adapter {name!r} is a {type(layer.lora_variant[name]).__name__}"
    base, low_A, low_B = modules["base_layer"], lora_A[name], modules["lora_B"]._modules[name]
    weight, A, B = base_of(base), base_of(low_A), base_of(low_B)
    for part, judged in (("base_layer", weight), ("lora_A", A), ("lora_B", B)):
        if type(judged) is str:
            return f"its {part} {judged}"
    if low_B._parameters["bias"] is not None:
        return f"adapter {name!r} has a bias (lora_bias)"
    dropout = modules["lora_dropout"]._modules[name]
    if type(dropout) not in (nn.Dropout, nn.Identity):
        return f"its dropout is a {type(dropout).__name__}"
    return base, cast(Weight, A).data, cast(Weight, B).data, dropout, name


def _why_never(layer: BaseTunerLayer) -> str | None:
    kind = type(layer)
    if kind is PeftLinear:
        return None
    where = "" if isinstance(layer, LoraLayer) else f" of {kind.__module__}"
    return f"is a {kind.__name__}{where}, not PEFT's plain LoRA Linear"


def _takes(x: Tensor, weight: Tensor, A: Tensor) -> bool:
    """Whether lora_linear takes this call; nested tensors, transforms, odd dtypes are PEFT's."""
    if why_not_now(x) is not None:
        return False
    if torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type):
        return True
    fits = A.dtype is x.dtype or (A.dtype is torch.float32 and x.dtype in HALF)
    return fits and weight.dtype is x.dtype


def _tuner_layers(model: nn.Module) -> dict[str, Any]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    if not layers:
        raise ValueError("model must have PEFT layers: make it with peft.get_peft_model")
    return layers
