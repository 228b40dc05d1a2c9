"""Linears whose weight is float8 with a scale a block: transformers' FineGrainedFP8.

Its product needs a GPU, and in some versions loses the gradient of x. Here y is upstream's own
where that runs; on a CPU, and in every backward, the product is that of the dequantised weight.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FP8 = ("transformers.integrations.finegrained_fp8", "FP8Linear")


def is_fp8(module: nn.Module) -> bool:
    """Whether a module is a linear of FineGrainedFP8 whose weight is quantised."""
    kind = type(module)
    weight = module._parameters.get("weight")
    return (
        (kind.__module__, kind.__name__) == _FP8
        and weight is not None
        and weight.dtype == torch.float8_e4m3fn
    )


def product(module: Any, x: Tensor) -> Tensor:
    """Return x @ weight.T + bias for a linear that `is_fp8`, not differentiable."""
    if x.is_cuda:
        return module.forward(x)
    return F.linear(x, weight_of(module, parts_of(module), x.dtype), module.bias)


def parts_of(module: Any) -> tuple[Tensor, Tensor]:
    """Return the tensors that a linear that `is_fp8` has for its weight."""
    return module.weight, module.weight_scale_inv


def weight_of(module: Any, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the weight that `parts_of` such a linear stand for, (N, K) of a dtype."""
    return dequantised(parts[0], parts[1], module.block_size, dtype)


def dequantised(
    weight: Tensor, scale: Tensor, block: tuple[int, int] | None, dtype: torch.dtype
) -> Tensor:
    """Return the weight that float8 values and their scales stand for, (N, K) of a dtype.

    Args:
        weight: (N, K) float8.
        scale: a factor for each block, (ceil(N / block[0]), ceil(K / block[1])); of no dimension
            where `block` is None.
        block: rows and columns of a block.
        dtype: of the result; products are taken in float32.

    """
    if block is None:
        return (weight.float() * scale.float()).to(dtype)
    N, K = weight.shape
    result = torch.empty(N, K, dtype=dtype, device=weight.device)
    columns = scale.float().repeat_interleave(block[1], 1)[:, :K]
    for i, row in enumerate(columns):  # by rows of blocks: no second weight in float32
        some = slice(i * block[0], (i + 1) * block[0])
        result[some] = weight[some].float() * row
    return result
