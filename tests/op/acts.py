"""The error rule over a gated MLP's activation: act(gate) * up and its gradients."""

from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_ext.testing import compare

PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda g: F.gelu(g, approximate="tanh"),
    "relu2": lambda g: F.relu(g) ** 2,
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = [(7, 40), (3, 57), (1, 1), (0, 16), (300, 130)]
# How gate, up and d_hidden lie, and the gradients with them.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda t: t,
    "half_of_a_matrix": lambda t: torch.cat((t, t), 1)[:, t.shape[1] :],
    "columns": lambda t: t.T.contiguous().T,
    "every_other": lambda t: t.repeat_interleave(2, 1)[:, ::2],
}


def operands(size: tuple[int, int], dtype: torch.dtype, layout: str) -> list[Tensor]:
    """Return gate, up and d_hidden: values around zero, some far from it, and both zeros."""
    g = torch.Generator().manual_seed(sum(size))
    gate, up, dy = (torch.randn(*size, generator=g, dtype=torch.float64) for _ in range(3))
    gate = gate * torch.logspace(-3, 1.2, max(size[1], 1), dtype=torch.float64)[: size[1]]
    gate.flatten()[:2] = torch.tensor([0.0, -0.0])[: gate.numel()]
    return [LAYOUTS[layout](t.to(dtype)) for t in (gate, up, dy)]


def plain(act: str, gate: Tensor, up: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Return what autograd gives for PyTorch's operations."""
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    hidden = PLAIN[act](gate) * up
    d_gate, d_up = torch.autograd.grad(hidden, (gate, up), dy)
    return {"hidden": hidden.detach(), "d_gate": d_gate, "d_up": d_up}


def ours(
    module: ModuleType, act: str, gate: Tensor, up: Tensor, dy: Tensor, in_place: bool
) -> dict[str, Tensor]:
    """Return what a module's `gated` and `gated_backward` give."""
    before = [t.clone() for t in (gate, up, dy)]
    hidden = module.gated(gate, up, act)
    d_hidden = dy.clone(memory_format=torch.preserve_format) if in_place else dy
    d_gate = d_hidden if in_place else torch.full_like(gate, torch.nan)
    d_up = torch.full_like(up, torch.nan)
    module.gated_backward(d_hidden, gate, up, act, d_gate, d_up)
    assert all(map(torch.equal, before, (gate, up, dy)))
    return {"hidden": hidden, "d_gate": d_gate, "d_up": d_up}


def broken_acts(
    module: ModuleType, act: str, dtype: torch.dtype, layout: str, in_place: bool = False
) -> list[str]:
    """Return a line for each result that breaks the rule."""
    lines = []
    for size in SIZES:
        given = operands(size, dtype, layout)
        want, exact = plain(act, *given), plain(act, *(t.double() for t in given))
        eps = (16 if dtype == torch.float64 else 1) * torch.finfo(dtype).eps
        for name, got in ours(module, act, *given, in_place).items():
            assert got.dtype == dtype and got.shape == size
            floor = partial(lambda eps, e, norm: eps * norm(e), eps, exact[name])
            found = compare(name, got, want[name], exact[name], floor)
            lines += [f"{act} {dtype} {layout} {size}: {e}" for e in found if e.broken]
    return lines


def refused_acts(module: ModuleType) -> str | None:
    """Return why the checks refuse a module: the first rule it breaks."""
    for act in PLAIN:
        for dtype in DTYPES:
            for layout in LAYOUTS:
                if broken := broken_acts(module, act, dtype, layout, layout == "dense"):
                    return broken[0]
    return None
