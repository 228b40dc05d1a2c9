"""The frozen linear under the layers that are timed: plain, bitsandbytes', or our own of codes."""

from importlib import import_module
from types import ModuleType

from torch import nn

from lora_ext.quantised_linear import QuantisedLinear

from . import Case


class Unavailable(Exception):
    """A provider can't run here; the message says why and how to fix it."""


def needed(package: str) -> ModuleType:
    """Import a package that not everyone has; raise Unavailable if it can't be."""
    try:
        return import_module(package)
    except ImportError as error:
        raise Unavailable(f"{package} can't be imported ({error}); pip install {package}") from None


def frozen_linear(case: Case) -> nn.Linear:
    """Return an nn.Linear over the case's weight and bias, which are not trained."""
    linear = nn.Linear(case.shape.K, case.shape.N, device="meta")
    linear.weight = nn.Parameter(case.weight, requires_grad=False)
    linear.bias = nn.Parameter(case.bias, requires_grad=False)
    return linear


def quantised_linear(case: Case) -> nn.Module:
    """Return the frozen base as bitsandbytes' linear where the case has codes, in training."""
    if case.unquantised is None:
        return frozen_linear(case)
    nn_of = needed("bitsandbytes").nn
    if case.base == "int8":
        linear = nn_of.Linear8bitLt(case.shape.K, case.shape.N, has_fp16_weights=False)
    else:
        kind = {"quant_type": case.base, "compress_statistics": False}
        linear = nn_of.Linear4bit(case.shape.K, case.shape.N, **kind)
    linear.load_state_dict({"weight": case.unquantised, "bias": case.bias})
    linear = linear.to("cpu").requires_grad_(False)
    linear.bias.data = case.bias
    return linear


def own_quantised_linear(case: Case) -> nn.Module:
    """Return the frozen base as `quantise_` makes it, without bitsandbytes."""
    assert case.unquantised is not None
    linear = frozen_linear(case)
    linear.weight = nn.Parameter(case.unquantised, requires_grad=False)
    return QuantisedLinear(linear, case.base)
