"""Layers over quantised linears: torchao's, which are called, and bitsandbytes'."""

import pytest
import torch
from torch import nn

from lora_ext import (
    LinearWithLoRA,
    explain,
    load_adapter,
    mark_only_lora_as_trainable,
    merge_,
    replace_linear_with_lora,
    save_adapter,
)
from lora_ext.called import lora_delta
from lora_ext.testing import Case, make_inputs
from lora_ext.testing import LinearWithLoRA as PlainLinearWithLoRA
from tests.layers.test_inject import names_of
from tests.numerics import assert_same_up_to_rounding
from tests.training import MLP, batches, train

TARGETS = ["up", "down", "head"]
X = batches()[0][0]


def by_torchao(config):
    def quantise(model):
        name = "needs the package torchao"
        quantization = pytest.importorskip("torchao.quantization", reason=name)
        quantization.quantize_(model, getattr(quantization, config)())

    return quantise


def by_bitsandbytes(bits):
    def one(linear, bnb):
        sizes = (linear.in_features, linear.out_features, linear.bias is not None)
        state = {name: p.detach().clone() for name, p in linear.named_parameters()}
        if bits == 8:
            made = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
        else:
            made = bnb.nn.Linear4bit(*sizes, compute_dtype=linear.weight.dtype, quant_type="nf4")
        made.load_state_dict(state)
        return made.to("cpu").requires_grad_(False)

    def quantise(model):
        bnb = pytest.importorskip("bitsandbytes", reason="needs the package bitsandbytes")
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if type(child) is nn.Linear:
                    parent._modules[name] = one(child, bnb)

    return quantise


QUANTISE = {
    "torchao_int8": by_torchao("Int8WeightOnlyConfig"),
    "bitsandbytes_int8": by_bitsandbytes(8),
    "bitsandbytes_nf4": by_bitsandbytes(4),
}
EACH = pytest.mark.parametrize("kind", QUANTISE)


def quantised(kind, dtype=torch.float32):
    torch.manual_seed(12)
    model = MLP(width=64).to(dtype)
    QUANTISE[kind](model)
    return model


def step(model, x, target):
    loss = nn.functional.cross_entropy(model(x).flatten(0, -2), target.flatten())
    loss.backward()
    return loss.detach()


def adapted(kind, dtype=torch.float32):
    model = quantised(kind, dtype)
    replace_linear_with_lora(model, 4, 2.0, target_modules=TARGETS)
    for name in names_of(model):
        nn.init.normal_(model.get_submodule(name).lora.B, std=0.05)
    return model


class PlainOverHalf(PlainLinearWithLoRA):
    def forward(self, x):
        A, B = self.lora.A.to(x.dtype), self.lora.B.to(x.dtype)
        return self.linear(x) + self.lora.alpha * (x @ A @ B)


def plain_twin(ours):
    """Return a model of the reference class over the same quantised linears."""
    for parent, name, layer in adapted_modules(ours):
        twin = PlainOverHalf(layer.linear, 4, 2.0)
        twin.lora.load_state_dict(layer.lora.state_dict())
        parent._modules[name] = twin
    return ours


def adapted_modules(model):
    return [
        (parent, name, child)
        for parent in list(model.modules())
        for name, child in parent.named_children()
        if isinstance(child, LinearWithLoRA)
    ]


@EACH
def test_training_is_that_of_the_plain_class_over_the_same_base(kind):
    ours, plain = adapted(kind), plain_twin(adapted(kind))
    assert len(names_of(ours)) == 5 and not names_of(plain)
    mark_only_lora_as_trainable(ours)
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(".lora." in name)
    data = batches(width=64)[:1] * 6
    assert_same_up_to_rounding(ours(data[0][0]), plain(data[0][0]))
    ours, plain = (train(model, step, data) for model in (ours, plain))
    assert plain.losses[-1] < 0.95 * plain.losses[0] and len(plain.state) == 20
    # bitsandbytes' int8 rounds x as well: a float32 rounding of it now and then moves a step of it.
    tolerance = 1e-3 if kind == "bitsandbytes_int8" else 1e-5
    torch.testing.assert_close(ours.losses, plain.losses, atol=tolerance, rtol=tolerance)
    for name, value in plain.state.items():
        assert value.any() and (ours.state[name] - value).norm() <= 10 * tolerance * value.norm()


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_reaches_the_input_through_base_and_low_rank_part(kind, dtype):
    layer = adapted(kind, dtype).blocks[0].up
    assert layer.lora.A.dtype == torch.float32
    A, B = (p.detach().to(dtype) for p in (layer.lora.A, layer.lora.B))
    x = torch.randn(5, 3, 64).to(dtype)
    layer(x)  # whose first call casts a bias of bitsandbytes' to x's dtype, as it does itself
    called = kind == "torchao_int8" and dtype == torch.bfloat16  # torchao rounds in another place
    way = "runs linear(x) + lora(x), composed: " if called else "cpp: runs"
    assert explain(layer, x).startswith(way)
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, want = layer(leaf), layer.linear(other) + 2.0 * (other @ A @ B)
    assert y.dtype == dtype
    assert_same_up_to_rounding(y, want)
    dy = torch.randn_like(y)
    y.backward(dy)
    want.backward(dy)
    assert_same_up_to_rounding(leaf.grad, other.grad)
    base_alone = torch.autograd.grad(layer.linear(other), other, dy)[0]
    assert not torch.allclose(base_alone, leaf.grad)


def spoil_zero_point(weight):
    weight.zero_point = torch.ones_like(weight.zero_point)


def spoil_block_size(weight):
    weight.block_size = [1, 32]


def spoil_activations(weight):
    weight.act_pre_scale = torch.ones(1)


@pytest.mark.parametrize("spoil", [spoil_zero_point, spoil_block_size, spoil_activations])
def test_a_weight_of_torchaos_that_is_more_than_codes_and_scales_is_called(spoil):
    layer = adapted("torchao_int8").blocks[0].up
    x = torch.randn(5, 3, 64)
    assert explain(layer, x).startswith("cpp: runs")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "composed" in explain(layer, x)
    assert "composed" in explain(layer, x.double())
    spoil(layer.linear.weight)
    assert "composed" in explain(layer, x)


@EACH
def test_adapter_is_saved_and_loaded_over_the_quantised_base(kind, tmp_path):
    model = adapted(kind)
    save_adapter(model, tmp_path / "a.safetensors")
    fresh = quantised(kind)
    load_adapter(fresh, tmp_path / "a.safetensors")
    assert names_of(fresh) == names_of(model)
    x = batches(width=64)[0][0]
    assert torch.equal(fresh(x), model(x))


@EACH
def test_merging_into_a_quantised_weight_raises(kind):
    model = adapted(kind)
    with pytest.raises(ValueError, match="blocks.0.up can't be merged: "):
        merge_(model)
    assert not model.head._unmerged_weight


DELTA = Case((5,), 12, 10, 3, dtype=torch.float64)


@pytest.mark.parametrize("lead", [(5,), (2, 3), (), (0,)], ids=str)
@pytest.mark.parametrize("needs", range(8))
def test_low_rank_part_alone_has_the_gradients_asked_for(lead, needs):
    inputs = make_inputs(DELTA.but(lead=lead))
    tensors = [
        inputs[n].detach().requires_grad_(bool(needs >> i & 1))
        for i, n in enumerate(("x", "A", "B"))
    ]
    asked = [t for t in tensors if t.requires_grad]
    y = lora_delta(*tensors, 1.7)
    x, A, B = tensors
    want = 1.7 * (x @ A @ B)
    torch.testing.assert_close(y, want)
    if asked:
        ours, theirs = (torch.autograd.grad(t, asked, inputs["dy"]) for t in (y, want))
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other)


def test_low_rank_part_alone_keeps_little():
    inputs = make_inputs(DELTA.but(lead=(64,)))
    tensors = [inputs[n].detach().requires_grad_() for n in ("x", "A", "B")]
    given, saved = {t.data_ptr() for t in tensors}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_delta(*tensors, 1.7)
    assert [t.shape for t in saved if t.data_ptr() not in given] == [(64, 3)]  # h
    assert torch.autograd.gradcheck(lambda *t: lora_delta(*t, 1.7), tensors)
    assert torch.autograd.gradgradcheck(lambda *t: lora_delta(*t, 1.7), tensors)


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16], ids=str)
def test_low_rank_part_alone_follows_autocast(amp):
    inputs = make_inputs(DELTA.but(dtype=torch.float32))
    tensors = [inputs[n].detach().requires_grad_() for n in ("x", "A", "B")]
    x, A, B = tensors
    with torch.autocast("cpu", dtype=amp):
        y, want = lora_delta(*tensors, 1.7), 1.7 * (x @ A @ B)
    assert y.dtype == want.dtype == amp
    assert_same_up_to_rounding(y, want)
    ours, theirs = (torch.autograd.grad(t, tensors, inputs["dy"].to(amp)) for t in (y, want))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == torch.float32
        assert_same_up_to_rounding(mine.to(amp), other.to(amp))
