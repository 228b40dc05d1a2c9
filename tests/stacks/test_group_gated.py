"""group_ on gated MLPs: found by what a module computes, whatever its layers are called."""

import copy

import pytest
import torch
from torch import nn

from lora_ext import group_, replace_linear_with_lora
from tests.stacks.grouped import X, assert_same_outcomes, lora_layers


class MLP(nn.Module):
    """A gated MLP whose formula a test may change."""

    def __init__(self, formula=None, act=nn.functional.silu):
        super().__init__()
        self.first, self.second = nn.Linear(24, 40), nn.Linear(24, 40)  # names that say nothing
        self.third = nn.Linear(40, 24)
        self.act, self.formula = act, formula
        replace_linear_with_lora(self, 4, 2.0, dropout=0.2, dropout_mask="torch")
        for layer in lora_layers(self):
            nn.init.normal_(layer.lora.B)

    def forward(self, x):
        if self.formula is not None:
            return self.formula(self, x)
        return self.third(self.act(self.first(x)) * self.second(x))


FORMULAS = {
    "clamp": lambda m, x: m.third(m.act(m.first(x).clamp(max=7)) * m.second(x)),
    "other_activation": lambda m, x: m.third(m.first(x).tanh() * m.second(x)),
    "scaled": lambda m, x: m.third(m.act(m.first(x)) * m.second(x)) * 1.01,
    "up_before_gate": lambda m, x: m.third(m.second(x) * m.act(m.first(x))),
    "residual": lambda m, x: x + m.third(m.act(m.first(x)) * m.second(x)),
    "dropout": lambda m, x: nn.functional.dropout(
        m.third(m.act(m.first(x)) * m.second(x)), 0.1, m.training
    ),
    "a_tuple": lambda m, x: (m.third(m.act(m.first(x)) * m.second(x)),),
    "fails": lambda m, x: m.missing(x),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_module_that_is_no_gated_mlp_is_left(name):
    model = MLP(FORMULAS[name])
    state = torch.get_rng_state()
    report = group_(model)
    assert not report.mlps
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("recompute", ["act", "all"])
@pytest.mark.parametrize(
    ("act", "name"),
    [
        (nn.functional.silu, "silu"),
        (nn.functional.gelu, "gelu"),
        (nn.GELU("tanh"), "gelu_tanh"),
        (lambda g: nn.functional.relu(g) ** 2, "relu2"),
    ],
)
def test_a_gated_mlp_is_found_by_what_it_computes(act, name, recompute):
    single = MLP(act=act)
    model = copy.deepcopy(single)
    report = group_(model, recompute=recompute)
    (mlp,) = report.mlps.values()
    assert (mlp.first, mlp.down, mlp.act) == (("first", "second"), "third", name)
    x = X.clone().requires_grad_()
    assert "GatedMLP" in type(model(x).grad_fn).__name__
    assert_same_outcomes(model, single, X)
    model.third = copy.deepcopy(single.third)
    assert_same_outcomes(model, single, X)
    assert "others than those that were probed" in str(report)
