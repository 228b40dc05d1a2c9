"""The launches of a backward, a function for each regime: planned as in forward_launches.py."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...call import Call, LowRank, Weight
from ...ops import empty_like_factor
from .. import reference
from . import cards, tiling
from .backward_kernels import lora_linear_bwd_dx_kernel, lora_linear_bwd_dy_kernel
from .cards import Card
from .costs import Problem
from .launches import Launch, base_operands, bits_of, fresh, loop_factor, split_scale, strides
from .persistent_kernels import lora_linear_bwd_dx_persistent_kernel
from .tiling import Tile

SUM_PARTS, SUM_N = 16, 1024  # parts of dB a step, elements a program


class Backward(NamedTuple):
    """One backward to run; what `needs` does not ask for is not read.

    dy (M, N), x (M, K), weight (N, K), A (K, R), B (R, N), h (M, R) contiguous; keep as in Forward.
    None of M, N, K is zero.
    """

    dy: Tensor
    x: Any  # a Tensor or None
    weight: Any  # a Tensor or None
    A: Any  # a Tensor or None
    B: Tensor
    h: Any  # a Tensor or None
    scale: float
    needs: tuple[bool, bool, bool]  # dx, dA, dB
    keep: Tensor | None


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # dx, dA, dB
Run = Callable[[Backward], Gradients]


def two_launches(call: Backward, p: Problem, tile: Tile, card: Card) -> Run:
    """Launch the pass over dy; then dx, dA and dB. One or none where fewer are needed."""
    M, K = p.M, p.K
    pass_over_dy = PassOverDy(call, p, card)
    operands, options = base_operands(call.weight, tile) if p.needs[0] else (None, tile.options())
    finish = Finish(call, p, tile, card, pass_over_dy, BASE_DONE=False, **options)

    def run(call: Backward) -> Gradients:
        t, dB_parts = pass_over_dy(call)
        dx = dy = w = None
        if operands is not None:
            dx = fresh(call.dy, M, K)
            dy, w = operands(call.dy, call.weight)
        return finish(call, dy, w, t, dB_parts, dx)

    return run


def persistent(call: Backward, p: Problem, tile: Tile, card: Card) -> Run:
    """Launch the pass over dy, and with it programs that stay for dx, then for dA and dB."""
    M, K, R = p.M, p.K, p.R
    _, need_dA, need_dB = p.needs
    pass_over_dy = PassOverDy(call, p, card, joined=card.joins)
    in_parts, strip = pass_over_dy.parts > 0, tiling.strip_tile(card, p.kind)
    block_r, dx_box = tiling.persistent_r(card, R), [tile.block_m, tile.block_n // 2]
    operands, options = base_operands(call.weight, tile)
    rounded, strides_a = loop_factor(call.A, call.dy.dtype, tile)
    tiles = triton.cdiv(M, tile.block_m) * triton.cdiv(K, tile.block_n)
    programs = min(card.sms, tiles)
    kernel = Launch(
        lora_linear_bwd_dx_persistent_kernel,
        (programs,),
        **_for_dA_and_dB(call, p, strip, pass_over_dy),
        **dict(PROGRAMS=card.sms, BLOCK_R=block_r),
        lanes=_lanes(tiles, programs, triton.cdiv(K, strip.block_k) * triton.cdiv(R, block_r)),
        **strides("stride_a", "kr", strides_a),
        **(card.product_options(p.kind, call.dy.dtype) | card.join_options(R)),
        **options,
    )

    def run(call: Backward) -> Gradients:
        dx = fresh(call.dy, M, K)
        dA = empty_like_factor(call.A) if need_dA else None
        dB = empty_like_factor(call.B) if need_dB else None
        a = rounded(call.A)  # not between the launches: the second joins the one before it
        t, dB_parts = pass_over_dy(call)
        dy, w = operands(call.dy, call.weight)
        scale_dx, power_dx = split_scale(call.scale, call.dy.dtype)
        kernel(
            dy=dy, w=w, x=call.x if need_dA else None, a=a, keep=call.keep, t=t,
            dy_columns=None if in_parts or not need_dB else call.dy,
            h=None if in_parts or not need_dB else call.h,
            dB_parts=dB_parts, dx=TensorDescriptor.from_tensor(dx, dx_box), dA=dA, dB=dB,
            scale=call.scale, scale_dx=scale_dx, power_dx=power_dx,
        )  # fmt: skip
        return dx, dA, dB

    return run


def _lanes(tiles: int, programs: int, strips: int) -> int:
    """Return how many programs take dA's strips: the last ones, which have a tile less.

    All of them, where that would be more than two strips each: two take as long as a tile, by the
    bytes that each SM has under way. An estimate.
    """
    idle = -tiles % programs
    return idle if idle and strips <= 2 * idle else programs


def torch_base(call: Backward, p: Problem, tile: Tile, card: Card) -> Run:
    """As two_launches, with dx's base product by PyTorch between the two."""
    pass_over_dy = PassOverDy(call, p, card)
    finish = Finish(call, p, tile, card, pass_over_dy, BASE_DONE=True, **tile.options())

    def run(call: Backward) -> Gradients:
        t, dB_parts = pass_over_dy(call)
        dx = call.dy @ call.weight if p.needs[0] else None
        return finish(call, None, None, t, dB_parts, dx)

    return run


def addmm(call: Backward, p: Problem, tile: Tile, card: Card) -> Run:
    """PyTorch's products, the low-rank part of dx added to it by the second."""
    need_dx, need_dA, need_dB = p.needs

    def run(call: Backward) -> Gradients:
        dy, dtype = call.dy, call.dy.dtype
        t: Any = dy @ call.B.to(dtype).T if need_dx or need_dA else None
        dx = dA = dB = None
        if need_dx:
            dx = (dy @ call.weight).addmm_(
                t, call.A.to(dtype).T, alpha=reference.addmm_factor(call.scale)
            )
        if need_dA:
            dA = reference.product_like(call.A, call.x.T, t).to(call.A.dtype).mul_(call.scale)
        if need_dB:
            dB = reference.product_like(call.B, call.h.T, dy).to(call.B.dtype).mul_(call.scale)
        return dx, dA, dB

    return run


def plain(call: Backward, p: Problem, tile: Tile, card: Card) -> Run:
    """PyTorch's own operators, as backend reference has them."""

    def run(call: Backward) -> Gradients:
        low = LowRank(call.A, call.B, call.scale, bits_of(call.keep))
        weight = None if call.weight is None else Weight(call.weight)
        need_dx, need_dA, need_dB = call.needs
        needs = (need_dx, False, False, need_dA, need_dB)
        as_of_reference = Call(call.x, weight, None, low)
        dx, _, _, dA, dB = reference.backward(call.dy, as_of_reference, call.h, needs)
        return dx, dA, dB

    return run


class PassOverDy:
    """Launch (i), planned: t (M, R) and dB's parts (parts, R, N); None where not needed.

    N is split, like K in Shrink, but t then summed at once: a strip of dA would read its parts at
    each step, in four times the shared memory. A part of dB is laid out as dB is. `joined`: the
    next launch may start while it runs.
    """

    def __init__(self, call: Backward, p: Problem, card: Card, *, joined: bool = False):
        M, N, R = p.M, p.N, p.R
        tile = tiling.dy_tile(card, p.kind, M, joined=joined)
        block_r = tiling.block_r(R)
        blocks_m, blocks_r = triton.cdiv(M, tile.block_m), triton.cdiv(R, block_r)
        need_dx, need_dA, need_dB = p.needs
        self.want_t = need_dx or need_dA
        in_parts = tiling.dB_parts(card, p.kind, M, R, p.size) > 0
        self.parts = blocks_m if need_dB and in_parts else 0
        self.splits = tiling.dy_splits(card, p.kind, M, N, R)
        self.t_shape, self.counters = (M, R), blocks_m * blocks_r
        self.rounded, strides_b = loop_factor(call.B, call.dy.dtype, tile)
        self.dB_strides = empty_like_factor(call.B).stride()
        self.kernel = Launch(
            lora_linear_bwd_dy_kernel,
            (blocks_m, blocks_r, self.splits),
            **dict(M=M, N=N, R=R, splits=self.splits),
            **dict(WANT_T=self.want_t, WANT_DB=self.parts > 0, JOINED=joined),
            **dict(BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_R=block_r),
            **dict(num_warps=tile.warps, num_stages=tile.stages),
            **strides("stride_d", "mn", call.dy.stride()),
            **strides("stride_b", "rn", strides_b if self.want_t else None),
            **strides("stride_g", "rn", self.dB_strides),
            **card.product_options(p.kind, call.B.dtype),
        )

    def __call__(self, call: Backward) -> tuple[Tensor | None, Tensor | None]:
        """Launch it for a call of the planned sizes, if anything is asked of it."""
        t = t_parts = arrived = b = h = parts = None
        dy, device = call.dy, call.dy.device
        if self.want_t:
            t, b = fresh(dy, *self.t_shape), self.rounded(call.B)
            if self.splits > 1:
                shape = (self.splits, *self.t_shape)
                t_parts = torch.empty(shape, dtype=torch.float32, device=device)
                arrived = torch.zeros(self.counters, dtype=torch.int32, device=device)
        if self.parts:
            parts = torch.empty((self.parts, *call.B.shape), dtype=torch.float32, device=device)
            h = call.h
        if self.want_t or self.parts:
            self.kernel(dy=dy, b=b, h=h, t=t, t_parts=t_parts, arrived=arrived, dB_parts=parts)
        return t, parts


class Finish:
    """Launch (ii), planned: dx, filled or added to (BASE_DONE), dA, and dB."""

    def __init__(
        self, call: Backward, p: Problem, tile: Tile, card: Card, first: PassOverDy, **options: Any
    ):
        self.need_dx, self.need_dA, self.need_dB = p.needs
        strip = tiling.strip_tile(card, p.kind)
        programs = _programs(p, tile, strip, in_parts=first.parts > 0)
        self.kernel = programs and Launch(
            lora_linear_bwd_dx_kernel,
            (programs,),
            **_for_dA_and_dB(call, p, strip, first),
            WANT_DX=self.need_dx,
            **strides("stride_w", "nk", call.weight.stride() if call.weight is not None else None),
            **strides("STRIDE_A", "KR", call.A.stride() if self.need_dx else None),
            # Of two blocks an SM, which ptxas aims at with 99 KB, Triton 3.6 spills 32 bytes.
            **card.product_options(
                p.kind,
                call.B.dtype,
                p.masked or tile.warps == 4 or card.shared_bytes < 128 * cards.KIB,
            ),
            # The twin of the forward sums over N and has its columns in K.
            **(options | {"BLOCK_K": tile.block_n, "BLOCK_N": tile.block_k}),
            BLOCK_R=tiling.block_r(p.R, tiling.EPILOGUE_R),
        )

    def __call__(
        self,
        call: Backward,
        dy: Any,
        w: Any,
        t: Tensor | None,
        dB_parts: Tensor | None,
        dx: Tensor | None,
    ) -> Gradients:
        """Launch it for a call of the planned sizes, with what launch (i) gave."""
        if not self.kernel:
            return None, None, None
        dA = empty_like_factor(call.A) if self.need_dA else None
        dB = empty_like_factor(call.B) if self.need_dB else None
        scale_dx, power_dx = split_scale(call.scale, call.dy.dtype)
        self.kernel(
            dy=dy, w=w, x=call.x if self.need_dA else None,
            dy_columns=call.dy if self.need_dB else None, a=call.A if self.need_dx else None,
            keep=call.keep if self.need_dx or self.need_dA else None,
            h=call.h if self.need_dB else None, t=t, dB_parts=dB_parts, dx=dx, dA=dA, dB=dB,
            scale=call.scale, scale_dx=scale_dx, power_dx=power_dx,
        )  # fmt: skip
        return dx, dA, dB


def _for_dA_and_dB(call: Backward, p: Problem, strip: Tile, first: PassOverDy) -> dict[str, Any]:
    """Return what a kernel that has dA and dB next to dx gets for them."""
    _, need_dA, need_dB = p.needs
    return {
        **dict(M=p.M, N=p.N, K=p.K, R=p.R, parts=first.parts),
        **dict(WANT_DA=need_dA, WANT_DB=need_dB, DB_IN_PARTS=first.parts > 0),
        **dict(SUM_PARTS=SUM_PARTS, SUM_N=SUM_N, STRIP=strip.block_k, STRIP_M=strip.block_m),
        **strides("stride_d", "mn", call.dy.stride()),
        **strides("stride_x", "mk", call.x.stride() if need_dA else None),
        **strides("stride_g", "kr", empty_like_factor(call.A).stride() if need_dA else None),
        **strides("stride_b", "rn", first.dB_strides),
    }


def _programs(p: Problem, tile: Tile, strip: Tile, *, in_parts: bool) -> int:
    """Return how many programs launch (ii) has: tiles of dx, strips of dA, strips or runs of dB."""
    M, K, N, R = p.M, p.K, p.N, p.R
    need_dx, need_dA, need_dB = p.needs
    blocks_r = triton.cdiv(R, tiling.block_r(R, tiling.EPILOGUE_R))
    programs = 0
    if need_dx:
        programs += triton.cdiv(M, tile.block_m) * triton.cdiv(K, tile.block_n)
    if need_dA:
        programs += triton.cdiv(K, strip.block_k) * blocks_r
    if need_dB:
        runs = triton.cdiv(R * N, SUM_N)
        programs += runs if in_parts else triton.cdiv(N, strip.block_k) * blocks_r
    return programs
