"""A small model trained in some stack, held to what the plain layer does in the same stack."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_ext import LinearWithLoRA, mark_only_lora_as_trainable, replace_linear_with_lora
from lora_ext.testing import NORMS, compare
from lora_ext.testing import LoRALayer as PlainLoRALayer
from lora_ext.testing import replace_linear_with_lora as replace_plain

STEPS = 6
RANK, ALPHA = 4, 2.0


class MLP(nn.Module):
    """Two residual blocks of two linears each, and a head."""

    def __init__(self, width: int = 16, classes: int = 8):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Block(nn.Module):
    """x + down(gelu(up(x)))."""

    def __init__(self, width: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


def make_models(dtype: torch.dtype = torch.float32) -> dict[str, nn.Module]:
    """Return the same adapted MLP as "ours", "plain" and "exact" (plain, float64); B is random."""
    torch.manual_seed(3)
    ours, plain = MLP(), MLP()
    replace_linear_with_lora(ours, RANK, ALPHA)
    replace_plain(plain, RANK, ALPHA)
    for module in ours.modules():
        if isinstance(module, LinearWithLoRA):
            nn.init.normal_(module.lora.B, std=0.2)
    plain.load_state_dict(ours.state_dict(), strict=True)
    mark_only_lora_as_trainable(ours)
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(".lora." in name)
    exact = copy.deepcopy(plain).double()
    return {"ours": ours.to(dtype), "plain": plain.to(dtype), "exact": exact}


def batches(steps: int = STEPS, rows: int = 8, width: int = 16) -> list[tuple[Tensor, Tensor]]:
    """Return a batch for each step: x (rows, 3, width), and which of its first eight is largest."""
    g = torch.Generator("cpu").manual_seed(1)  # the same numbers on every device
    x = torch.randn(steps, rows, 3, width, generator=g, device="cpu")
    x = x.to(torch.get_default_device())
    return list(zip(x, x[..., :8].argmax(-1), strict=True))


def loss_of(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Return the mean cross entropy, in float32 or wider, x cast to the model's dtype."""
    dtype = next(p.dtype for n, p in model.named_parameters() if "lora" not in n)
    logits = model(x.to(dtype)).flatten(0, -2)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return nn.functional.cross_entropy(logits.to(wide), target.flatten())


@dataclass
class Trained:
    """What a run leaves: a loss a step, and the trained parameters and last gradients by name."""

    losses: Tensor
    state: dict[str, Tensor]


Backward = Callable[[nn.Module, Tensor, Tensor], Tensor]


def one_backward(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Run forward and backward once, and return the loss."""
    loss = loss_of(model, x, target)
    loss.backward()
    return loss.detach()


def train(
    model: nn.Module,
    backward: Backward = one_backward,
    data: Iterable[tuple[Tensor, Tensor]] | None = None,
    step: Callable[[torch.optim.Optimizer], object] = lambda optimizer: optimizer.step(),
) -> Trained:
    """Train with SGD and momentum for a step a batch."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(named.values(), lr=0.03, momentum=0.9)
    losses = []
    for x, target in batches() if data is None else data:
        optimizer.zero_grad()
        losses.append(float(backward(model, x, target)))
        step(optimizer)
    state = {n: p.detach().clone() for n, p in named.items()}
    state |= {f"{n}.grad": p.grad.clone() for n, p in named.items()}
    return Trained(torch.tensor(losses, dtype=torch.float64), state)


def assert_trains_like_plain(
    ours: Trained, plain: Trained, exact: Trained, dtype: torch.dtype = torch.float32
) -> None:
    """Assert that ours is at most twice as far from the float64 run as the plain layer is.

    The error rule over a whole run: losses, trained parameters and last gradients, with the
    roundings of a few operations in `dtype` for a floor.
    """
    assert exact.losses[-1] < 0.95 * exact.losses[0], "nothing was learnt"
    assert list(ours.state) == list(plain.state) == list(exact.state)
    assert len(ours.state) == 20  # A and B of five layers, and their gradients
    eps = torch.finfo(dtype).eps
    for name, want in {"losses": exact.losses, **exact.state}.items():
        mine, other = (r.losses if name == "losses" else r.state[name] for r in (ours, plain))
        assert want.any(), name
        found = compare(name, mine, other, want, lambda norm, want=want: 4 * eps * norm(want))
        for error in found:
            assert error.plain < 0.5 * NORMS[error.norm](want), f"the plain run has left: {error}"
            assert not error.broken, error


class PlainMixedLoRALayer(PlainLoRALayer):
    """The plain layer over a half-precision base with float32 A and B: cast where they are used."""

    def forward(self, x: Tensor) -> Tensor:
        return self.alpha * (x @ self.A.to(x.dtype) @ self.B.to(x.dtype))


def with_float32_adapters(model: nn.Module) -> nn.Module:
    """Return a half-precision model with A and B in float32, as LinearWithLoRA keeps them."""
    for module in model.modules():
        if type(module) is PlainLoRALayer:
            module.__class__ = PlainMixedLoRALayer
    for name, parameter in model.named_parameters():
        if ".lora." in name:
            parameter.data = parameter.data.float()
    return model
