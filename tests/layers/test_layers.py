"""LoRALayer and LinearWithLoRA: drop-ins for the reference classes, over any base."""

import pytest
import torch
from torch import nn

from lora_ext import (
    LinearWithLoRA,
    LoRALayer,
    explain,
    group_,
    lora_linear,
    replace_linear_with_lora,
)
from lora_ext.testing import Case, broken_rules, expected
from lora_ext.testing import LinearWithLoRA as PlainLinearWithLoRA
from lora_ext.testing import LoRALayer as PlainLoRALayer
from tests.conftest import Backend
from tests.numerics import assert_same_up_to_rounding

CASE = Case((5,), 12, 10, 3)


def randomised(layer: LinearWithLoRA) -> LinearWithLoRA:
    """Set B at random: at zero it hides the low-rank part."""
    nn.init.normal_(layer.lora.B)
    return layer


def by_hand(layer: LinearWithLoRA, x: torch.Tensor) -> torch.Tensor:
    """Compute what the plain layer would, calling the layer's own linear."""
    A, B = (p.to(x.dtype) for p in (layer.lora.A, layer.lora.B))
    return layer.linear(x) + layer.lora.scale * (x @ A @ B)


def test_same_seed_gives_the_reference_layer():
    torch.manual_seed(3)
    plain = PlainLoRALayer(48, 20, 6, 2.0)
    after_plain = torch.rand(1)
    torch.manual_seed(3)
    ours = LoRALayer(48, 20, 6, 2.0)
    assert torch.equal(torch.rand(1), after_plain), "more or fewer random numbers were drawn"
    assert torch.equal(ours.A, plain.A) and torch.equal(ours.B, plain.B)
    assert not ours.B.any()
    nn.init.normal_(ours.B)
    plain.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(4, 48)
    torch.testing.assert_close(ours(x), plain(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_checkpoints_exchange_with_the_reference_class(dtype, bias):
    make = [
        lambda cls: cls(nn.Linear(12, 10, bias=bias), 3, 1.5).to(dtype)
        for cls in (LinearWithLoRA, PlainLinearWithLoRA)
    ]
    ours, plain = make[0](LinearWithLoRA), make[1](PlainLinearWithLoRA)
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in plain.named_parameters()]
    x = torch.randn(7, 12).to(dtype)
    nn.init.normal_(plain.lora.B)
    ours.load_state_dict(plain.state_dict(), strict=True)
    assert_same_up_to_rounding(ours(x), plain(x))
    nn.init.normal_(randomised(ours).linear.weight)
    plain.load_state_dict(ours.state_dict(), strict=True)
    assert_same_up_to_rounding(ours(x), plain(x))


def test_layer_keeps_the_error_rule(backend: Backend):
    want = expected(CASE)
    layer = LinearWithLoRA(nn.Linear(12, 10), 3, CASE.alpha, backend=backend.name)
    names = ("linear.weight", "linear.bias", "lora.A", "lora.B")
    layer.load_state_dict(dict(zip(names, list(want.inputs.values())[1:5], strict=True)))
    x = want.inputs["x"].clone().requires_grad_()
    y = layer(x)
    y.backward(want.inputs["dy"])
    got = {"y": y.detach(), "dx": x.grad, "dweight": layer.weight.grad, "dbias": layer.bias.grad}
    got |= {"dA": layer.lora.A.grad, "dB": layer.lora.B.grad}
    assert broken_rules(got, want) == []


@pytest.mark.parametrize(
    ("scaling", "scale"), [("alpha", 8.0), ("alpha/rank", 2.0), ("alpha/sqrt(rank)", 4.0)]
)
def test_scaling_sets_the_factor(backend: Backend, scaling, scale):
    linear = nn.Linear(12, 10)
    layer = LinearWithLoRA(linear, 4, 8.0, scaling=scaling, backend=backend.name)
    randomised(layer)
    assert layer.lora.scale == scale
    x = torch.randn(3, 12)
    want = linear(x) + scale * (x @ layer.lora.A @ layer.lora.B)
    torch.testing.assert_close(layer(x), want)
    torch.testing.assert_close(layer.lora(x), want - linear(x), atol=1e-5, rtol=1e-5)
    assert f"scaling={scaling!r}" in repr(layer)


def test_layer_answers_for_its_linear():
    linear = nn.Linear(12, 10)
    layer = LinearWithLoRA(linear, 3, 1.0)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert (layer.in_features, layer.out_features) == (12, 10)
    assert LinearWithLoRA(nn.Linear(3, 2, bias=False), 1, 1.0).bias is None
    assert [n for n, _ in layer.named_parameters()] == [
        "linear.weight",
        "linear.bias",
        "lora.A",
        "lora.B",
    ]


def test_assigned_weight_lands_on_the_linear():
    """How transformers ties a head: output_embeddings.weight = input_embeddings.weight."""
    embedding = nn.Embedding(10, 12)
    layer = LinearWithLoRA(nn.Linear(12, 10), 3, 1.0)
    layer.weight = embedding.weight
    layer.bias = None
    assert layer.linear.weight is embedding.weight and layer.linear.bias is None
    assert "weight" not in layer._parameters and "weight" not in layer.__dict__


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_adapter_dtype_is_one_that_runs(backend: Backend, base):
    layer = randomised(LinearWithLoRA(nn.Linear(12, 10).to(base), 3, 1.0, backend=backend.name))
    assert layer.lora.A.dtype == (torch.float64 if base == torch.float64 else torch.float32)
    x = torch.randn(5, 12, dtype=base)
    assert_same_up_to_rounding(layer(x), by_hand(layer, x))
    same = LinearWithLoRA(nn.Linear(12, 10).to(base), 3, 1.0, dtype=base)
    assert same.lora.B.dtype == base and same(x).dtype == base


def test_meta_base_gives_meta_adapters():
    layer = LinearWithLoRA(nn.Linear(12, 10, device="meta"), 3, 1.0)
    assert layer.lora.A.is_meta and layer.lora.B.is_meta


def test_default_device_of_meta_changes_nothing_for_layers_elsewhere():
    linears = [nn.Linear(n, m) for n, m in ((12, 10), (10, 12))]
    x = torch.randn(5, 12)
    with torch.device("meta"):
        model = nn.Sequential(linears[0], nn.ReLU(), linears[1])
        replace_linear_with_lora(model, 3, 1.0)
        assert model[0].lora.A.any() and not model[0].lora.B.any()
        nn.init.normal_(model[0].lora.B)
        group_(model)
        y = model(x)
    assert_same_up_to_rounding(y, by_hand(model[2], by_hand(model[0], x).relu()))


@pytest.mark.parametrize("lead", [(4,), (2, 3)], ids=["2d", "3d"])
def test_functional_transforms_go_through(lead):
    """torch.func over a functional call: the composed path, which is PyTorch's own operators."""
    layer = randomised(LinearWithLoRA(nn.Linear(12, 10), 3, 1.0))
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    x = torch.randn(*lead, 12)

    def loss(values, x):
        return torch.func.functional_call(layer, values, (x,)).square().sum()

    ours = torch.func.grad(loss)(parameters, x)
    loss(dict(layer.named_parameters()), x).backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    torch.testing.assert_close(each["lora.B"].sum(0), layer.lora.B.grad)


def test_nested_tensor_goes_through():
    layer = randomised(LinearWithLoRA(nn.Linear(12, 10), 3, 1.0))
    parts = [torch.randn(2, 12), torch.randn(5, 12)]
    nested = layer(torch.nested.nested_tensor(parts))
    for got, part in zip(nested.unbind(), parts, strict=True):
        torch.testing.assert_close(got, layer(part))


def test_explain_names_what_runs_and_why_not():
    layer = LinearWithLoRA(nn.Linear(12, 10), 3, 1.0, backend="reference")
    lines = explain(layer, torch.randn(2, 12)).splitlines()
    assert lines[0] == "reference: runs" and any(line.startswith("cpp: ") for line in lines)
    assert explain(layer) == explain(layer, torch.randn(1, 12))
    with pytest.raises(TypeError, match="layer must be a LinearWithLoRA, got Linear"):
        explain(nn.Linear(2, 2))


def test_layer_of_no_rows_and_vectors(backend: Backend):
    layer = randomised(LinearWithLoRA(nn.Linear(12, 10), 3, 1.0, backend=backend.name))
    for lead in ((), (0,), (1,), (2, 0), (2, 3, 4)):
        assert layer(torch.randn(*lead, 12)).shape == (*lead, 10)


def test_linear_of_no_features_gives_what_plain_gives(backend: Backend):
    """nn.Linear(0, n) and (n, 0) are legal in PyTorch."""
    for K, N in ((0, 10), (12, 0)):
        tensors = [torch.zeros(N, K), torch.ones(N), torch.zeros(K, 3), torch.zeros(3, N)]
        x = torch.zeros(5, 2, K, requires_grad=True)
        y = lora_linear(x, *tensors, 1.0, backend=backend.name)
        assert y.shape == (5, 2, N) and torch.equal(y, torch.ones(5, 2, N))
        y.sum().backward()
        assert torch.equal(x.grad, torch.zeros(5, 2, K))
