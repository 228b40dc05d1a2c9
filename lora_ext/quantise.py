"""quantise_(): a model's linears as codes, in bitsandbytes' layout and without bitsandbytes."""

from dataclasses import dataclass, field

from torch import nn

from .bases import base_of
from .checks import lines_by_reason
from .codes import DTYPES, FORMATS
from .quantised_linear import QuantisedLinear

MIB = 2**20


@dataclass
class Report:
    """What `quantise_` did: names of linears, and for those left as they are the reason.

    Attributes:
        quantised: linears whose weight is codes now.
        left: the others, and why.
        saved_mib: what their weights take less, MiB.

    """

    quantised: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    saved_mib: float = 0.0

    def __str__(self) -> str:
        """Counts and memory, and a line for each reason."""
        counts = f"quantised {len(self.quantised)} linears, {self.saved_mib:.1f} MiB less"
        return "\n".join([f"{counts}, left {len(self.left)}", *lines_by_reason("left", self.left)])


def quantise_(model: nn.Module, format: str = "nf4", *, block_size: int = 64) -> Report:
    """Quantise a model's plain linears in place, those under LinearWithLoRA too: QLoRA's base.

    Each nn.Linear becomes a `QuantisedLinear`, whose weight is frozen; biases and everything else
    stay. On a CPU a LinearWithLoRA over one is one operation, forward and backward, and no float
    weight is made. The bytes are those that bitsandbytes makes on a CPU, which need not be there.
    A checkpoint of a quantised model loads after `quantise_`.

    Args:
        model: a model with nn.Linear layers, such as `replace_linear_with_lora` has been over.
        format: "nf4" or "fp4", 4 bits and a scale a block; or "int8", 8 bits and a scale a row.
        block_size: elements that share a scale, of 4 bits; a power of two from 32 to 4096.

    Returns:
        The linears quantised and the memory that saves, and those left with the reason; `print` it.

    Raises:
        TypeError: `model` is no nn.Module.
        ValueError: an unknown format or block size, or no nn.Linear in the model.

    Source:
        Dettmers et al., "QLoRA", arXiv:2305.14314; "LLM.int8()", arXiv:2208.07339.

    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if block_size not in (32, 64, 128, 256, 512, 1024, 2048, 4096):
        raise ValueError(f"block_size must be a power of two from 32 to 4096, got {block_size!r}")
    report, made = Report(), {}
    for path, parent in list(model.named_modules()):
        for attribute, child in list(parent._modules.items()):
            name = f"{path}.{attribute}" if path else attribute
            if not isinstance(child, nn.Linear) or isinstance(child, QuantisedLinear):
                continue
            if (why := _why_not(child, parent)) is not None:
                report.left[name] = why
                continue
            if child not in made:  # one that two places share stays one
                made[child] = QuantisedLinear(child, format, block_size).train(child.training)
                held = (made[child].weight, made[child].scale)
                report.saved_mib += (child.weight.nbytes - sum(t.nbytes for t in held)) / MIB
            parent._modules[attribute] = made[child]
            report.quantised.append(name)
    if not report.quantised and not report.left:
        raise ValueError("model must have an nn.Linear in it, below itself, to be quantised")
    return report


def _why_not(linear: nn.Linear, parent: nn.Module) -> str | None:
    judged = base_of(linear)
    if isinstance(judged, str):
        return judged
    if judged.data.dtype not in DTYPES:
        return f"has a weight of {judged.data.dtype}"
    if judged.data.is_meta:
        return "has a weight on meta"
    if getattr(parent, "_unmerged_weight", None):
        return "the adapter is merged into its weight: unmerge_ first"
    return None
