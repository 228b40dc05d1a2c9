"""The launches of several layers of one x, planned as in forward_launches.py.

A forward is one shrink for all, then what each layer's regime does after its own. A backward is
each layer's pass over dy, then one launch that sums dx over the layers and reads x once for dA.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
import triton
from torch import Tensor

from ...ops import empty_like_factor
from . import cards, forward_launches, tiling
from .backward_launches import SUM_N, SUM_PARTS, Backward, Gradients, PassOverDy
from .cards import Card
from .costs import Problem
from .forward_launches import Forward, Parts
from .group_costs import MOST_LEGS
from .group_kernels import lora_linears_bwd_dx_kernel, lora_linears_shrink_kernel
from .launches import Launch, base_operands, fresh, loop_factor, split_scale, strides
from .tiling import Tile

ForwardRun = Callable[[Sequence[Forward]], list[tuple[Tensor, Tensor]]]
BackwardRun = Callable[[Sequence[Backward]], list[Gradients]]


def forward(
    calls: Sequence[Forward],
    problems: Sequence[Problem],
    choices: Sequence[tuple[str, Tile]],
    card: Card,
) -> ForwardRun:
    """Launch one shrink, then each layer's rest by its regime, the first one joined to it."""
    joined = choices[0][0] == "persistent" and card.joins
    shrink = ShrinkOfAll(calls, problems, card, joined=joined)
    rests = [
        getattr(forward_launches, f"rest_of_{name}")(
            call, p, tile, card, shrink.parts._replace(joined=joined and call is calls[0])
        )
        for call, p, (name, tile) in zip(calls, problems, choices, strict=True)
    ]

    def run(calls: Sequence[Forward]) -> list[tuple[Tensor, Tensor]]:
        columns = shrink(calls)  # launched when the first layer asks for its own
        return [
            rest(call, lambda _: next(columns)) for rest, call in zip(rests, calls, strict=True)
        ]

    return run


class ShrinkOfAll:
    """h of all layers in float32, planned: (splits, M, sum of R), their columns side by side."""

    def __init__(
        self, calls: Sequence[Forward], problems: Sequence[Problem], card: Card, *, joined: bool
    ):
        p, self.ranks = problems[0], [p.R for p in problems]
        tile = tiling.shrink_tile(card, p.kind, p.M, joined=joined)
        block_r = tiling.block_r_of_each(self.ranks, tiling.SHRINK_COLUMNS, tiling.MAX_BLOCK_R)
        tiles_m, blocks_r = triton.cdiv(p.M, tile.block_m), triton.cdiv(max(self.ranks), block_r)
        splits = tiling.splits(card, tiles_m * blocks_r, p.K, tile.block_k)
        *first, row = accumulate(self.ranks, initial=0)
        self.parts, self.shape = Parts(splits, row, joined), (splits, p.M, row)
        factors = [loop_factor(call.A, call.x.dtype, tile) for call in calls]
        self.rounded = [rounded for rounded, _ in factors]
        self.kernel = Launch(
            lora_linears_shrink_kernel,
            (tiles_m, blocks_r, splits),
            **dict(M=p.M, K=p.K, R=tuple(self.ranks), COLUMN=tuple(first), ROW=row, splits=splits),
            **dict(BLOCK_M=tile.block_m, BLOCK_K=tile.block_k, BLOCK_R=block_r, JOINED=joined),
            **dict(num_warps=tile.warps, num_stages=tile.stages),
            **strides("stride_x", "mk", calls[0].x.stride()),
            **strides_of_each("STRIDE_A", "KR", *(strides for _, strides in factors)),
            **card.product_options(p.kind, widest(call.A for call in calls), masked(problems)),
        )

    def __call__(self, calls: Sequence[Forward]) -> Iterator[Tensor]:
        """Launch it for calls of the planned sizes, and yield each layer's columns."""
        x = calls[0].x
        parts = torch.empty(self.shape, dtype=torch.float32, device=x.device)
        a = tuple(rounded(call.A) for rounded, call in zip(self.rounded, calls, strict=True))
        self.kernel(x=x, a=a, keep=tuple(call.keep for call in calls), h=parts)
        yield from parts.split(self.ranks, 2)


def backward(
    calls: Sequence[Backward], problems: Sequence[Problem], tile: Tile, card: Card
) -> BackwardRun:
    """Launch each pass over dy, then dx of all, dA of all and each dB. dx is with the first."""
    passes = [PassOverDy(call, p, card) for call, p in zip(calls, problems, strict=True)]
    finish = FinishOfAll(calls, problems, tile, card, passes)

    def run(calls: Sequence[Backward]) -> list[Gradients]:
        ts, dB_parts = zip(*(of(call) for of, call in zip(passes, calls, strict=True)), strict=True)
        dx, dAs, dBs = finish(calls, ts, dB_parts)
        return [(None if i else dx, *own) for i, own in enumerate(zip(dAs, dBs, strict=True))]

    return run


class FinishOfAll:
    """The last launch of a backward, planned: dx as a sum of legs, dA of all, and each dB."""

    def __init__(
        self,
        calls: Sequence[Backward],
        problems: Sequence[Problem],
        tile: Tile,
        card: Card,
        passes: Sequence[PassOverDy],
    ):
        p, keeps = problems[0], masked(problems)
        M, K, self.need_dx = p.M, p.K, p.needs[0]
        ranks, strip = tuple(q.R for q in problems), tiling.strip_tile(card, p.kind)
        most_r = tiling.MASKED_R if keeps else tiling.EPILOGUE_R
        blocks = dict(
            **dict(STRIP=strip.block_k, STRIP_M=strip.block_m, SUM_PARTS=SUM_PARTS, SUM_N=SUM_N),
            STRIP_R=tiling.block_r_of_each(ranks, tiling.STRIP_COLUMNS, tiling.EPILOGUE_R),
            BLOCK_R=tiling.block_r(max(ranks), most_r),
        )
        own, self.operands = tile.options(), []
        if self.need_dx:
            self.operands, options = zip(
                *(base_operands(call.weight, tile) for call in calls), strict=True
            )
            own["W_TRANSPOSED"] = tuple(of["W_TRANSPOSED"] for of in options)
        # Next to masks, a float32 A in the epilogue spills 32 bytes on sm_80: it is rounded before.
        factors: list[Any] = [(_as_it_is, _stride(call.A)) for call in calls]
        if self.need_dx and keeps:
            factors = [loop_factor(call.A, call.dy.dtype, tile) for call in calls]
        self.rounded = [rounded for rounded, _ in factors]
        of_dA = [None if call.A is None else empty_like_factor(call.A) for call in calls]
        self.kernel = Launch(
            lora_linears_bwd_dx_kernel,
            (_programs(problems, tile, blocks, passes),),
            **dict(M=M, N=tuple(q.N for q in problems), K=K, R=ranks, MOST_R=max(ranks)),
            **dict(MASKED=keeps, parts=max(first.parts for first in passes)),
            **strides("stride_x", "mk", _stride(_x_of(calls))),
            **strides_of_each("stride_d", "mn", *(call.dy.stride() for call in calls)),
            **strides_of_each("stride_w", "nk", *(_stride(call.weight) for call in calls)),
            **strides_of_each("stride_g", "kr", *(_stride(dA) for dA in of_dA)),
            **strides_of_each("stride_b", "rn", *(first.dB_strides for first in passes)),
            **strides_of_each("STRIDE_A", "KR", *(strides for _, strides in factors)),
            **card.product_options(
                p.kind,
                widest(call.B for call in calls),
                keeps or tile.warps == 4 or card.shared_bytes < 128 * cards.KIB,
            ),
            # The twin of the forward sums over N and has its columns in K.
            **(own | blocks | {"BLOCK_K": tile.block_n, "BLOCK_N": tile.block_k}),
        )

    def __call__(
        self,
        calls: Sequence[Backward],
        ts: Sequence[Tensor | None],
        dB_parts: Sequence[Tensor | None],
    ) -> tuple[Tensor | None, tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
        """Launch it for calls of the planned sizes; return dx, and dA and dB of each."""
        fixed = self.kernel.fixed
        dx = fresh(calls[0].dy, fixed["M"], fixed["K"]) if self.need_dx else None
        dA = tuple(empty_like_factor(call.A) if call.needs[1] else None for call in calls)
        dB = tuple(empty_like_factor(call.B) if call.needs[2] else None for call in calls)
        legs: dict[str, Any] = dict.fromkeys(_LEGS)
        for i, of in enumerate(self.operands):
            legs[f"dy_{i}"], legs[f"w_{i}"] = of(calls[i].dy, calls[i].weight)
        scale_dx, power_dx = zip(
            *(split_scale(call.scale, call.dy.dtype) for call in calls), strict=True
        )
        self.kernel(
            **legs, x=_x_of(calls), t=ts, dB_parts=dB_parts, dx=dx, dA=dA, dB=dB,
            dy_columns=tuple(call.dy if call.needs[2] else None for call in calls),
            a=tuple(of(call.A) for of, call in zip(self.rounded, calls, strict=True)),
            keep=tuple(call.keep for call in calls), h=tuple(call.h for call in calls),
            scale=tuple(call.scale for call in calls), scale_dx=scale_dx, power_dx=power_dx,
        )  # fmt: skip
        return dx, dA, dB


_LEGS = [f"{name}_{i}" for name in ("dy", "w") for i in range(MOST_LEGS)]


def _programs(
    problems: Sequence[Problem], tile: Tile, blocks: dict[str, int], passes: Sequence[PassOverDy]
) -> int:
    """Return how many programs there are: strips of dA, strips or runs of each dB, tiles of dx."""
    p, strip = problems[0], blocks["STRIP"]
    programs = 0
    if p.needs[0]:
        programs += triton.cdiv(p.M, tile.block_m) * triton.cdiv(p.K, tile.block_n)
    if any(q.needs[1] for q in problems):
        blocks_r = triton.cdiv(max(q.R for q in problems), blocks["STRIP_R"])
        programs += triton.cdiv(p.K, strip) * blocks_r
    for q, first in zip(problems, passes, strict=True):
        if q.needs[2]:
            strips = triton.cdiv(q.N, strip) * triton.cdiv(q.R, blocks["BLOCK_R"])
            programs += triton.cdiv(q.R * q.N, SUM_N) if first.parts else strips
    return programs


def strides_of_each(prefix: str, dims: str, *both: Sequence[int]) -> dict[str, Any]:
    """Return each layer's strides as tuples under the kernels' names, see launches.strides."""
    return {prefix + dim: of for dim, of in zip(dims, zip(*both, strict=True), strict=True)}


def widest(factors: Any) -> torch.dtype:
    """Return the dtype of the widest of A or B."""
    return max((factor.dtype for factor in factors), key=lambda dtype: dtype.itemsize)


def masked(problems: Sequence[Problem]) -> bool:
    """Whether a layer has dropout's mask."""
    return any(p.masked for p in problems)


def _stride(matrix: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if matrix is None else matrix.stride()


def _x_of(calls: Sequence[Backward]) -> Any:
    """Return x, which layers without a dA do not have; None where none has it."""
    return next((call.x for call in calls if call.x is not None), None)


def _as_it_is(factor: Any) -> Any:
    return factor
