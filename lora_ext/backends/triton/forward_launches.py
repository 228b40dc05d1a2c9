"""The launches of a forward, a function for each regime, and what the backward's share with them.

A regime is planned once for all calls of the same sizes, strides and dtypes: its function takes
one of them and returns another function, which takes any of them, allocates and launches.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...call import Call, LowRank, Weight
from .. import reference
from . import cards
from .cards import Card, Tile
from .forward_kernels import (
    lora_linear_decode_kernel,
    lora_linear_decode_sum_kernel,
    lora_linear_fwd_in_loop_kernel,
    lora_linear_fwd_kernel,
    lora_shrink_kernel,
)
from .regimes import Problem, decode_splits

_SUM_N = 128  # columns of y that a program of decode's second launch sums


class Forward(NamedTuple):
    """One forward to run; none of M, N and K is zero.

    x (M, K), weight (N, K), bias (N,) with unit stride or None, A (K, R), B (R, N); keep, dropout's
    bits in whole words, see tuning.words_of, or None.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    scale: float
    keep: Tensor | None


Run = Callable[[Forward], tuple[Tensor, Tensor]]


def in_loop(call: Forward, p: Problem, tile: Tile, card: Card) -> Run:
    """One launch: h accumulates in each tile's own loop, so x is read once."""
    M, K, N, R = p.M, p.K, p.N, p.R
    operands, options = base_operands(call.weight.T, tile)
    rounded, strides_a = loop_factor(call.A, call.x.dtype, tile)
    kernel = Launch(
        lora_linear_fwd_in_loop_kernel,
        (_tiles(M, N, tile),),
        **dict(M=M, N=N, K=K, R=R, BLOCK_R=cards.block_r(R, tile.max_r)),
        **_base_strides(call),
        **strides("STRIDE_A", "KR", strides_a),
        **card.product_options(p.kind, call.B.dtype, p.masked),
        **options,
    )

    def run(call: Forward) -> tuple[Tensor, Tensor]:
        y, h = fresh(call.x, M, N), fresh(call.x, M, R)
        x, w = operands(call.x, call.weight.T)
        scale, power = split_scale(call.scale, y.dtype)
        kernel(
            x=x, w=w, bias=call.bias, a=rounded(call.A), b=call.B, keep=call.keep, h_out=h,
            y=y, scale=scale, power=power,
        )  # fmt: skip
        return y, h

    return run


def two_launches(call: Forward, p: Problem, tile: Tile, card: Card) -> Run:
    """Launch h, split over K where rows are few; then the base product, which ends with h @ B."""
    M, N, R = p.M, p.N, p.R
    shrink = Shrink(call, p, card)
    operands, options = base_operands(call.weight.T, tile)
    finish = _finish(call, p, tile, card, shrink.splits, BASE_DONE=False, **options)

    def run(call: Forward) -> tuple[Tensor, Tensor]:
        y, h = fresh(call.x, M, N), fresh(call.x, M, R)
        parts = shrink(call)
        x, w = operands(call.x, call.weight.T)
        scale, power = split_scale(call.scale, y.dtype)
        finish(x=x, w=w, bias=call.bias, b=call.B, h=parts, h_out=h, y=y, scale=scale, power=power)
        return y, h

    return run


def torch_base(call: Forward, p: Problem, tile: Tile, card: Card) -> Run:
    """PyTorch's own base product, h, then one pass y += scale * h @ B while y is in L2."""
    M, R = p.M, p.R
    shrink = Shrink(call, p, card)
    finish = _finish(call, p, tile, card, shrink.splits, BASE_DONE=True, **tile.options())

    def run(call: Forward) -> tuple[Tensor, Tensor]:
        y, h = F.linear(call.x, call.weight, call.bias), fresh(call.x, M, R)
        parts = shrink(call)
        scale, power = split_scale(call.scale, y.dtype)
        finish(x=y, w=y, bias=None, b=call.B, h=parts, h_out=h, y=y, scale=scale, power=power)
        return y, h

    return run


def decode(call: Forward, p: Problem, tile: Tile, card: Card) -> Run:
    """For few rows: the base product and h split over K, then their parts summed in order."""
    M, K, N, R = p.M, p.K, p.N, p.R
    splits = decode_splits(p, tile, card)
    tiles_m, block_r = triton.cdiv(M, tile.block_m), cards.block_r(R)
    rounded, strides_a = loop_factor(call.A, call.x.dtype, tile)
    # A tile of 64 rows fills the shared memory of an SM: registers are there for the asking.
    precision = card.product_options(p.kind, call.A.dtype, p.masked or tile.block_m >= 64)
    products = Launch(
        lora_linear_decode_kernel,
        (tiles_m, triton.cdiv(N, tile.block_n) + triton.cdiv(R, block_r), splits),
        **dict(M=M, N=N, K=K, R=R, splits=splits),
        **dict(BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, BLOCK_R=block_r),
        **dict(num_warps=tile.warps, num_stages=tile.stages),
        **strides("stride_x", "mk", call.x.stride()),
        **strides("stride_w", "kn", call.weight.T.stride()),
        **strides("STRIDE_A", "KR", strides_a),
        **precision,
    )
    sums = Launch(
        lora_linear_decode_sum_kernel,
        (tiles_m, triton.cdiv(N, _SUM_N)),
        **dict(M=M, N=N, R=R, splits=splits),
        **dict(BLOCK_M=tile.block_m, BLOCK_N=_SUM_N, BLOCK_R=block_r, num_warps=4, num_stages=1),
        **strides("stride_b", "rn", call.B.stride()),
        **precision,
    )

    def run(call: Forward) -> tuple[Tensor, Tensor]:
        x = call.x
        y, h = fresh(x, M, N), fresh(x, M, R)
        y_parts = torch.empty(splits, M, N, dtype=torch.float32, device=x.device)
        h_parts = torch.empty(splits, M, R, dtype=torch.float32, device=x.device)
        products(
            x=x, w=call.weight.T, a=rounded(call.A), keep=call.keep,
            y_parts=y_parts, h_parts=h_parts,
        )  # fmt: skip
        scale, power = split_scale(call.scale, y.dtype)
        sums(
            y_parts=y_parts, h_parts=h_parts, bias=call.bias, b=call.B, h_out=h, y=y,
            scale=scale, power=power,
        )  # fmt: skip
        return y, h

    return run


def addmm(call: Forward, p: Problem, tile: Tile, card: Card) -> Run:
    """PyTorch's products, the low-rank one added to y by the second: few microseconds of host."""

    def run(call: Forward) -> tuple[Tensor, Tensor]:
        h = call.x @ call.A.to(call.x.dtype)
        y = F.linear(call.x, call.weight, call.bias)
        return y.addmm_(h, call.B.to(y.dtype), alpha=reference.addmm_factor(call.scale)), h

    return run


def plain(call: Forward, p: Problem, tile: Tile, card: Card) -> Run:
    """PyTorch's own operators, as backend reference has them."""

    def run(call: Forward) -> tuple[Tensor, Tensor]:
        low = LowRank(call.A, call.B, call.scale, bits_of(call.keep))
        return reference.forward(Call(call.x, Weight(call.weight), call.bias, low))

    return run


class Shrink:
    """h = (keep * x) @ A in float32, planned: (splits, M, R), to be summed by what reads it.

    Splits K until there is a program for each SM, in parts of at least 4 steps.
    """

    def __init__(self, call: Forward, p: Problem, card: Card):
        M, K, R = p.M, p.K, p.R
        tile, block_r = cards.shrink_tile(card, p.kind, M), cards.block_r(R)
        tiles_m, blocks_r = triton.cdiv(M, tile.block_m), triton.cdiv(R, block_r)
        self.M, self.R = M, R
        self.rounded, strides_a = loop_factor(call.A, call.x.dtype, tile)
        self.splits = cards.splits(card, tiles_m * blocks_r, K, tile.block_k)
        self.kernel = Launch(
            lora_shrink_kernel,
            (tiles_m, blocks_r, self.splits),
            **dict(M=M, K=K, R=R, splits=self.splits),
            **dict(BLOCK_M=tile.block_m, BLOCK_K=tile.block_k, BLOCK_R=block_r),
            **dict(num_warps=tile.warps, num_stages=tile.stages),
            **strides("stride_x", "mk", call.x.stride()),
            **strides("STRIDE_A", "KR", strides_a),
            **card.product_options(p.kind, call.A.dtype, p.masked),
        )

    def __call__(self, call: Forward) -> Tensor:
        """Launch it for a call of the planned sizes."""
        x = call.x
        parts = torch.empty(self.splits, self.M, self.R, dtype=torch.float32, device=x.device)
        self.kernel(x=x, a=self.rounded(call.A), keep=call.keep, h=parts)
        return parts


def _finish(
    call: Forward, p: Problem, tile: Tile, card: Card, splits: int, **options: Any
) -> "Launch":
    """Plan the launch that fills y, or adds to it (BASE_DONE), from `splits` parts of h."""
    M, K, N, R = p.M, p.K, p.N, p.R
    return Launch(
        lora_linear_fwd_kernel,
        (_tiles(M, N, tile),),
        **dict(M=M, N=N, K=K, R=R, splits=splits, BLOCK_R=cards.block_r(R, cards.EPILOGUE_R)),
        **_base_strides(call),
        **card.product_options(p.kind, call.B.dtype),
        **options,
    )


def fresh(like: Tensor, *shape: int) -> Tensor:
    """Return memory of a tensor's dtype and device: `like.new_empty` takes three times as long."""
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def _tiles(M: int, N: int, tile: Tile) -> int:
    return triton.cdiv(M, tile.block_m) * triton.cdiv(N, tile.block_n)


def _base_strides(call: Forward) -> dict[str, int]:
    w, b = (
        strides("stride_w", "kn", call.weight.T.stride()),
        strides("stride_b", "rn", call.B.stride()),
    )
    return strides("stride_x", "mk", call.x.stride()) | w | b


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
