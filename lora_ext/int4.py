"""Linears whose weight is int4 in the layout of PyTorch's own CPU product.

torchao makes them by `PrototypeInt4WeightOnlyConfig`. That product has no derivative, so every
backward takes the dequantised weight's. Where a code is in the packed bytes depends on the
instruction set, so it is asked of PyTorch's packing itself.

Nothing here imports torchao: a weight of it can only be there once it is.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def is_int4(module: nn.Module) -> bool:
    """Whether a module is an nn.Linear over such a weight, whose x is not rounded too."""
    weight: Any = module._parameters.get("weight")
    kind = type(weight)
    named = kind.__name__ == "Int4OpaqueTensor" and kind.__module__.startswith("torchao.")
    return type(module) is nn.Linear and named and weight.act_mapping_type is None


def product(module: Any, x: Tensor) -> Tensor:
    """Return x @ weight.T + bias for a linear that `is_int4`: torchao's, not differentiable."""
    return module.forward(x)


def parts_of(module: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the tensors that a linear that `is_int4` has for its weight."""
    weight = module.weight
    return weight.qdata, weight.scale_and_zero, weight.act_pre_scale


def weight_of(module: Any, parts: Sequence[Any], dtype: torch.dtype) -> Tensor:
    """Return the weight that `parts_of` such a linear stand for, (N, K) of a dtype.

    (code - 8) * scale + zero, by groups of a row, in float32. It is (K, N) in memory.
    """
    data, groups, before = parts  # (N, K / 2), (K / group, N, 2), a factor of x
    (N, K), packed = (len(data), 2 * data.shape[1]), data.reshape(-1)
    scale, zero = (groups[:, None, :, i].float() for i in (0, 1))
    result = torch.empty(K, N, dtype=dtype, device="cpu")
    rows = rows_together()
    for first in range(0, N, rows):  # so many rows of the weight are column after column in memory
        some = slice(first, min(first + rows, N))
        order = _order(some.stop - first)
        codes = _nibbles(packed[first * K // 2 : some.stop * K // 2]).view(K, -1)[:, order]
        part = codes.view(len(scale), -1, len(order)).float().sub_(8)
        part.mul_(scale[..., some]).add_(zero[..., some])
        result[:, some] = part.view(K, -1)
    if before is not None:
        result *= torch.as_tensor(before).reshape(-1, 1)
    return result.T


@functools.cache
def rows_together() -> int:
    """Return how many rows PyTorch's packing lays out together: 64 on AVX-512, else 32."""
    two, four = _places(128, 2), _places(128, 4)
    return int((two[:, 0] == four[:, 0]).sum())  # a later block begins elsewhere


@functools.cache
def _order(rows: int) -> Tensor:
    """Return in which place of a packed column the code of each row is."""
    return _places(rows, 2)[:, 0].contiguous()


def _places(N: int, K: int) -> Tensor:
    """Return where PyTorch's packing puts each code, (N, K), by packing the digits of numbers."""
    number = torch.arange(N * K, device="cpu").view(N, K)
    found = torch.zeros(N * K, dtype=torch.int64, device="cpu")
    for shift in (0, 4, 8):
        digit = (number >> shift & 15).int()
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(digit, 1)
        found += _nibbles(packed.flatten()).long() << shift
    return torch.argsort(found).view(N, K)


def _nibbles(packed: Tensor) -> Tensor:
    """Return two codes a byte, the lower half first."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten()
