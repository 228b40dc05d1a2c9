"""bitsandbytes' quantised linears on a CPU, read as weights of codes and not called.

Nothing here imports bitsandbytes: a module of it can only be there once it is.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils.weak import WeakIdKeyDictionary

from ..call import Weight
from ..codes import DTYPES

_MODULES = "bitsandbytes.nn.modules"
_OF_4_BITS = ("Linear4bit", "LinearNF4", "LinearFP4")
_OF_8_BITS = "Linear8bitLt"
# What is computed once of a tensor of statistics: (its version, the result).
_scales = WeakIdKeyDictionary()


def codes_of(module: nn.Module, x: Tensor) -> Weight | str | None:
    """Return the weight of a linear of bitsandbytes, or why it must be called instead.

    The weight is read where the module computes x @ weight.T + bias with the weight that its codes
    stand for, in x's dtype, or in autocast's. With int8 that is while it trains: in eval mode it
    rounds x to int8 as well. Once bitsandbytes has laid a weight of 4 bits out for its own product
    (in eval mode on a CPU with AVX512-BF16), it is called.

    Args:
        module: any module but one with hooks.
        x: the input that the weight would meet.

    Returns:
        The weight; a reason in words; None where the module is none of bitsandbytes' linears.

    """
    kind = type(module)
    if kind.__module__ != _MODULES or kind.__name__ not in (*_OF_4_BITS, _OF_8_BITS):
        return None
    parameters: dict[str, Any] = module._parameters
    weight, bias = parameters["weight"], parameters["bias"]
    if torch.compiler.is_compiling():
        return "is bitsandbytes', and compiled code calls it"
    # Each attribute of a subclass costs 1.4 us where it is not asked of the tensor itself.
    with torch._C.DisableTorchFunctionSubclass():
        data, dtype, on_cpu = weight.data, weight.dtype, weight.is_cpu
    if not (x.is_cpu and on_cpu):
        return f"is a {kind.__name__} of bitsandbytes that is not on a CPU"
    if x.dtype not in DTYPES:
        return f"has a weight of codes, for float32, bfloat16 and float16; x is {x.dtype}"
    if bias is not None and type(bias) is not Parameter:
        return f"has a bias that is a {type(bias).__name__}, not a Parameter"
    if kind.__name__ == _OF_8_BITS:
        return _of_8_bits(module, x, weight, bias)
    if dtype is not torch.uint8:
        data = data.view(torch.uint8).view(-1, 1)
    return _of_4_bits(module, x, data, getattr(weight, "quant_state", None), bias)


def _of_4_bits(module: Any, x: Tensor, data: Tensor, state: Any, bias: Any) -> Weight | str:
    if state is None:
        return "is not quantised yet"
    if state.__dict__.get("packing_format_for_cpu"):  # getattr for what is not there: 0.9 us
        return "has its weight laid out by bitsandbytes for its own product"
    if tuple(state.shape) != (module.out_features, module.in_features):
        return f"has a weight quantised in shape {tuple(state.shape)}"
    dtype = module.compute_dtype if module.compute_type_is_set else None
    autocast = torch.is_autocast_enabled("cpu")
    if dtype not in (None, x.dtype) and not (autocast and dtype is torch.get_autocast_dtype("cpu")):
        return f"computes in {dtype} what x has in {x.dtype}"
    if bias is not None and bias.dtype is not x.dtype and not autocast:
        return f"has a bias of {bias.dtype} for an x of {x.dtype}"
    scale = state.absmax
    if state.nested:
        scale = _once(scale, lambda: _nested_scale(state))
    if scale.dtype is not torch.float32:
        return f"has scales of {scale.dtype}"
    if -(-math.prod(state.shape) // state.blocksize) != scale.numel():
        return f"has {scale.numel()} scales for blocks of {state.blocksize}"
    return Weight(data, state.quant_type, scale)


def _nested_scale(state: Any) -> Tensor:
    second = state.state2
    dequantise = torch.ops.bitsandbytes.dequantize_blockwise.default
    blocks = dequantise(state.absmax, second.absmax, second.code, second.blocksize, torch.float32)
    return blocks + state.offset


def _of_8_bits(module: Any, x: Tensor, weight: Any, bias: Tensor | None) -> Weight | str:
    state = module.state
    if not module.training:
        return "rounds x to int8 too, in eval mode"
    held = weight if weight.CB is not None else state  # its first call moves them
    codes, scale = held.CB, held.SCB
    if state.has_fp16_weights or codes is None or scale is None or codes.dtype is not torch.int8:
        return "has a weight that is not in int8"
    if bias is not None and bias.dtype is not x.dtype:
        return f"has a bias of {bias.dtype} for an x of {x.dtype}"
    return Weight(codes, "int8", _once(scale, lambda: scale * (1 / 127)))


def _once(of: Tensor, compute: Any) -> Tensor:
    """Return what was computed of a tensor, or compute it where the tensor was written to since."""
    if of.is_inference():  # PyTorch counts no writes
        return compute()
    known = _scales.get(of)
    if known is None or known[0] != of._version:
        with torch.no_grad():
            known = (of._version, compute())
        _scales[of] = known
    return known[1]
