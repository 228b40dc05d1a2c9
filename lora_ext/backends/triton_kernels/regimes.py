"""The named ways to run one forward: which kernels, in which order.

in_loop       one launch; each tile accumulates its own h beside the base product
two_launches  h = x @ A, split over K where rows are few; then the base product with h at hand
decode        two launches with the base product split over K too, for M <= 64
torch_base    F.linear, h = x @ A, then y += alpha * h @ B in place while y is in L2
h_first       one persistent launch, h before the rest; by name only, see h_first.py
plain         backend reference, see choice.PLAIN
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from .. import reference
from . import configs
from .cards import Card
from .choice import decode_splits
from .configs import Tile
from .cost_model import Problem
from .decode import lora_linear_decode_kernel, lora_linear_decode_sum_kernel
from .forward import lora_linear_fwd_in_loop_kernel, lora_linear_fwd_kernel
from .h_first import lora_linear_h_first_kernel
from .launch import (
    base_operands,
    kind_of,
    launch,
    product_options,
    rank_options,
    shrink,
    split_alpha,
    tile_options,
)


@dataclass
class Forward:
    """One forward to run: x (M, K), weight (N, K), bias (N,) or None, A (K, R), B (R, N).

    None of M, N, K may be zero.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    alpha: float
    card: Card
    kind: str = field(init=False)

    def __post_init__(self) -> None:
        self.M, self.K = self.x.shape
        self.N, self.R = self.weight.shape[0], self.A.shape[1]
        self.kind = kind_of(self.x.dtype)
        self.w = self.weight.T  # (K, N), a view
        if self.bias is not None:
            self.bias = self.bias.contiguous()

    def product_options(self) -> dict[str, Any]:
        """Return launch.product_options of this call."""
        return product_options(self.kind, self.A, self.card)

    def results(self) -> tuple[Tensor, Tensor]:
        """Return y (M, N) and h (M, R), to be filled."""
        return self.x.new_empty(self.M, self.N), self.x.new_empty(self.M, self.R)


def in_loop(call: Forward, tile: Tile) -> tuple[Tensor, Tensor]:
    """Return y and h in one launch: h accumulates in each tile's own loop, x is read once."""
    y, h = call.results()
    x, w, options = base_operands(call.x, call.w, tile)
    launch(
        lora_linear_fwd_in_loop_kernel,
        (triton.cdiv(call.M, tile.block_m) * triton.cdiv(call.N, tile.block_n),),
        x, w, call.bias, call.A, call.B, h, y, *split_alpha(call.alpha, y.dtype),
        call.M, call.N, call.K, *call.x.stride(), *call.w.stride(), *call.B.stride(),
        **rank_options(call.R, call.A), HAS_BIAS=call.bias is not None,
        BLOCK_R=configs.block_r(call.R, tile.max_r),
        **call.product_options(), **options,
    )  # fmt: skip
    return y, h


def two_launches(call: Forward, tile: Tile) -> tuple[Tensor, Tensor]:
    """Return y and h in two launches: h, then the base product that ends with alpha * h @ B."""
    y, h = call.results()
    h_parts = shrink(call.x, call.A, call.kind, call.card)
    x, w, options = base_operands(call.x, call.w, tile)
    _finish(call, tile, x, w, call.bias, h_parts, h, y, BASE_DONE=False, **options)
    return y, h


def torch_base(call: Forward, tile: Tile) -> tuple[Tensor, Tensor]:
    """Return y and h with PyTorch's own base product, then one pass y += alpha * h @ B."""
    y = F.linear(call.x, call.weight, call.bias)
    h = call.x.new_empty(call.M, call.R)
    h_parts = shrink(call.x, call.A, call.kind, call.card)
    options = tile_options(tile)
    _finish(call, tile, y, y, None, h_parts, h, y, BASE_DONE=True, **options)
    return y, h


def _finish(call, tile, x, w, bias, h_parts, h, y, **options) -> None:
    """Fill y (or add to it, BASE_DONE) with h as (splits, M, R) parts, and h with their sum."""
    launch(
        lora_linear_fwd_kernel,
        (triton.cdiv(call.M, tile.block_m) * triton.cdiv(call.N, tile.block_n),),
        x, w, bias, call.B, h_parts, h, y, *split_alpha(call.alpha, y.dtype),
        call.M, call.N, call.K, len(h_parts), *call.x.stride(), *call.w.stride(), *call.B.stride(),
        R=call.R, HAS_BIAS=bias is not None,
        BLOCK_R=configs.block_r(call.R, configs.EPILOGUE_R),
        **call.product_options(), **options,
    )  # fmt: skip


def decode(call: Forward, tile: Tile) -> tuple[Tensor, Tensor]:
    """Return y and h for few rows: K split over programs, the parts summed in a fixed order."""
    M, N, K, R = call.M, call.N, call.K, call.R
    y, h = call.results()
    rank_block = configs.block_r(R)
    tiles_m, tiles_n = triton.cdiv(M, tile.block_m), triton.cdiv(N, tile.block_n)
    p = Problem(
        M, K, N, R, call.kind, y.element_size(), call.A.element_size(), call.bias is not None
    )
    splits = decode_splits(p, tile, call.card)
    parts = torch.empty(splits, M, N, dtype=torch.float32, device=y.device)
    h_parts = torch.empty(splits, M, R, dtype=torch.float32, device=y.device)
    launch(
        lora_linear_decode_kernel,
        (tiles_m, tiles_n + triton.cdiv(R, rank_block), splits),
        call.x, call.w, call.A, parts, h_parts, M, N, K, splits,
        *call.x.stride(), *call.w.stride(),
        **rank_options(call.R, call.A), **call.product_options(),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, BLOCK_R=rank_block,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    launch(
        lora_linear_decode_sum_kernel,
        (tiles_m, triton.cdiv(N, 128)),
        parts, h_parts, call.bias, call.B, h, y, *split_alpha(call.alpha, y.dtype), M, N, splits,
        *call.B.stride(), R=R, HAS_BIAS=call.bias is not None, **call.product_options(),
        BLOCK_M=tile.block_m, BLOCK_N=128, BLOCK_R=rank_block, num_warps=4, num_stages=1,
    )  # fmt: skip
    return y, h


def h_first(call: Forward, tile: Tile) -> tuple[Tensor, Tensor]:
    """Return y and h in one persistent launch, a program an SM: h's row blocks, then y's tiles."""
    y, h = call.results()
    x, w, options = base_operands(call.x, call.w, tile)
    tiles_m, tiles_n = triton.cdiv(call.M, tile.block_m), triton.cdiv(call.N, tile.block_n)
    # The interpreter runs programs one after the other: a second one would never be waited for.
    programs = 1 if call.card.interpreted else min(call.card.sms, tiles_m * tiles_n)
    ready = torch.zeros(tiles_m, dtype=torch.int32, device=y.device)
    launch(
        lora_linear_h_first_kernel,
        (programs,),
        x, w, call.bias, call.A, call.B, h, ready, y, *split_alpha(call.alpha, y.dtype),
        call.M, call.N, call.K, *call.x.stride(), *call.w.stride(), *call.B.stride(),
        **rank_options(call.R, call.A), HAS_BIAS=call.bias is not None,
        BLOCK_R=configs.block_r(call.R), **call.product_options(), **options,
    )  # fmt: skip
    return y, h


def plain(call: Forward, tile: Tile) -> tuple[Tensor, Tensor]:
    """Return y and h by PyTorch's own operators."""
    return reference.forward(call.x, call.weight, call.bias, call.A, call.B, call.alpha)


FORWARD = {f.__name__: f for f in (in_loop, two_launches, decode, torch_base, h_first, plain)}
