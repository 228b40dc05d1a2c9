"""One call as data: the operands of every operator, backend and gradient.

    y = x @ weight.T + bias + scale * ((keep * x) @ A @ B)

M rows, K in, N out, R rank. A new operand is a field here; csrc/call.h has the same structs.
"""

from typing import Any, NamedTuple

from torch import Tensor


class Weight(NamedTuple):
    """The base layer's weight and how it is stored.

    Attributes:
        data: (N, K) for "plain", and int8 for "int8"; for "panels" what `pack_weight` made for this
            direction; for "nf4" and "fp4" bitsandbytes' bytes, (ceil(N * K / 2), 1) uint8.
        format: "plain", "panels", or one of codes.FORMATS, which are frozen.
        scale: of codes what they are multiplied by, float32: one a row for "int8", (N,), else one
            a block, (blocks,): see codes.py.

    """

    data: Tensor
    format: str = "plain"
    scale: Tensor | None = None


class LowRank(NamedTuple):
    """The low-rank part: `scale * ((keep * x) @ A @ B)`.

    Attributes:
        A: (K, R).
        B: (R, N).
        scale: alpha under the scaling rule; under dropout times 1 / (1 - p).
        keep: dropout's mask as bits, (M, ceil(K / 8)) uint8: element k of a row is bit k % 8,
            from the least significant on, of byte k // 8. None keeps all.

    """

    A: Tensor
    B: Tensor
    scale: float
    keep: Tensor | None = None


class Call(NamedTuple):
    """One call: x (M, K), a weight or None for the low-rank part alone, bias (N,) or None.

    In a backward, what the gradients asked for do not read is None, A and B too.
    """

    x: Any  # Tensor, None in a backward that does not read it
    weight: Weight | None
    bias: Tensor | None
    low: LowRank
