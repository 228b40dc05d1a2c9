"""The activations of a gated MLP by PyTorch's operations: the specification, and the fallback.

    hidden = act(gate) * up
    d_up = d_hidden * act(gate)      d_gate = d_hidden * up * act'(gate)

The C++ kernels have the same in one pass (csrc/cpu/act_impl.h). Without a gate, hidden = act(up).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_ATEN = torch.ops.aten


class Act(NamedTuple):
    """An activation: its value as a new tensor, and dg = act'(g) * da, written into `out`."""

    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor, Tensor, Tensor], Any]  # (da, g, out); out may be da


def _gelu(approximate: str) -> Act:
    backward = _ATEN.gelu_backward.grad_input
    return Act(
        lambda g: F.gelu(g, approximate=approximate),
        lambda da, g, out: backward(da, g, approximate=approximate, grad_input=out),
    )


ACTS = {
    "silu": Act(F.silu, lambda da, g, out: _ATEN.silu_backward.grad_input(da, g, grad_input=out)),
    "gelu": _gelu("none"),
    "gelu_tanh": _gelu("tanh"),
    "relu2": Act(
        lambda g: F.relu(g).square(),
        lambda da, g, out: torch.mul(da, F.relu(g).mul_(2), out=out),
    ),
}

_relu_backward = _ATEN.threshold_backward.grad_input
# Of an MLP without a gate.
UNGATED = ACTS | {
    "relu": Act(F.relu, lambda da, g, out: _relu_backward(da, g, 0, grad_input=out)),
}


def gated(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """Return act(gate) * up in new memory, (M, hidden)."""
    return ACTS[act].value(gate).mul_(up)


def gated_backward(
    d_hidden: Tensor, gate: Tensor, up: Tensor, act: str, d_gate: Tensor, d_up: Tensor
) -> None:
    """Write the gradients of `gated`; d_gate may be d_hidden, whose values are then lost.

    Args:
        d_hidden: (M, hidden).
        gate: (M, hidden).
        up: (M, hidden).
        act: a name of ACTS.
        d_gate: (M, hidden), written.
        d_up: (M, hidden), written; in other memory than all the others.

    """
    torch.mul(ACTS[act].value(gate), d_hidden, out=d_up)
    torch.mul(d_hidden, up, out=d_gate)
    ACTS[act].derivative(d_gate, gate, d_gate)
