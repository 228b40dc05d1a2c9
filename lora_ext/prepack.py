"""prepack_(): frozen weights laid out once, and not again at each call."""

from dataclasses import dataclass, field

from torch import nn

from .backends import cpp
from .checks import lines_by_reason
from .conv1d import is_conv1d
from .inject import require_lora_layers
from .layers import LinearWithLoRA, why_composed
from .panels import Panels

MIB = 2**20


@dataclass
class Report:
    """What `prepack_` did: names of layers, and for those left as they are the reason.

    Attributes:
        packed: layers whose weight is laid out.
        left: the others, and why.
        mib: what the layouts take next to the weights, MiB.

    """

    packed: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    mib: float = 0.0

    def __str__(self) -> str:
        """Counts and memory, and a line for each reason."""
        counts = f"prepacked {len(self.packed)} layers in {self.mib:.1f} MiB, left {len(self.left)}"
        return "\n".join([counts, *lines_by_reason("left", self.left)])


def prepack_(model: nn.Module, *, backward: bool = False) -> Report:
    """Lay a model's frozen weights out once for the CPU kernels, next to the weights themselves.

    It pays with some tens of rows (docs/packing.md) and costs 4 bytes an element, twice that
    with `backward`. A layer drops its layout, with a warning, when its weight changes: written to
    in place, replaced, moved or cast by `.to()`, or made to require grad. What PyTorch counts no
    version for goes unseen: writes through `weight.data`, NumPy, the storage, a collective such as
    `dist.broadcast`, or by another process that shares it; call it again after those. A layout is
    never in a state_dict, and a copied, pickled or compiled model works without it.

    Args:
        model: a model with LinearWithLoRA layers on the CPU.
        backward: lay weights out for dx too, for training.

    Returns:
        The layers laid out and the memory that takes, and those left with the reason; `print` it.

    Raises:
        TypeError: `model` is no nn.Module.
        ValueError: no LinearWithLoRA in the model.

    """
    report = Report()
    for name, layer in require_lora_layers(model).items():
        layer._panels = None
        if (why := _why_not(layer)) is not None:
            report.left[name or "model"] = why
            continue
        layer._panels = Panels(layer.weight, backward=backward)
        report.packed.append(name or "model")
        report.mib += layer._panels.nbytes / MIB
    return report


def unpack_(model: nn.Module) -> None:
    """Undo `prepack_`, and give its memory back.

    Raises:
        TypeError: `model` is no nn.Module.
        ValueError: no LinearWithLoRA in the model.

    """
    for layer in require_lora_layers(model).values():
        layer._panels = None


def _why_not(layer: LinearWithLoRA) -> str | None:
    weight = layer.weight
    if layer._unmerged_weight:
        return "the adapter is merged: the layer runs linear(x)"
    if (why := why_composed(layer.linear, layer.lora)) is not None:
        return why
    if is_conv1d(layer.linear):
        return "linear is a Conv1D"
    if layer.backend not in (None, "cpp"):
        return f"the layer runs backend {layer.backend!r}"
    if weight.requires_grad:
        return "the weight requires grad: it is not frozen"
    if weight.is_inference():
        return "the weight is of inference mode, where PyTorch counts no writes"
    return cpp.why_not_packed(weight)
