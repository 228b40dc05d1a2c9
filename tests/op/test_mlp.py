"""lora_mlp: the error rule, what it keeps, second derivatives, its errors, and mutants."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_ext import gated_mlp, lora_mlp
from lora_ext.acts import UNGATED
from tests.op import mlps
from tests.op.acts import PLAIN as GATED
from tests.op.mlps import HIDDEN, K, adapted, kept_elements, plain_layer
from tests.op.test_mutants import changed

PLAIN = GATED | {"relu": F.relu}


def layers_of(kind: str, dropout: float = 0.0) -> list[nn.Module]:
    """Return up and down."""
    up = adapted(K, HIDDEN, 4, dropout, bias=True)
    if kind == "some":
        return [up, nn.Linear(HIDDEN, K)]
    return [up, adapted(HIDDEN, K, 3, dropout, bias=False)]


def plain_mlp(x: Tensor, up: nn.Module, down: nn.Module, act: str) -> Tensor:
    return plain_layer(down, PLAIN[act](plain_layer(up, x)))


def broken(act, kind="each", dtype=torch.float32, dropout=0.0, recompute="act", module=gated_mlp):
    """Return a line for each result that breaks the error rule."""

    def ours(x, *layers):
        return module.lora_mlp(x, *layers, act, recompute=recompute)

    return mlps.broken(ours, partial(plain_mlp, act=act), partial(layers_of, kind, dropout), dtype)


@pytest.mark.parametrize("recompute", ["act", "all"])
@pytest.mark.parametrize(("kind", "dropout"), [("each", 0.0), ("each", 0.3), ("some", 0.3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("act", UNGATED)
def test_mlp_keeps_the_error_rule(act, dtype, kind, dropout, recompute):
    assert broken(act, kind, dtype, dropout, recompute) == []


MUTANTS = {
    "activation_of_another_name": ("return UNGATED[act]", "return UNGATED['gelu']"),
    "derivative_of_another_name": ("UNGATED[act].derivative(", "UNGATED['gelu'].derivative("),
    "derivative_left_out": ("return [d_hidden]", "return [d_hidden * 1.1]"),
    "mask_not_kept": ("scales[i], keeps[i])", "scales[i], None)"),
    "gradients_of_down_first": ("(*of_layers, of_down)", "(of_down, *of_layers)"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_mlp_is_refused(name):
    module = changed("gated_mlp.py", MUTANTS[name])
    try:
        assert any(broken("silu", dropout=p, recompute="all", module=module) for p in (0.0, 0.3))
    except RuntimeError as error:
        assert "_GatedMLPBackward returned" in str(error)


def test_right_mlp_is_accepted():
    assert broken("silu", dropout=0.3, module=changed("gated_mlp.py")) == []


def test_what_is_kept():
    layers = layers_of("each")
    x = torch.randn(64, K, requires_grad=True)
    keeps = {
        r: kept_elements(lambda r=r: lora_mlp(x, *layers, "gelu", recompute=r), x, layers)
        for r in ("act", "all")
    }
    assert keeps["all"] <= 64 * 7
    assert 64 * HIDDEN <= keeps["act"] <= 64 * (HIDDEN + 7)


@pytest.mark.parametrize("recompute", ["act", "all"])
def test_backward_twice_gives_the_same_bits(recompute):
    layers = layers_of("each", 0.3)
    x = torch.randn(9, K, requires_grad=True)
    y = lora_mlp(x, *layers, "gelu", recompute=recompute)
    wrt = [x, *(p for layer in layers for p in layer.parameters())]
    first, again = (torch.autograd.grad(y.sum(), wrt, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
def test_second_derivatives(act):
    layers = [layer.double() for layer in layers_of("each", 0.3)]
    x = torch.randn(2, K, dtype=torch.float64, requires_grad=True)
    wrt = [x, *(p for layer in layers for p in layer.parameters())]
    found = []
    for mlp in (lora_mlp, plain_mlp):
        torch.manual_seed(2)
        first = torch.autograd.grad(mlp(x, *layers, act).square().sum(), wrt, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), wrt)
        found.append([*first, *second])
    for got, want in zip(*found, strict=True):
        assert (got - want).abs().max() <= 1e3 * torch.finfo(torch.float64).eps * want.abs().max()


def test_arguments_are_checked():
    up, down = layers_of("each")
    x = torch.ones(1, K)
    with pytest.raises(ValueError, match="act must be one of 'silu', .*'relu', got 'tanh'"):
        lora_mlp(x, up, down, "tanh")
    with pytest.raises(ValueError, match="recompute must be 'act' or 'all', got 'none'"):
        lora_mlp(x, up, down, "silu", recompute="none")
    with pytest.raises(TypeError, match="up must be a module, got NoneType"):
        lora_mlp(x, None, down, "silu")
