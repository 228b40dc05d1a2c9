"""lora_gated_mlp: the error rule, what it keeps, what it falls back on, and mutants."""

import copy
from functools import partial
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from lora_ext import gated_mlp, lora_gated_mlp
from lora_ext.acts import ACTS
from lora_ext.testing import compare
from tests.op import mlps
from tests.op.acts import PLAIN
from tests.op.mlps import HIDDEN, K, adapted, kept_elements, plain_layer
from tests.op.test_mutants import changed

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def layers_of(kind: str, dropout: float = 0.0) -> list[nn.Module | None]:
    """Return gate, up and down."""
    down = adapted(HIDDEN, K, 3, dropout, bias=False)
    if kind == "fused":
        return [adapted(K, 2 * HIDDEN, 4, dropout, bias=True), None, down]
    gate = adapted(K, HIDDEN, 4, dropout, bias=True)
    if kind == "some":  # up and down without an adapter
        return [gate, nn.Linear(K, HIDDEN), nn.Linear(HIDDEN, K)]
    return [gate, adapted(K, HIDDEN, 2, dropout, bias=False), down]


def plain_mlp(x: Tensor, gate, up, down, act: str) -> Tensor:
    first = plain_layer(gate, x)
    g, u = first.chunk(2, -1) if up is None else (first, plain_layer(up, x))
    return plain_layer(down, PLAIN[act](g) * u)


def broken(act: str, kind: str, dtype, dropout=0.0, recompute="act", module=gated_mlp):
    """Return a line for each result that breaks the error rule."""

    def ours(x, *layers):
        return module.lora_gated_mlp(x, *layers, act, recompute=recompute)

    return mlps.broken(ours, partial(plain_mlp, act=act), partial(layers_of, kind, dropout), dtype)


@pytest.mark.parametrize("recompute", ["act", "all"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["each", "fused", "some"])
@pytest.mark.parametrize("act", ACTS)
def test_mlp_keeps_the_error_rule(act, kind, dtype, dropout, recompute):
    assert broken(act, kind, dtype, dropout, recompute) == []


def assert_rule(got, layers, run) -> None:
    """Hold results to those of `run(layers, dtype)` in float32 and, the oracle, in float64."""
    plain = run(layers, torch.float32)
    exact = run([copy.deepcopy(layer).double() for layer in layers], torch.float64)
    for i, (one, other, want) in enumerate(zip(got, plain, exact, strict=True)):
        floor = 4 * torch.finfo(one.dtype).eps
        found = compare(f"result {i}", one, other, want, lambda n, w=want, f=floor: f * n(w))
        assert not [str(error) for error in found if error.broken]


def refused(module: ModuleType) -> bool:
    cases = [("each", 0.0, "act"), ("each", 0.3, "all"), ("fused", 0.0, "act")]
    return any(broken("silu", k, torch.float32, p, r, module) for k, p, r in cases)


MUTANTS = {
    "activation_of_another_name": ("gated(name, gate, up, act)", "gated(name, gate, up, 'gelu')"),
    "gradients_of_another_activation": ("gate, up, act, d_gate", "gate, up, 'gelu', d_gate"),
    "gate_and_up_swapped": ("results = [d_gate, d_up]", "results = [d_up, d_gate]"),
    "halves_swapped": ("(d_gate, d_up) = ys[0].chunk", "(d_up, d_gate) = ys[0].chunk"),
    "product_without_the_activation": ("gated(name, gate, up, act)", "gate.mul(up)"),
    "mask_not_kept": ("scales[i], keeps[i])", "scales[i], None)"),
    "gradients_of_down_first": ("(*of_layers, of_down)", "(of_down, *of_layers)"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_mlp_is_refused(name):
    try:
        assert refused(changed("gated_mlp.py", MUTANTS[name]))
    except RuntimeError as error:
        assert "_GatedMLPBackward returned" in str(error)


def test_right_mlp_is_accepted():
    assert not refused(changed("gated_mlp.py"))


@pytest.mark.parametrize("kind", ["each", "fused"])
def test_what_is_kept(kind):
    layers = layers_of(kind)
    x = torch.randn(64, K, requires_grad=True)
    ranks = sum(layer.lora.rank for layer in layers if layer)
    keeps = {
        r: kept_elements(lambda r=r: lora_gated_mlp(x, *layers, "silu", recompute=r), x, layers)
        for r in ("act", "all")
    }
    assert keeps["all"] <= 64 * ranks
    assert 64 * 2 * HIDDEN <= keeps["act"] <= 64 * (2 * HIDDEN + ranks)
    composed = kept_elements(lambda: plain_mlp(x, *layers, "silu"), x, layers)
    assert keeps["act"] <= 0.52 * composed


@pytest.mark.parametrize("recompute", ["act", "all"])
def test_backward_twice_gives_the_same_bits_and_writes_into_nothing_kept(recompute):
    layers = layers_of("each", 0.3)
    x = torch.randn(9, K, requires_grad=True)
    y = lora_gated_mlp(x, *layers, "gelu", recompute=recompute)
    wrt = [x, *(p for layer in layers for p in layer.parameters())]
    dy = torch.randn_like(y)
    before = dy.clone()
    runs = [torch.autograd.grad(y, wrt, dy, retain_graph=True) for _ in range(3)]
    for run in runs[1:]:
        assert all(map(torch.equal, runs[0], run))
    assert torch.equal(dy, before)


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("kind", ["each", "fused", "some"])
def test_second_derivatives(kind, act):
    layers = [layer and layer.double() for layer in layers_of(kind, 0.3)]
    x = torch.randn(2, K, dtype=torch.float64, requires_grad=True)
    wrt = [x, *(p for layer in layers if layer for p in layer.parameters())]
    found = []
    for mlp in (lora_gated_mlp, plain_mlp):
        torch.manual_seed(2)
        first = torch.autograd.grad(mlp(x, *layers, act).square().sum(), wrt, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), wrt)
        found.append([*first, *second])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def frozen_bases(layers):
    for layer in layers:
        layer.linear.requires_grad_(False)


def down_alone(layers):
    for layer in layers[:2]:
        layer.requires_grad_(False)


def biases(layers):
    for layer in layers:
        layer.requires_grad_(False)
    layers[0].linear.bias.requires_grad_()


def one_A(layers):
    for layer in layers:
        layer.requires_grad_(False)
    layers[1].lora.A.requires_grad_()
    layers[2].lora.B.requires_grad_()


@pytest.mark.parametrize(
    "trained", [frozen_bases, down_alone, biases, one_A], ids=lambda f: f.__name__
)
def test_gradients_of_some_alone(trained):
    layers = layers_of("each")
    trained(layers)
    x = torch.randn(9, K)

    def run(layers, dtype, mlp=plain_mlp):
        y = mlp(x.to(dtype), *layers, "silu")
        parameters = [p for m in layers for p in m.parameters() if p.requires_grad]
        return torch.autograd.grad(y.square().sum(), parameters)

    assert_rule(run(layers, torch.float32, lora_gated_mlp), layers, run)


def test_autocast_and_no_grad():
    layers = layers_of("each")
    x = torch.randn(9, K)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, plain = lora_gated_mlp(x, *layers, "silu"), plain_mlp(x, *layers, "silu")
    assert y.dtype == torch.bfloat16 == plain.dtype
    assert (y - plain).float().norm() <= 0.01 * plain.float().norm()
    with torch.no_grad():
        y = lora_gated_mlp(x.repeat(200, 1), *layers, "silu")
        assert_rule([y[:9]], layers, lambda of, dtype: [plain_mlp(x.to(dtype), *of, "silu")])


def test_layers_with_hooks_are_called():
    layers = layers_of("each", 0.3)
    calls = []
    x = torch.randn(9, K, requires_grad=True)

    def run(layers, dtype):
        torch.manual_seed(2)
        return [plain_mlp(x.detach().to(dtype), *layers, "silu").detach()]

    hook = layers[1].register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(2)
    y = lora_gated_mlp(x, *layers, "silu")
    hook.remove()
    assert_rule([y.detach()], layers, run)
    assert calls == [1] and "GatedMLP" not in type(y.grad_fn).__name__


def test_arguments_are_checked():
    gate, up, down = layers_of("each")
    x = torch.ones(1, K)
    with pytest.raises(ValueError, match="act must be one of 'silu', .*, got 'tanh'"):
        lora_gated_mlp(x, gate, up, down, "tanh")
    with pytest.raises(ValueError, match="recompute must be 'act' or 'all', got 'none'"):
        lora_gated_mlp(x, gate, up, down, "silu", recompute="none")
    with pytest.raises(TypeError, match="down must be a module, got NoneType"):
        lora_gated_mlp(x, gate, up, None, "silu")
    with pytest.raises(ValueError, match=r"x must have shape \(..., 40\), got \(1, 39\)"):
        lora_gated_mlp(x[:, 1:], gate, up, down, "silu")
