"""group_ on modules written by hand: layers called twice, shared, in lists, in another order.

Grouped and single layers draw the same masks and leave the generator alike, also in the very call
that shows that siblings are not called as before.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_ext import LinearWithLoRA, group_, replace_linear_with_lora, ungroup_
from tests.numerics import assert_same_up_to_rounding

H = 24


class Attention(nn.Module):
    """q, k, v and o, whose forward is `formula`."""

    def __init__(self, formula):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(H, H) for _ in range(3))
        self.o = nn.Linear(H, H)
        self.formula = formula
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.formula(self, x)


FORMULAS = {
    # name: (forward, what runs together at the end)
    "twice_with_one_x": (lambda m, x: m.o(m.q(x) * m.k(x) + m.q(x) * m.v(x)), "q+k and q+v"),
    "twice_with_another_x": (lambda m, x: m.o(m.q(x) * m.k(x) + m.q(m.v(x))), "q+k+v"),
    "a_loop": (
        lambda m, x: m.o(sum(m.q(y) * m.k(y) for y in (x.tanh(), x.sin()))),
        "q+k and q+k",
    ),
    "another_order_later": (
        lambda m, x: m.o(m.q(x) + (m.k(x) - m.v(x) if m.calls < 3 else -m.v(x) + m.k(x))),
        "q+v+k",
    ),
    "another_x_in_turn": (
        lambda m, x: m.o(m.q(x) + m.k(y := x if m.calls % 2 else 2 * x) * m.v(y)),
        None,
    ),
    "one_left_out_later": (
        lambda m, x: m.o(m.q(x) + m.k(x) + (0 * m.v(x) if m.calls < 3 else 0)),
        None,
    ),
}


def trained(model: nn.Module, calls: int = 6) -> list[torch.Tensor]:
    """Return what each step gives, its gradients, and the generator's state after it."""
    results = []
    for step in range(calls):
        torch.manual_seed(step)
        x = torch.randn(2, 5, H, dtype=torch.float64, requires_grad=True)
        model.zero_grad()
        y = model(x)
        y.square().mean().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results += [y.detach(), x.grad, torch.cat([g.flatten() for g in gradients])]
        results.append(torch.get_rng_state().double())
    return results


def adapted(model: nn.Module, dropout: float) -> nn.Module:
    torch.manual_seed(0)
    replace_linear_with_lora(model.double(), 4, 2.0, dropout=dropout, dropout_mask="torch")
    for module in model.modules():
        if isinstance(module, LinearWithLoRA):
            nn.init.normal_(module.lora.B, std=0.1)
    return model


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", FORMULAS)
def test_layers_called_in_all_ways_give_what_they_give_alone(name, dropout):
    formula, together = FORMULAS[name]
    if name == "one_left_out_later" and dropout:
        formula = FORMULAS["another_order_later"][0]  # what is drawn for v goes to o's mask then
    single = adapted(Attention(formula), dropout)
    model = copy.deepcopy(single)
    report = group_(model)
    for got, want in zip(trained(model), trained(single), strict=True):
        assert_same_up_to_rounding(got, want)
    if together and (dropout or name != "another_order_later"):
        assert f"run {together} together" in str(report)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_one_module_under_two_names(dropout):
    single = Attention(lambda m, x: m.o(m.q(x) * m.k(x) + m.v(x)))
    single.v = single.k
    adapted(single, dropout)
    assert single.v is single.k
    model = copy.deepcopy(single)
    report = group_(model)
    for got, want in zip(trained(model), trained(single), strict=True):
        assert_same_up_to_rounding(got, want)
    assert "run q+k together" in str(report)
    assert ungroup_(model) == 4
    assert all("_lora_base" not in type(m).__dict__ for m in model.modules())


@pytest.mark.parametrize("container", [nn.ModuleList, nn.ModuleDict])
def test_siblings_in_a_container(container):
    linears = [nn.Linear(H, H) for _ in range(3)]
    named = {name: linear for name, linear in zip("abc", linears, strict=True)}
    held = container(linears if container is nn.ModuleList else named)
    single = adapted(Attention(lambda m, x: sum(layer(x) for layer in layers_of(m.held))), 0.3)
    single.held = adapted(held, 0.3)
    model = copy.deepcopy(single)
    report = group_(model)
    for got, want in zip(trained(model), trained(single), strict=True):
        assert_same_up_to_rounding(got, want)
    names = "012" if container is nn.ModuleList else "abc"
    assert f"run {'+'.join(f'held.{n}' for n in names)} together" in str(report)


def layers_of(held):
    return held.values() if isinstance(held, nn.ModuleDict) else held


def test_traced_and_on_meta():
    model = adapted(Attention(lambda m, x: m.o(F.softmax(m.q(x) * m.k(x), -1) * m.v(x))), 0.0)
    group_(model)
    x = torch.randn(200, H, dtype=torch.float64)
    with torch.no_grad():
        want = [model(x) for _ in range(2)][-1]
        traced = torch.jit.trace(model, x)
        assert_same_up_to_rounding(traced(x), want)
    model.to("meta")
    assert model(x.to("meta")).shape == want.shape
