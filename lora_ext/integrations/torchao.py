"""torchao's int8 weights on a CPU, read as weights of codes and not called.

Nothing here imports torchao: a weight of it can only be there once it is.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ..call import Weight


def codes_of(module: nn.Module, x: Tensor) -> Weight | str | None:
    """Return the weight of an nn.Linear whose weight is torchao's Int8Tensor, or why it is called.

    The weight is read for a float32 x on a CPU where torchao computes
    x @ (codes * a scale a row).T + bias. In half dtypes torchao rounds what the codes stand for
    after the product and our kernels before it, so there the linear is called.

    Args:
        module: an nn.Linear.
        x: the input that the weight would meet.

    Returns:
        The weight; a reason in words; None where the weight is of another kind.

    """
    weight: Any = module._parameters.get("weight")
    kind = type(weight)
    if kind.__name__ != "Int8Tensor" or not kind.__module__.startswith("torchao."):
        return None
    if torch.compiler.is_compiling():
        return "has a weight of torchao's, and compiled code calls it"
    bias = module._parameters["bias"]
    half = x.dtype is not torch.float32 or torch.is_autocast_enabled("cpu")
    if not (x.is_cpu and weight.is_cpu) or half or weight.dtype is not torch.float32:
        return "has an int8 weight of torchao's, which is read in float32 on a CPU alone"
    if bias is not None and (type(bias) is not Parameter or bias.dtype is not torch.float32):
        return "has a bias that is no float32 Parameter"
    codes, scale = weight.qdata, weight.scale
    extras = ("act_quant_kwargs", "act_quant_scale", "act_pre_scale")
    plain = all(getattr(weight, name, None) is None for name in extras)
    by_rows = list(weight.block_size) == [1, codes.shape[1]] and scale.numel() == codes.shape[0]
    if not plain or not by_rows or codes.dtype is not torch.int8 or not codes.is_contiguous():
        return "has an int8 weight of torchao's that is more than codes and a scale a row"
    if scale.dtype is not torch.float32 or not _is_symmetric(weight):
        return "has an int8 weight of torchao's with zero points, or scales that are not float32"
    return Weight(codes, "int8", scale.reshape(-1))


def _is_symmetric(weight: Any) -> bool:
    point = getattr(weight, "zero_point", None)
    return point is None or not bool(point.any())
