"""The problems: a case says what is multiplied and how it is stored; its inputs are drawn."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..codes import FORMATS, dequantised, quantised
from ..dropout import pack_bits

NAMES = ("x", "weight", "bias", "A", "B")
FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
SHORT = {FP32: "fp32", BF16: "bf16", FP16: "fp16", FP64: "fp64"}
# (dtype of x, dtype of A and B if another one)
DTYPES = [(FP32, None), (BF16, None), (FP16, None), (FP64, None), (BF16, FP32), (FP16, FP32)]


@dataclass(frozen=True)
class Case:
    """A problem: x (lead..., K), weight (N, K), rank R, and how the tensors are stored.

    Attributes:
        lead: leading dimensions of x; () for a vector.
        K: in features.
        N: out features.
        R: rank.
        dtype: of x, weight, bias and y.
        adapter_dtype: of A and B; None for x's.
        bias: whether there is one.
        layout: one of `LAYOUTS`.
        alpha: factor of the low-rank part, 1 / (1 - dropout) included.
        dropout: share of the elements of x that the low-rank part does not see; at 0 no mask.
        base: whether there is a weight; without one the low-rank part stands alone.
        format: of the weight, "plain" or one of codes.FORMATS.
        block: elements in a block of 4-bit codes.

    """

    lead: tuple[int, ...]
    K: int
    N: int
    R: int
    dtype: torch.dtype = FP32
    adapter_dtype: torch.dtype | None = None
    bias: bool = True
    layout: str = "contiguous"
    alpha: float = 1.7
    dropout: float = 0.0
    base: bool = True
    format: str = "plain"
    block: int = 64

    def __str__(self) -> str:
        """As a test id: M37-K96-N160-R8-bf16."""
        parts = [f"M{'x'.join(map(str, self.lead)) or 'vector'}-K{self.K}-N{self.N}-R{self.R}"]
        parts.append(SHORT[self.dtype])
        if self.adapter_dtype is not None:
            parts.append(f"AB{SHORT[self.adapter_dtype]}")
        if not self.base:
            parts.append("nobase")
        elif not self.bias:
            parts.append("nobias")
        if self.layout != "contiguous":
            parts.append(self.layout)
        if self.alpha != 1.7:
            parts.append(f"alpha{self.alpha:g}")
        if self.dropout:
            parts.append(f"drop{self.dropout:g}")
        if self.format != "plain":
            parts.append(self.format + (f"x{self.block}" if self.block != 64 else ""))
        return "-".join(parts)

    @property
    def M(self) -> int:
        """Rows of x."""
        return prod(self.lead)

    def but(self, **changes: object) -> "Case":
        """Return the same problem with some fields changed."""
        return replace(self, **changes)  # type: ignore[arg-type]


TAILS = Case((37,), 96, 160, 8)  # no dimension is a multiple of a block, most not of a vector
SHAPES = [
    Case((128,), 256, 128, 16),  # tile-exact
    Case((0,), 96, 160, 8),  # nothing to do; dA, dB and dbias are zeros all the same
    Case((1,), 96, 160, 8),  # a single row: decoding
    Case((), 96, 160, 8),  # x is a vector
    TAILS,
    Case((37,), 91, 157, 8),  # K and N odd: rows at any alignment
    Case((3,), 93, 70, 5),  # few rows, which may go ways of their own: not one row, not full ones
    Case((4,), 70, 93, 9),
    Case((2,), 8, 3, 1),  # less than a vector everywhere
    Case((1,), 1, 1, 1),
    *(Case((19,), 72, 88, R) for R in (1, 3, 16, 64, 100)),  # below, at and past a block; R > K
    Case((3, 5), 96, 160, 8),  # batched
    Case((2, 1, 7), 40, 24, 4),
    Case((2, 0), 96, 160, 8),  # batched, without rows
    TAILS.but(bias=False),
    TAILS.but(alpha=1.0),
]
# Bits of a last byte that stand for nothing, no last byte, a single row, no rows.
MASKED = [
    case.but(dropout=0.3)
    for case in (Case((37,), 91, 157, 8), TAILS, Case((3, 5), 96, 160, 8), Case((3,), 93, 70, 5))
]
MASKED += [Case((1,), 96, 160, 8, dropout=0.3), Case((0,), 96, 160, 8, dropout=0.3)]
MASKED += [Case((400,), 264, 136, 16, dropout=0.1)]  # more than a block of each kind
# Rows of whole blocks, which go straight from codes to sums where they meet few of x; blocks that
# run on into the next row; rows that begin within a byte; a row shorter than a block, and than a
# vector; more than a block of each kind.
OF_CODES = [
    case.but(format=format)
    for format in FORMATS
    for case in (
        *(Case((M,), 128, 70, 8) for M in (1, 3, 6, 13, 37)),
        Case((5,), 192, 9, 4, block=32),
        Case((11,), 96, 160, 8, dropout=0.3),
        Case((3,), 91, 157, 8),
        Case((3,), 192, 70, 8, dropout=0.3),
        Case((3, 14), 91, 157, 8, bias=False),
        Case((2,), 30, 5, 3, block=128),
        Case((), 7, 3, 1),
        Case((1,), 4160, 33, 8, block=32),
        Case((6,), 1472, 33, 8),  # x in two pieces
        Case((0,), 64, 32, 4),
        Case((400,), 404, 264, 16, dropout=0.1),
    )
]
WITHOUT_BASE = [case.but(base=False) for case in (TAILS, Case((0,), 96, 160, 8), MASKED[0])]

# A layout: the tensor that it lays out in another way, and how; the values stay.
LAYOUTS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "contiguous": ("x", lambda t: t),
    "x_every_other_row": ("x", lambda t: t.repeat_interleave(2, 0)[::2]),
    "x_every_other_column": ("x", lambda t: t.repeat_interleave(2, -1)[..., ::2]),
    "x_transposed": ("x", lambda t: t.mT.contiguous().mT),
    "x_unaligned": ("x", lambda t: _unaligned(t)),
    "x_expanded": ("x", lambda t: t[..., :1, :].expand_as(t)),
    "weight_transposed": ("weight", lambda t: t.T.contiguous().T),
    "weight_sliced": ("weight", lambda t: torch.cat((t, t), 1)[:, : t.shape[1]]),
    "weight_unaligned": ("weight", lambda t: _unaligned(t)),
    "A_transposed": ("A", lambda t: t.T.contiguous().T),
    "B_transposed": ("B", lambda t: t.T.contiguous().T),
    "bias_strided": ("bias", lambda t: t.repeat_interleave(2)[::2]),
    "dy_expanded": ("dy", lambda t: t.flatten()[0].expand_as(t)),
    "dy_row_expanded": ("dy", lambda t: t[..., :1, :].expand_as(t)),
    "dy_transposed": ("dy", lambda t: t.mT.contiguous().mT),
}


def _unaligned(t: Tensor) -> Tensor:
    """Move by one element: a load that assumes an aligned pointer faults or reads the wrong one."""
    return torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape)


def every_case() -> list[Case]:
    """Return what `check_backend` runs: every shape in every dtype, and each layout in two."""
    shapes = [*SHAPES, *MASKED, *WITHOUT_BASE]
    cases = [c.but(dtype=dtype, adapter_dtype=ab) for c in shapes for dtype, ab in DTYPES]
    of_codes = [(FP32, None), (BF16, FP32), (FP16, None)]
    cases += [c.but(dtype=dtype, adapter_dtype=ab) for c in OF_CODES for dtype, ab in of_codes]
    laid_out = [c.but(layout=name) for c in (TAILS, MASKED[0]) for name in LAYOUTS]
    return cases + [c.but(dtype=dtype) for c in laid_out for dtype in (FP32, BF16)]


def make_inputs(case: Case, seed: int = 0) -> dict[str, Any]:
    """Return x, weight, bias, A, B and dy; each part of y has a variance of about 1.

    On torch's default device, the same values on each. With dropout also `keep`, its mask as bits:
    (M, ceil(K / 8)) uint8; of a weight of codes also `codes`, the Weight, and as `weight` what
    these stand for.
    """
    g = torch.Generator("cpu").manual_seed(seed)
    device = torch.get_default_device()

    def randn(*shape: int, scale: float = 1.0, dtype: torch.dtype = case.dtype) -> Tensor:
        values = torch.randn(*shape, generator=g, dtype=torch.float64, device="cpu")
        return (values * scale).to(device, dtype)

    K, N, R = case.K, case.N, case.R
    adapter = case.adapter_dtype or case.dtype
    inputs: dict[str, Any] = {
        "x": randn(*case.lead, K),
        "weight": randn(N, K, scale=K**-0.5) if case.base else None,
        "bias": randn(N) if case.base and case.bias else None,
        "A": randn(K, R, scale=K**-0.5, dtype=adapter),
        "B": randn(R, N, scale=R**-0.5, dtype=adapter),  # never zero: it would hide dA and dx
        "dy": randn(*case.lead, N),
    }
    if case.format != "plain":
        codes = inputs["codes"] = quantised(inputs["weight"], case.format, case.block)
        inputs["weight"] = dequantised(codes, N, K, case.dtype)
    if case.dropout:
        kept = torch.rand(case.M, K, generator=g, device="cpu") >= case.dropout
        inputs["keep"] = pack_bits(kept).to(device)
    name, lay_out = LAYOUTS[case.layout]
    if (tensor := inputs[name]) is not None:
        inputs[name] = lay_out(tensor)
    return inputs
