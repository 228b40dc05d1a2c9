"""The operators' FLOPs for torch.utils.flop_counter: `import lora_ext.flops` registers them.

`import lora_ext` does so by itself where that module is imported already. It does not import that
module otherwise, which imports Triton where it is there, in 0.3 s. A product counts as PyTorch
counts its own, 2 M N K; a mask, a scale, a sum and an activation count nothing.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

Shape = Sequence[int]


def forward_flops(x: Shape, weight: Any, bias: Any, A: Shape, B: Shape, *_: Any, **__: Any) -> int:
    """Return those of linear_fwd: x @ weight.T, where there is a weight, x @ A and h @ B."""
    (M, K), (R, N) = x, B
    return 2 * M * (N * K * (weight is not None) + R * K + R * N)


def backward_flops(
    dy: Shape,
    x: Any,
    weight: Any,
    A: Any,
    B: Any,
    h: Any,
    scale: Any,
    needs: Any,
    *_: Any,
    **__: Any,
) -> int:
    """Return those of linear_bwd: the products that `needs` asks for."""
    need_dx, need_dweight, _dbias, need_dA, need_dB = map(int, needs)
    M, N = dy
    R = 0 if B is None else B[0]
    K = A[0] if A is not None else x[1] if x is not None else 0
    base = need_dx * (weight is not None) + need_dweight
    over_N = (need_dx | need_dA) + need_dB  # t, dB
    return 2 * M * (base * N * K + over_N * R * N + (need_dx + need_dA) * R * K)


def group_forward_flops(
    x: Shape, weights: Any, biases: Any, As: Any, Bs: Any, *_: Any, **__: Any
) -> int:
    """Return those of linears_fwd."""
    return sum(map(forward_flops, [x] * len(As), weights, biases, As, Bs))


def group_backward_flops(
    dys: Any, x: Any, weights: Any, As: Any, Bs: Any, hs: Any, scales: Any, needs: Any,
    *_: Any, **__: Any,
) -> int:  # fmt: skip
    """Return those of linears_bwd."""
    each = [(needs[0], *needs[1 + 4 * i : 5 + 4 * i]) for i in range(len(dys))]
    return sum(map(backward_flops, dys, [x] * len(dys), weights, As, Bs, hs, scales, each))


FORMULAS: dict[str, Any] = {
    "linear_fwd": forward_flops,
    "linear_bwd": backward_flops,
    "linears_fwd": group_forward_flops,
    "linears_bwd": group_backward_flops,
}
for _name, _formula in FORMULAS.items():
    for _operators in (torch.ops.lora_ext, torch.ops.lora_ext_triton):
        register_flop_formula(getattr(_operators, _name))(_formula)
