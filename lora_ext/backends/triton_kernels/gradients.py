"""The backward: which kernels, in which order, for the gradients that `needs` asks for.

two_launches  (i) t = dy @ B.T and dB's parts; (ii) dx with t at hand, dA, and dB's sum
torch_base    dx = dy @ weight by PyTorch between the two, (ii) then adds alpha * t @ A.T to it
plain         backend reference, see choice.PLAIN
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

from .. import reference
from . import configs
from .backward import lora_linear_bwd_dx_kernel, lora_linear_bwd_dy_kernel
from .cards import Card
from .configs import Tile
from .launch import (
    base_operands,
    kind_of,
    launch,
    product_options,
    rank_options,
    split_alpha,
    tile_options,
)

_SUM_PARTS, _SUM_N = 16, 256


@dataclass
class Backward:
    """One backward to run; what `needs` (dx, dweight, dbias, dA, dB) does not ask for is not read.

    dy (M, N), x (M, K), weight (N, K), A (K, R), B (R, N), h (M, R). None of M, N, K may be zero.
    """

    dy: Tensor
    x: Tensor
    weight: Tensor
    A: Tensor
    B: Tensor
    h: Tensor
    alpha: float
    needs: tuple[bool, ...]
    card: Card
    kind: str = field(init=False)

    def __post_init__(self) -> None:
        self.need_dx, _, _, self.need_dA, self.need_dB = self.needs
        self.M, self.N = self.dy.shape
        self.K = self.weight.shape[1] if self.need_dx else self.x.shape[-1]
        self.R = self.B.shape[0] if self.need_dx or self.need_dA else self.h.shape[-1]
        self.kind = kind_of(self.dy.dtype)
        if self.need_dB:
            self.h = self.h.contiguous()


def two_launches(call: Backward, tile: Tile) -> tuple[Tensor | None, ...]:
    """Return (dx, dA, dB) in two launches; in one, or none, where fewer are needed."""
    dx = call.dy.new_empty(call.M, call.K) if call.need_dx else None
    t, dB_parts = _pass_over_dy(call)
    dy, w, options = None, None, tile_options(tile)
    if call.need_dx:
        dy, w, options = base_operands(call.dy, call.weight, tile)
    return _finish(call, tile, dy, w, t, dB_parts, dx, BASE_DONE=False, **options)


def torch_base(call: Backward, tile: Tile) -> tuple[Tensor | None, ...]:
    """Return (dx, dA, dB) with dx's base product by PyTorch."""
    t, dB_parts = _pass_over_dy(call)
    dx = call.dy @ call.weight if call.need_dx else None
    options = tile_options(tile)
    return _finish(call, tile, None, None, t, dB_parts, dx, BASE_DONE=True, **options)


def plain(call: Backward, tile: Tile) -> tuple[Tensor | None, ...]:
    """Return (dx, dA, dB) by PyTorch's own operators."""
    needs = (call.need_dx, False, False, call.need_dA, call.need_dB)
    tensors = (call.dy, call.x, call.weight, call.A, call.B, call.h)
    dx, _, _, dA, dB = reference.backward(*tensors, call.alpha, needs)
    return dx, dA, dB


BACKWARD = {f.__name__: f for f in (two_launches, torch_base, plain)}


def _pass_over_dy(call: Backward) -> tuple[Tensor | None, Tensor | None]:
    """Launch (i): return t (splits, M, R) and dB's parts (parts, R, N); None where not needed.

    N is split, like K in launch.shrink, until there is a program for each SM.
    """
    M, N, R, dy = call.M, call.N, call.R, call.dy
    tile = configs.dy_tile(call.card, call.kind, M)
    rank_block = configs.block_r(R)
    parts, blocks_r = triton.cdiv(M, tile.block_m), triton.cdiv(R, rank_block)
    want_t = call.need_dx or call.need_dA
    size = dy.element_size()
    want_parts = call.need_dB and configs.dB_parts(call.card, call.kind, M, R, size) > 0
    if not (want_t or want_parts):
        return None, None
    splits = configs.splits(call.card, parts * blocks_r, N, tile.block_n)
    t = dB_parts = None
    if want_t:
        t = torch.empty(splits, M, R, dtype=torch.float32, device=dy.device)
    if want_parts:
        dB_parts = torch.empty(parts, R, N, dtype=torch.float32, device=dy.device)
    launch(
        lora_linear_bwd_dy_kernel,
        (parts, blocks_r, splits),
        dy, call.B if want_t else None, call.h if want_parts else None, t, dB_parts,
        M, N, splits, *dy.stride(), *(call.B.stride() if want_t else (0, 0)),
        R=R, WANT_T=want_t, WANT_DB=want_parts, **product_options(call.kind, call.A, call.card),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_R=rank_block,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return t, dB_parts


def _finish(
    call: Backward,
    tile: Tile,
    dy: Any,
    w: Any,
    t: Tensor | None,
    dB_parts: Tensor | None,
    dx: Tensor | None,
    **options: Any,
) -> tuple[Tensor | None, ...]:
    """Launch (ii): return (dx, dA, dB), dx filled or added to (BASE_DONE)."""
    M, N, K, R = call.M, call.N, call.K, call.R
    dA = call.A.new_empty(K, R) if call.need_dA else None
    dB = call.B.new_empty(R, N) if call.need_dB else None
    programs = _programs(call, tile, dB_parts is not None)
    if programs == 0:
        return None, None, None
    strip = configs.strip_tile(call.card)
    launch(
        lora_linear_bwd_dx_kernel,
        (programs,),
        dy, w, call.x if call.need_dA else None, call.dy if call.need_dB else None,
        call.A if call.need_dx else None, call.h if call.need_dB else None, t, dB_parts, dx, dA, dB,
        call.alpha, *split_alpha(call.alpha, call.dy.dtype),
        M, N, K, 1 if t is None else len(t), 0 if dB_parts is None else len(dB_parts),
        *call.dy.stride(), *(call.weight.stride() if call.need_dx else (0, 0)),
        *(call.x.stride() if call.need_dA else (0, 0)),
        **rank_options(R, call.A if call.need_dx else None),
        WANT_DX=call.need_dx, WANT_DA=call.need_dA, WANT_DB=call.need_dB,
        DB_IN_PARTS=dB_parts is not None, BLOCK_R=configs.block_r(R, configs.EPILOGUE_R),
        STRIP=strip.block_k, STRIP_M=strip.block_m, SUM_PARTS=_SUM_PARTS, SUM_N=_SUM_N,
        **product_options(call.kind, call.A, call.card),
        # The twin of the forward sums over N and has its columns in K.
        **(options | {"BLOCK_K": tile.block_n, "BLOCK_N": tile.block_k}),
    )  # fmt: skip
    return dx, dA, dB


def _programs(call: Backward, tile: Tile, in_parts: bool) -> int:
    """Return how many programs launch (ii) has: tiles of dx, strips of dA, strips or runs of dB."""
    strip = configs.strip_tile(call.card).block_k
    blocks_r = triton.cdiv(call.R, configs.block_r(call.R, configs.EPILOGUE_R))
    programs = 0
    if call.need_dx:
        programs += triton.cdiv(call.M, tile.block_m) * triton.cdiv(call.K, tile.block_n)
    if call.need_dA:
        programs += triton.cdiv(call.K, strip) * blocks_r
    if call.need_dB:
        runs = triton.cdiv(call.R * call.N, _SUM_N)
        programs += runs if in_parts else triton.cdiv(call.N, strip) * blocks_r
    return programs
