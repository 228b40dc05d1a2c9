"""prepack_(): frozen weights laid out once, and not anew at each call."""

import weakref
from dataclasses import dataclass, field

from torch import Tensor, nn

from .backends import BACKENDS, cpp
from .inject import require_lora_layers
from .layers import LinearWithLoRA, why_composed
from .report import lines_by_reason

MIB = 2**20


class PackedWeight:
    """A CPU weight laid out for the C++ kernels: their panels of weight.T, and of weight for dx.

    Args:
        weight: (out_features, in_features), frozen; float32, or bfloat16 or float16, whose panels
            are of float32.
        backward: lay it out for dx = dy @ weight too, which takes as much memory again.

    Raises:
        RuntimeError: PyTorch's own product, which takes no such layout, is the faster one for
            this dtype on this CPU.

    """

    def __init__(self, weight: Tensor, *, backward: bool = False) -> None:
        self._weight = weakref.ref(weight)
        self._version, self._address = weight._version, weight.data_ptr()
        self.forward = cpp.pack_weight(weight.detach(), transposed=True)
        self.backward = cpp.pack_weight(weight.detach(), transposed=False) if backward else None

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        return self.forward.nbytes + (0 if self.backward is None else self.backward.nbytes)

    def why_stale(self, weight: Tensor) -> str | None:
        """Say why it no longer stands for `weight`; None while it does.

        What is written through `weight.data` leaves no trace that this could see.
        """
        if self._weight() is not weight:
            return "the layer has another weight"
        if weight._version != self._version:
            return "the weight was written to"
        if weight.data_ptr() != self._address:
            return "the weight was moved or replaced"
        if weight.requires_grad:
            return "the weight requires grad"
        return None


@dataclass
class Report:
    """What `prepack_` did: names of layers, and for those left as they are the reason.

    Attributes:
        packed: layers whose weight is laid out.
        left: the others, and why.
        mib: what the layouts take beside the weights, MiB.

    """

    packed: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    mib: float = 0.0

    def __str__(self) -> str:
        """Counts and memory, and a line for each reason."""
        counts = f"prepacked {len(self.packed)} layers in {self.mib:.1f} MiB, left {len(self.left)}"
        return "\n".join([counts, *lines_by_reason("left", self.left)])


def prepack_(model: nn.Module, *, backward: bool = False) -> Report:
    """Lay a model's frozen weights out once for the CPU kernels, beside the weights themselves.

    It pays with some tens of rows (README has the figures) and costs 4 bytes an element, twice that
    with `backward`. A layer drops its layout, with a warning, when its weight changes: written to
    in place, replaced, moved or cast by `.to()`, or made to require grad; only writes through
    `weight.data` go unseen. A layout is never in a state_dict, and a copied, pickled or compiled
    model works without it.

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
        why = _why_not(layer)
        if why is None:
            try:
                layer._packed = PackedWeight(layer.weight, backward=backward)
            except RuntimeError as error:
                why = str(error).splitlines()[0]
        if why is not None:
            report.left[name or "model"] = why
        elif layer._packed is not None:
            report.packed.append(name or "model")
            report.mib += layer._packed.nbytes / MIB
    return report


def unpack_(model: nn.Module) -> None:
    """Undo `prepack_`, and give its memory back.

    Raises:
        TypeError: `model` is no nn.Module.
        ValueError: no LinearWithLoRA in the model.

    """
    for layer in require_lora_layers(model).values():
        layer._packed = None


def _why_not(layer: LinearWithLoRA) -> str | None:
    weight = layer.weight
    if (why := why_composed(layer.linear, layer.lora, layer.lora.A)) is not None:
        return why
    if (why := BACKENDS["cpp"].unsupported(weight, weight, layer.lora.A)) is not None:
        return why
    if not weight.is_cpu:
        return f"the weight is on {weight.device.type}"
    if layer.backend not in (None, "cpp"):
        return f"the layer runs backend {layer.backend!r}"
    return "the weight requires grad: it is not frozen" if weight.requires_grad else None
