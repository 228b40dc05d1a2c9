"""The launches of a forward, a function for each regime, and what the backward's share with them.

A regime is planned once for all calls of the same sizes, strides and dtypes: its function takes
one of them and returns another function, which takes any of them, allocates and launches.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...call import Call, LowRank, Weight
from .. import reference
from . import tiling
from .cards import Card
from .costs import Problem, decode_h_splits, decode_splits
from .decode_kernels import lora_linear_decode_kernel
from .forward_kernels import (
    lora_linear_fwd_in_loop_kernel,
    lora_linear_fwd_kernel,
    lora_shrink_kernel,
)
from .launches import Launch, base_operands, bits_of, fresh, loop_factor, split_scale, strides
from .persistent_kernels import lora_linear_fwd_persistent_kernel
from .tiling import Tile

_COUNTERS = 512  # of tiles, that decode asks at once: one at least for each thread of a program


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


class Parts(NamedTuple):
    """h before its sum: (splits, M, R) float32, rows `row` elements apart. `joined`: see Shrink."""

    splits: int
    row: int
    joined: bool


Run = Callable[[Forward], tuple[Tensor, Tensor]]
# What is left of a call when something else makes its h: that is called for the parts, once.
Rest = Callable[[Forward, Callable[[Forward], Tensor]], tuple[Tensor, Tensor]]


def in_loop(call: Forward, p: Problem, tile: Tile, card: Card) -> Run:
    """One launch: h accumulates in each tile's own loop, so x is read once."""
    M, K, N, R = p.M, p.K, p.N, p.R
    operands, options = base_operands(call.weight.T, tile)
    rounded, strides_a = loop_factor(call.A, call.x.dtype, tile)
    kernel = Launch(
        lora_linear_fwd_in_loop_kernel,
        (_tiles(M, N, tile),),
        **dict(M=M, N=N, K=K, R=R, BLOCK_R=tiling.block_r(R, tile.max_r)),
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
    return _after(Shrink(call, p, card), rest_of_two_launches, call, p, tile, card)


def persistent(call: Forward, p: Problem, tile: Tile, card: Card) -> Run:
    """Launch h, and with it, on the same SMs, programs that stay for the tiles of y."""
    shrink = Shrink(call, p, card, joined=card.joins)
    return _after(shrink, rest_of_persistent, call, p, tile, card)


def torch_base(call: Forward, p: Problem, tile: Tile, card: Card) -> Run:
    """PyTorch's own base product, h, then one pass y += scale * h @ B while y is in L2."""
    return _after(Shrink(call, p, card), rest_of_torch_base, call, p, tile, card)


def _after(
    shrink: "Shrink", plan: Callable[..., Rest], call: Forward, p: Problem, tile: Tile, card: Card
) -> Run:
    """Plan the rest of a call, after a shrink of its own."""
    rest = plan(call, p, tile, card, shrink.parts)
    return lambda call: rest(call, shrink)


def rest_of_two_launches(call: Forward, p: Problem, tile: Tile, card: Card, parts: Parts) -> Rest:
    """Plan the launch of the base product, which ends with h @ B."""
    M, N, R = p.M, p.N, p.R
    operands, options = base_operands(call.weight.T, tile)
    finish = _finish(call, p, tile, card, parts, BASE_DONE=False, **options)

    def run(call: Forward, shrink: Callable[[Forward], Tensor]) -> tuple[Tensor, Tensor]:
        y, h_out = fresh(call.x, M, N), fresh(call.x, M, R)
        h = shrink(call)
        x, w = operands(call.x, call.weight.T)
        scale, power = split_scale(call.scale, y.dtype)
        finish(x=x, w=w, bias=call.bias, b=call.B, h=h, h_out=h_out, y=y, scale=scale, power=power)
        return y, h_out

    return run


def rest_of_persistent(call: Forward, p: Problem, tile: Tile, card: Card, parts: Parts) -> Rest:
    """Plan the launch of programs that stay for the tiles of y, joined to the one before or not."""
    M, K, N, R = p.M, p.K, p.N, p.R
    operands, options = base_operands(call.weight.T, tile)
    rounded, strides_b = loop_factor(call.B, call.x.dtype, tile)
    y_box = [tile.block_m, tile.block_n // 2]
    joined = card.join_options(R) if parts.joined else {"DEPENDENT": False}
    kernel = Launch(
        lora_linear_fwd_persistent_kernel,
        (min(card.sms, _tiles(M, N, tile)),),
        **dict(M=M, N=N, K=K, R=R, ROW=parts.row, SPLITS=parts.splits, PROGRAMS=card.sms),
        BLOCK_R=tiling.persistent_r(card, R),
        **strides("stride_b", "rn", strides_b),
        **(card.product_options(p.kind, call.x.dtype) | joined),
        **options,
    )

    def run(call: Forward, shrink: Callable[[Forward], Tensor]) -> tuple[Tensor, Tensor]:
        y, h_out = fresh(call.x, M, N), fresh(call.x, M, R)
        b = rounded(call.B)  # not between the launches: the second joins the one before it
        h = shrink(call)
        x, w = operands(call.x, call.weight.T)
        scale, power = split_scale(call.scale, y.dtype)
        kernel(
            x=x, w=w, bias=call.bias, b=b, h=h, h_out=h_out,
            y=TensorDescriptor.from_tensor(y, y_box), scale=scale, power=power,
        )  # fmt: skip
        return y, h_out

    return run


def rest_of_torch_base(call: Forward, p: Problem, tile: Tile, card: Card, parts: Parts) -> Rest:
    """Plan PyTorch's base product, and the pass y += scale * h @ B."""
    M, R = p.M, p.R
    finish = _finish(call, p, tile, card, parts, BASE_DONE=True, **tile.options())

    def run(call: Forward, shrink: Callable[[Forward], Tensor]) -> tuple[Tensor, Tensor]:
        y, h_out = F.linear(call.x, call.weight, call.bias), fresh(call.x, M, R)
        h = shrink(call)
        scale, power = split_scale(call.scale, y.dtype)
        finish(x=y, w=y, bias=None, b=call.B, h=h, h_out=h_out, y=y, scale=scale, power=power)
        return y, h_out

    return run


def decode(call: Forward, p: Problem, tile: Tile, card: Card) -> Run:
    """For few rows, one launch: the sums of y and h over K in parts, which the last to come adds.

    Its counters are cleared before each launch, by a fill. Kept from call to call, two streams
    would share them, and torch.compile's CUDA graphs refuse memory of theirs that outlives a call.
    """
    M, K, N, R = p.M, p.K, p.N, p.R
    splits, h_splits = decode_splits(p, tile, card), decode_h_splits(p, tile, card)
    tiles_m, tiles_n = triton.cdiv(M, tile.block_m), triton.cdiv(N, tile.block_n)
    # 64 rows by 64 ranks of float32 next to the sums spill on sm_80 and sm_86.
    block_r = tiling.block_r(R, tiling.EPILOGUE_R if tile.block_m >= 64 else tiling.MAX_BLOCK_R)
    rounded, strides_a = loop_factor(call.A, call.x.dtype, tile)
    kernel = Launch(
        lora_linear_decode_kernel,
        (tiles_m * (triton.cdiv(R, block_r) * h_splits + tiles_n * splits),),
        **dict(M=M, N=N, K=K, R=R, splits=splits, h_splits=h_splits, COUNTERS=_COUNTERS),
        **dict(BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, BLOCK_R=block_r),
        **dict(num_warps=tile.warps, num_stages=tile.stages),
        **_base_strides(call),
        **strides("STRIDE_A", "KR", strides_a),
        # Of four blocks an SM, which ptxas aims at with 60 KB, Triton 3.6 spills 8 bytes.
        **card.product_options(p.kind, call.A.dtype, all_registers=True),
    )

    def run(call: Forward) -> tuple[Tensor, Tensor]:
        x, device = call.x, call.x.device
        y, h = fresh(x, M, N), fresh(x, M, R)
        scale, power = split_scale(call.scale, y.dtype)
        kernel(
            x=x, w=call.weight.T, bias=call.bias, a=rounded(call.A), b=call.B, keep=call.keep,
            arrived=torch.zeros(tiles_m * (1 + tiles_n), dtype=torch.int32, device=device),
            y_parts=torch.empty((splits, M, N), dtype=torch.float32, device=device),
            h_parts=torch.empty((h_splits + 1, M, R), dtype=torch.float32, device=device),
            h_out=h, y=y, scale=scale, power=power,
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

    Splits K until there is a program for each SM, in parts of at least 4 steps. `joined`: the next
    launch may start while it runs.
    """

    def __init__(self, call: Forward, p: Problem, card: Card, *, joined: bool = False):
        M, K, R = p.M, p.K, p.R
        tile = tiling.shrink_tile(card, p.kind, M, joined=joined)
        block_r = tiling.block_r(R)
        tiles_m, blocks_r = triton.cdiv(M, tile.block_m), triton.cdiv(R, block_r)
        self.M, self.R = M, R
        self.rounded, strides_a = loop_factor(call.A, call.x.dtype, tile)
        self.splits = tiling.splits(card, tiles_m * blocks_r, K, tile.block_k)
        self.parts = Parts(self.splits, R, joined)
        self.kernel = Launch(
            lora_shrink_kernel,
            (tiles_m, blocks_r, self.splits),
            **dict(M=M, K=K, R=R, splits=self.splits, JOINED=joined),
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
    call: Forward, p: Problem, tile: Tile, card: Card, parts: Parts, **options: Any
) -> Launch:
    """Plan the launch that fills y, or adds to it (BASE_DONE), from parts of h."""
    M, K, N, R = p.M, p.K, p.N, p.R
    return Launch(
        lora_linear_fwd_kernel,
        (_tiles(M, N, tile),),
        **dict(M=M, N=N, K=K, R=R, ROW=parts.row, splits=parts.splits),
        BLOCK_R=tiling.block_r(R, tiling.EPILOGUE_R),
        **_base_strides(call),
        **card.product_options(p.kind, call.B.dtype),
        **options,
    )


def _tiles(M: int, N: int, tile: Tile) -> int:
    return triton.cdiv(M, tile.block_m) * triton.cdiv(N, tile.block_n)


def _base_strides(call: Forward) -> dict[str, int]:
    w, b = call.weight.T.stride(), call.B.stride()
    of_w, of_b = strides("stride_w", "kn", w), strides("stride_b", "rn", b)
    return strides("stride_x", "mk", call.x.stride()) | of_w | of_b
