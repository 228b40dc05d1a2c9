"""LoRA layers for PyTorch: `linear(x) + alpha * (x @ A @ B)` as one operation."""

import sys
from importlib import import_module

from ._version import __version__
from .adapters import load_adapter, lora_state_dict, save_adapter
from .adapters_peft import load_peft_adapter, save_peft_adapter
from .explain import explain
from .functional import lora_linear
from .gated_mlp import lora_gated_mlp, lora_mlp
from .group import group_, ungroup_
from .grouped import lora_linears
from .inject import mark_only_lora_as_trainable, merge_, replace_linear_with_lora, unmerge_
from .layers import LinearWithLoRA, LoRALayer
from .prepack import prepack_, unpack_
from .quantise import quantise_
from .quantised_linear import QuantisedLinear

if "torch.utils.flop_counter" in sys.modules:  # else `import lora_ext.flops`: it imports Triton
    import_module(f"{__name__}.flops")

__all__ = [
    "__version__",
    "LinearWithLoRA",
    "LoRALayer",
    "QuantisedLinear",
    "explain",
    "group_",
    "load_adapter",
    "load_peft_adapter",
    "lora_gated_mlp",
    "lora_mlp",
    "lora_linear",
    "lora_linears",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "merge_",
    "prepack_",
    "quantise_",
    "replace_linear_with_lora",
    "save_adapter",
    "save_peft_adapter",
    "ungroup_",
    "unmerge_",
    "unpack_",
]
