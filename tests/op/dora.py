"""DoRA over a dropped x, next to what PEFT composes: y and the gradients against float64."""

import torch
from torch import Tensor

from lora_ext.dora_dropped import dora_dropped
from lora_ext.dropout import pack_bits

P = 0.1
SCALE = 1.5
# Ragged; one; rows past a tile of sums; columns of x past the rows that are laid out at once, and
# of y past the width of one.
SIZES = [(70, 91, 67, 4), (5, 8, 3, 1), (64, 1, 1, 2), (1090, 40, 70, 3), (9, 1100, 300, 8)]
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "float64": (torch.float64, torch.float64),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "bfloat16, float32 adapters": (torch.bfloat16, torch.float32),
}
LAYOUTS = {
    "dense": lambda t: t,
    "columns": lambda t: t.T.contiguous().T,
    "every_other": lambda t: t.repeat_interleave(2, 1)[:, ::2],
}
Given = tuple[dict[str, Tensor | None], Tensor, Tensor]


def operands(
    size: tuple[int, int, int, int], dtypes: str = "float32", layout: str = "dense"
) -> Given:
    """Return x, bias, A, B and g by name, the weight, and the mask as bool."""
    M, K, N, R = size
    dtype, of_adapter = DTYPES[dtypes]
    generator = torch.Generator().manual_seed(M + K)
    x, weight, A, B = (
        LAYOUTS[layout](torch.randn(shape, generator=generator).to(to))
        for shape, to in (
            ((M, K), dtype),
            ((N, K), dtype),
            ((K, R), of_adapter),
            ((R, N), of_adapter),
        )
    )
    g = torch.rand(N, generator=generator).to(torch.promote_types(dtype, torch.float32)) * 2 - 0.5
    g[0] = P  # what is kept then counts for nothing: 1 + (g - 1) / (1 - p) = 0
    mask = torch.rand(M, K, generator=generator) >= P
    mask[0], mask[-1] = True, False  # a row without a dropped element, and one without another
    bias = torch.randn(N, generator=generator).to(dtype)
    return {"x": x, "bias": bias, "A": A, "B": B, "g": g}, weight, mask


def ours(given: dict[str, Tensor | None], weight: Tensor, mask: Tensor) -> Tensor:
    x, bias, A, B, g = given.values()
    return dora_dropped(x, weight, bias, A, B, SCALE, g, pack_bits(mask), P)


def plain(given: dict[str, Tensor | None], weight: Tensor, mask: Tensor) -> Tensor:
    """As PEFT composes it: two products with the weight."""
    x, bias, A, B, g = given.values()
    dropped = mask * x / (1 - P)
    low = (dropped @ A.to(x.dtype)) @ B.to(x.dtype) * SCALE
    y = x @ weight.T if bias is None else x @ weight.T + bias
    return y + ((g - 1) * (dropped @ weight.T) + g * low).to(x.dtype)


def results(of, given, weight, mask, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return y and the gradients, computed in a dtype or in each operand's own, as float64."""
    leaves = {
        name: None if t is None else t.detach().to(dtype or t.dtype).requires_grad_()
        for name, t in given.items()
    }
    y = of(leaves, weight.to(dtype or weight.dtype), mask)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(dy.to(y.dtype))
    found = {name: t.grad for name, t in leaves.items() if t is not None}
    return {name: t.detach().double() for name, t in {"y": y, **found}.items()}


def refused_dora(sizes=SIZES, dtypes=tuple(DTYPES), layouts=tuple(LAYOUTS)) -> str | None:
    """Return why the checks refuse the kernels: a result more than twice as far off as plain's."""
    for size in sizes:
        for name in dtypes:
            for layout in layouts:
                given = operands(size, name, layout)
                dtype = DTYPES[name][0]
                exact = results(plain, *given, torch.float64)
                others, found = results(plain, *given), results(ours, *given)
                if dtype == torch.float64:  # plain's error is unseen there: see lora_ext.testing
                    single = results(plain, *given, torch.float32)
                    others = {n: exact[n] + (t - exact[n]) * 2.0**-29 for n, t in single.items()}
                for result, right in exact.items():
                    off = (found[result] - right).norm()
                    floor = 4 * torch.finfo(dtype).eps * right.norm()
                    if not off <= 2 * (others[result] - right).norm() + floor:
                        return (
                            f"{result} of {size}, {name}, {layout} is off by {off / right.norm()}"
                        )
    return None
