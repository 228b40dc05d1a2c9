"""From tensors to launches: precision, descriptors, the steps that several regimes share."""

import math
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import configs
from .cards import Card
from .configs import Tile
from .forward import lora_shrink_kernel

_MAX_BOX = 2**31 - 1  # a descriptor's sizes and coordinates are 32-bit


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a kernel: the one place all launches pass, for the tests to look in."""
    kernel[grid](*args, **options)


def kind_of(dtype: torch.dtype) -> str:
    """Return the kind of product: half, tf32 (only where PyTorch's own may use it), or fp32."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "fp32"


def product_options(kind: str, A: Tensor, card: Card) -> dict[str, Any]:
    """Return the options by which a kernel multiplies: tl.dot's input_precision, and registers.

    Halves are exact in either precision. Around float32 adapters, and on sm_100, ptxas would spill
    a few bytes of its own accord for one block more an SM (8 bytes at 64 registers): there it may
    take them all.
    """
    options: dict[str, Any] = {"PRECISION": "ieee" if kind == "fp32" else "tf32"}
    wanting = A.dtype == torch.float32 or card.family == "sm_100"
    if wanting and card.family != "gfx942":
        options["maxnreg"] = 255
    return options


def split_alpha(alpha: float, dtype: torch.dtype) -> tuple[float, float]:
    """Return (factor of h, power of two for the rest), see common.add_low_rank."""
    if dtype != torch.float16:
        return alpha, 1.0
    mantissa, exponent = math.frexp(alpha)
    return mantissa, math.ldexp(1.0, exponent)


def describable(matrix: Tensor) -> bool:
    """Whether a tensor descriptor can describe a matrix: unit stride inside, the rest 16-byte."""
    rows, cols = matrix.shape
    row_bytes = matrix.stride(0) * matrix.element_size()
    return (
        matrix.stride(1) == 1
        and row_bytes % 16 == 0
        and cols <= matrix.stride(0)
        and max(rows, cols) <= _MAX_BOX
        and matrix.data_ptr() % 16 == 0
    )


def describable_product(x: Tensor, w: Tensor) -> bool:
    """Whether descriptors can describe both operands of x @ w, w or its transpose."""
    return describable(x) and (describable(w) or describable(w.T))


def base_operands(x: Tensor, w: Tensor, tile: Tile) -> tuple[Any, Any, dict[str, Any]]:
    """Return x and w as the kernels take them under `tile`, and the options that go with it."""
    transposed = False
    if tile.descriptors:
        transposed = not describable(w)
        x = TensorDescriptor.from_tensor(x, [tile.block_m, tile.block_k])
        if transposed:
            w = TensorDescriptor.from_tensor(w.T, [tile.block_n, tile.block_k])
        else:
            w = TensorDescriptor.from_tensor(w, [tile.block_k, tile.block_n])
    return x, w, tile_options(tile, transposed)


def tile_options(tile: Tile, transposed: bool = False) -> dict[str, Any]:
    """Return the options by which every kernel around a base product gets its tile.

    `transposed`: w is a descriptor of its transpose.
    """
    return {
        "DESCRIPTORS": tile.descriptors,
        "W_TRANSPOSED": transposed,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": 8,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def rank_options(R: int, A: Tensor | None) -> dict[str, int]:
    """Return the constants by which a kernel knows the rank and, if it reads A, how that lies."""
    row, column = (0, 0) if A is None else A.stride()
    return {"R": R, "STRIDE_AK": row, "STRIDE_AR": column}


def shrink(x: Tensor, A: Tensor, kind: str, card: Card) -> Tensor:
    """Return x @ A in float32 as (splits, M, R), to be summed by what reads it.

    Splits K until there is a program for each SM, in parts of at least 4 steps.
    """
    (M, K), R = x.shape, A.shape[1]
    tile = configs.shrink_tile(card, kind, M)
    rank_block = configs.block_r(R)
    tiles = triton.cdiv(M, tile.block_m) * triton.cdiv(R, rank_block)
    splits = configs.splits(card, tiles, K, tile.block_k)
    parts = torch.empty(splits, M, R, dtype=torch.float32, device=x.device)
    launch(
        lora_shrink_kernel,
        (triton.cdiv(M, tile.block_m), triton.cdiv(R, rank_block), splits),
        x, A, parts, M, K, splits, *x.stride(),
        **rank_options(R, A), **product_options(kind, A, card),
        BLOCK_M=tile.block_m, BLOCK_K=tile.block_k, BLOCK_R=rank_block,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return parts
