"""Linears of the other layout: transformers' Conv1D, GPT-2's, whose weight is (in, out)."""

from typing import Any

from torch import nn

_CONV1D = ("transformers.pytorch_utils", "Conv1D")


def is_linear(module: nn.Module) -> bool:
    """Whether a module is an nn.Linear, a subclass of it, or a Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def sizes_of(linear: Any) -> tuple[int, int]:
    """Return the in and out features of a linear layer."""
    if is_conv1d(linear):
        return linear.nx, linear.nf
    return linear.in_features, linear.out_features


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D, a linear whose weight is (in, out): GPT-2's."""
    kind = type(module)
    return (kind.__module__, kind.__name__) == _CONV1D
