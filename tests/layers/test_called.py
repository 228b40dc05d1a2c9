"""LinearWithLoRA over a base that is more than its weight, which it calls."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lora_ext import LinearWithLoRA, explain
from tests.layers.test_layers import by_hand, randomised
from tests.numerics import assert_same_up_to_rounding


class HalvedLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


def hooked(linear):
    linear.register_forward_hook(lambda module, args, y: y * 3)
    return linear


def pre_hooked(linear):
    linear.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    return linear


def parametrized(linear):
    class Symmetric(nn.Module):
        def forward(self, weight):
            return weight - 0.5

    nn.utils.parametrize.register_parametrization(linear, "weight", Symmetric())
    return linear


def weight_normed(linear):
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(linear)


def pruned(linear):
    return prune.l1_unstructured(linear, "weight", amount=0.5)


def patched(linear):
    forward = linear.forward
    linear.forward = lambda x: forward(x) + 1
    return linear


def quantized(linear):
    model = nn.Sequential(linear)
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)[0]


COMPOSED = {
    "subclass": lambda linear: HalvedLinear(12, 10),
    "forward_hook": hooked,
    "forward_pre_hook": pre_hooked,
    "parametrization": parametrized,
    "parametrized_weight_norm": nn.utils.parametrizations.weight_norm,
    "parametrized_spectral_norm": nn.utils.parametrizations.spectral_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
    "weight_norm": weight_normed,
    "spectral_norm": nn.utils.spectral_norm,
    "pruned": pruned,
    "forward_replaced": patched,
    "quantized": quantized,
}


@pytest.mark.parametrize("kind", COMPOSED)
@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization:DeprecationWarning")
def test_base_that_is_more_than_its_weight_is_called(kind):
    torch.manual_seed(1)
    base = COMPOSED[kind](nn.Linear(12, 10)).eval()  # eval: spectral_norm changes when training
    layer = randomised(LinearWithLoRA(base, 3, 1.5)).eval()
    x = torch.randn(5, 12, requires_grad=True)
    y = layer(x)
    want = base(x) + 1.5 * (x @ layer.lora.A @ layer.lora.B)
    torch.testing.assert_close(y, want)
    assert explain(layer).startswith("runs linear(x) + lora(x), composed:")
    dy = torch.randn(5, 10)
    ours, theirs = (
        torch.autograd.grad(t, [layer.lora.A, layer.lora.B], dy, retain_graph=True)
        for t in (y, want)
    )
    for mine, other in zip(ours, theirs, strict=True):
        assert_same_up_to_rounding(mine, other)


class KeepsItsResult(nn.Linear):
    def forward(self, x):
        self.kept = super().forward(x)
        return self.kept


@pytest.mark.parametrize("grad", [False, True])
def test_the_result_of_another_class_is_not_written_to(grad):
    layer = randomised(LinearWithLoRA(KeepsItsResult(12, 10), 3, 1.0))
    x = torch.randn(5, 12)
    with torch.set_grad_enabled(grad):
        assert_same_up_to_rounding(layer(x), by_hand(layer, x))
        y = layer(x)
    base = layer.linear
    assert torch.equal(base.kept, nn.functional.linear(x, base.weight, base.bias))
    assert not torch.equal(y, base.kept)


def test_hook_added_later_is_run_and_removed_again():
    layer = randomised(LinearWithLoRA(nn.Linear(12, 10), 3, 1.0))
    x = torch.randn(5, 12)
    seen = []
    for module in (layer.linear, layer.lora):
        handle = module.register_forward_hook(lambda m, args, y: seen.append(type(m)))
        torch.testing.assert_close(layer(x), by_hand(layer, x))
        assert seen.count(type(module)) >= 1
        handle.remove()
        seen.clear()
    layer(x)
    assert seen == []


def test_full_backward_hook_on_the_linear_is_run():
    layer = randomised(LinearWithLoRA(nn.Linear(12, 10), 3, 1.0))
    seen = []
    layer.linear.register_full_backward_hook(lambda m, grad_in, grad_out: seen.append(grad_out))
    layer(torch.randn(5, 12, requires_grad=True)).sum().backward()
    assert len(seen) == 1


def test_global_hook_sees_the_linear():
    layer = randomised(LinearWithLoRA(nn.Linear(12, 10), 3, 1.0))
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, y: seen.append(type(m)))
    try:
        layer(torch.randn(5, 12))
    finally:
        handle.remove()
    assert nn.Linear in seen and LinearWithLoRA in seen


def test_backend_by_name_over_a_base_it_cannot_run_raises():
    layer = LinearWithLoRA(HalvedLinear(12, 10), 3, 1.0, backend="reference")
    with pytest.raises(ValueError, match="backend 'reference' can't run this layer: .*HalvedLin"):
        layer(torch.randn(2, 12))
