"""What the launches of a forward and of a backward share: operands, options, the launch itself."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .tiling import Tile


def fresh(like: Tensor, *shape: int) -> Tensor:
    """Return memory of a tensor's dtype and device: `like.new_empty` takes three times as long."""
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def launch(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
    """Launch a kernel: the one place all launches pass, for the tests to look in."""
    kernel[grid](**arguments)


class Launch:
    """A kernel and everything of its launch but the tensors and the factors."""

    def __init__(self, kernel: Any, grid: tuple[int, ...], **fixed: Any):
        self.kernel, self.grid, self.fixed = kernel, grid, fixed

    def __call__(self, **arguments: Any) -> None:
        """Launch it with the rest of its arguments."""
        launch(self.kernel, self.grid, arguments | self.fixed)


def strides(prefix: str, dims: str, both: Sequence[int] | None) -> dict[str, int]:
    """Return strides under the kernels' names: "stride_x", "mk" for stride_xm and stride_xk."""
    return {prefix + dim: stride for dim, stride in zip(dims, both or (0, 0), strict=True)}


def base_operands(w: Tensor, tile: Tile) -> tuple[Callable[[Tensor, Tensor], Any], dict[str, Any]]:
    """Return what turns x and w (K, N) into a base product's operands, and its options."""
    if not tile.descriptors:
        return lambda x, w: (x, w), tile.options()
    x_box, transposed = [tile.block_m, tile.block_k], w.stride(1) != 1
    w_box = [tile.block_n, tile.block_k] if transposed else [tile.block_k, tile.block_n]

    def described(x: Tensor, w: Tensor) -> tuple[TensorDescriptor, TensorDescriptor]:
        w = w.T if transposed else w
        return TensorDescriptor.from_tensor(x, x_box), TensorDescriptor.from_tensor(w, w_box)

    return described, tile.options(w_transposed=transposed)


def loop_factor(
    factor: Tensor, dtype: torch.dtype, tile: Tile
) -> tuple[Callable[[Tensor], Tensor], Sequence[int]]:
    """Return what makes A or B an operand of the products in a loop, and its strides then.

    Matrix instructions of 64 rows read it from shared memory, in x's dtype. Rounded in the loop, a
    float32 one would keep each step waiting for the one before: it is rounded once, by PyTorch.
    """
    if factor.dtype == dtype or tile.block_m < 64:
        return lambda factor: factor, factor.stride()
    return lambda factor: factor.to(dtype), factor.to(dtype).stride()


def split_scale(scale: float, dtype: torch.dtype) -> tuple[float, float]:
    """Return (factor of h, power of two for the rest), see common.add_low_rank."""
    if dtype != torch.float16:
        return scale, 1.0
    mantissa, exponent = math.frexp(scale)
    return mantissa, math.ldexp(1.0, exponent)


def bits_of(keep: Tensor | None) -> Tensor | None:
    """Return the bytes that tuning.words_of took."""
    return None if keep is None else keep.view(torch.uint8)
