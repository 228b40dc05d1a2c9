"""What a provider makes of a case: a call without arguments, what it returns, and its masks.

It returns y and, in mode "fwd_bwd", the gradients, fresh at each call.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_ext.dropout import draw_keep, pack_bits

from . import Case


def hash_mask(case: Case) -> Tensor:
    """Draw dropout's mask as lora_ext does, as bits."""
    return draw_keep(case.x, case.dropout)


def torch_mask(case: Case) -> Tensor:
    """Draw dropout's mask as `F.dropout` does on x, as bits."""
    return pack_bits(
        F.dropout(torch.ones_like(case.x, requires_grad=case.training), case.dropout) != 0
    )


class Step(NamedTuple):
    """A call to time, and what it returns.

    run() gives a tensor for each of `names`: "y", "dx", "dA", "dB", with ".T" appended where the
    provider holds the transpose. `held` are the inputs and parameters. `mask` gives the mask that
    dropout would draw next. `checked` is what the gate runs where that is another call than `run`.
    """

    run: Callable[[], tuple[Tensor, ...]]
    names: tuple[str, ...]
    held: tuple[Tensor, ...]
    mask: Callable[[Case], Tensor] = torch_mask
    checked: Callable[[], tuple[Tensor, ...]] | None = None

    def results(self) -> dict[str, Tensor]:
        """Run once and return the tensors by name, transposes undone."""
        pairs = zip(self.names, (self.checked or self.run)(), strict=True)
        return {n.removesuffix(".T"): t.T if n.endswith(".T") else t for n, t in pairs}


def step_of(case: Case, layer: Callable[[Tensor], Tensor], inputs: dict[str, Tensor]) -> Step:
    """Return the step that calls a layer; `inputs` are what a training step has gradients of."""
    x, dy = case.x, case.dy
    held = (x, case.weight, case.bias, case.A, case.B, *inputs.values())
    if not case.training:
        return Step(lambda: (layer(x),), ("y",), held)
    wanted = tuple(inputs.values())

    def run() -> tuple[Tensor, ...]:
        y = layer(x)
        return y, *torch.autograd.grad(y, wanted, dy)

    return Step(run, ("y", *inputs), held)
