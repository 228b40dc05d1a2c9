"""What the tests of group_ share: one training run, one call's outcome, and how both compare."""

import torch
from torch import nn

from lora_ext import LinearWithLoRA
from tests.numerics import assert_same_up_to_rounding

X = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))


def lora_layers(model: nn.Module) -> list[LinearWithLoRA]:
    return [m for m in model.modules() if isinstance(m, LinearWithLoRA)]


def train(model: nn.Module, steps: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the losses and the random state at the end."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    torch.manual_seed(5)
    losses = []
    tokens = torch.randint(3, 99, (2, 17), generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().double())
    return torch.stack(losses), torch.get_rng_state()


def assert_same_training(got, want) -> None:
    (losses, state), (other_losses, other_state) = got, want
    assert losses[-1] < losses[0]
    # AdamW turns a rounding in a small gradient into a step: 1e-6 to 1e-5 after ten of them.
    torch.testing.assert_close(losses, other_losses, rtol=3e-5, atol=0)
    assert torch.equal(state, other_state)


def outcome(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(1)
    x = x.detach().requires_grad_()
    y = model(x)
    model.zero_grad()
    y.square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    return [y, x.grad, *grads, torch.get_rng_state()]


def assert_same_outcomes(model, single, x, times: int = 3) -> None:
    for _ in range(times):
        *got, state = outcome(model, x)
        *want, other = outcome(single, x)
        for one, another in zip(got, want, strict=True):
            assert_same_up_to_rounding(one, another)
        assert torch.equal(state, other)


def graph_of(y: torch.Tensor) -> set[str]:
    """Return the names of the backward's nodes."""
    names, todo = set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        names.add(type(node).__name__)
        todo += [n for n, _ in node.next_functions if n is not None]
    return names
