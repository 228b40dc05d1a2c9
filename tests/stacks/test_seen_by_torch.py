"""What PyTorch's own tools see of the operators: FlopCounterMode, and make_fx with symbols."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import lora_ext.flops  # noqa: F401  registers the formulas
from lora_ext import LinearWithLoRA, lora_linear, lora_linears
from lora_ext.testing import plain_linear

M, K, N, R = 40, 24, 56, 4


def tensors(*wanted: str) -> dict[str, torch.Tensor]:
    """Return x, weight, bias, A and B, with a gradient where wanted."""
    sizes = {"x": (M, K), "weight": (N, K), "bias": (N,), "A": (K, R), "B": (R, N)}
    return {n: torch.randn(s, requires_grad=n in wanted) for n, s in sizes.items()}


def flops_of(run) -> int:
    with FlopCounterMode(display=False) as counted:
        run()
    return counted.get_total_flops()


def step(linear, given: dict[str, torch.Tensor]):
    """Return what runs a linear forward, and backward where something has a gradient."""

    def run() -> None:
        y = linear(*given.values(), 0.5)
        if y.requires_grad:
            y.sum().backward()

    return run


@pytest.mark.parametrize(
    "wanted", ["", "A B", "x A B", "x", "x weight bias A B", "B", "weight"], ids=lambda w: w or "no"
)
def test_flops_are_those_of_the_plain_products(wanted):
    """By hand, and as PyTorch counts the plain layer; but t = dy @ B.T is not needed for dB."""
    got = flops_of(step(lora_linear, tensors(*wanted.split())))
    base, over_K, over_N = 2 * M * N * K, 2 * M * R * K, 2 * M * R * N
    want = base + over_K + over_N
    dx, dweight, dA, dB = (name in wanted.split() for name in ("x", "weight", "A", "B"))
    want += (dx + dweight) * base + (dx or dA) * over_N + (dx + dA) * over_K + dB * over_N
    assert got == want
    assert got == flops_of(step(plain_linear, tensors(*wanted.split())))


def test_a_groups_flops_are_its_layers():
    layers = [LinearWithLoRA(nn.Linear(K, n), r, 1.0) for n, r in ((N, R), (8, 2))]
    x = torch.randn(M, K, requires_grad=True)

    def run(ys) -> None:
        sum(y.sum() for y in ys()).backward()

    of_group = flops_of(lambda: run(lambda: lora_linears(x, layers)))
    assert of_group == flops_of(lambda: run(lambda: [layer(x) for layer in layers])) > 0


@pytest.mark.slow
def test_formulas_are_there_without_being_asked_for_where_the_counter_is():
    code = (
        "import torch; from torch.utils.flop_counter import flop_registry; import lora_ext;"
        "assert torch.ops.lora_ext.linear_fwd in flop_registry"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_make_fx_keeps_the_number_of_rows_a_symbol(dropout):
    layer = LinearWithLoRA(nn.Linear(K, N), R, 1.0, dropout=dropout)
    nn.init.normal_(layer.lora.B)
    parameters = tuple(layer.parameters())

    def run(x):
        return torch.autograd.grad(layer(x).square().sum(), parameters)

    traced = make_fx(run, tracing_mode="symbolic", _allow_non_fake_inputs=True)(torch.randn(6, K))
    for rows in (6, 9, 1):
        x = torch.randn(rows, K)
        torch.manual_seed(0)
        want = run(x)
        torch.manual_seed(0)
        for got, wanted in zip(traced(x), want, strict=True):
            assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
