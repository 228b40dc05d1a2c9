"""nn.TransformerEncoder reads its linears' weights by itself: the low-rank part may not be lost."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from lora_ext import LinearWithLoRA, replace_linear_with_lora
from lora_ext.testing import LinearWithLoRA as PlainLinearWithLoRA
from tests.layers.test_inject import randomise

LENGTHS = torch.tensor([6, 3, 1])
PADDING = torch.arange(6)[None] >= LENGTHS[:, None]
OPTIONS = {"relu": {}, "gelu_first": {"activation": "gelu", "norm_first": True}}


class CalledByHand(nn.Module):
    """The layer of the documentation, step by step: no fast path."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, padding):
        layer = self.layer

        def attend(x):
            y = layer.self_attn(x, x, x, key_padding_mask=padding, need_weights=True)[0]
            return layer.dropout1(y)

        def feed(x):
            hidden = linear(layer.linear1, x)
            return layer.dropout2(linear(layer.linear2, layer.dropout(layer.activation(hidden))))

        def linear(module, x):
            return module.linear(x) + module.lora.alpha * (x @ module.lora.A @ module.lora.B)

        if layer.norm_first:
            x = x + attend(layer.norm1(x))
            return x + feed(layer.norm2(x))
        x = layer.norm1(x + attend(x))
        return layer.norm2(x + feed(x))


def make(number_of_layers, **options):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, **options)
    model = nn.TransformerEncoder(layer, number_of_layers) if number_of_layers else layer
    replace_linear_with_lora(model, 4, 2.0)
    randomise(model)
    return model


def by_hand(model, x, padding):
    for layer in getattr(model, "layers", [model]):
        x = CalledByHand(layer)(x, padding)
    return x


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layers", [0, 2], ids=["layer", "encoder"])
@pytest.mark.parametrize("padding", [None, PADDING], ids=["whole", "padded"])
@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:The PyTorch API of nested")
def test_encoder_agrees_with_the_plain_layer_by_hand(options, layers, padding, mode, train):
    model = make(layers, **OPTIONS[options]).train(train)
    x = torch.randn(3, 6, 16)
    with mode():
        got = model(x, src_key_padding_mask=padding)
        want = by_hand(model, x, padding)
    if padding is not None:  # what comes out at padded places is nobody's business
        got, want = (t.masked_fill(padding[..., None], 0.0) for t in (got, want))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_low_rank_part_matters_in_this_test():
    """Without it the outputs differ by far more than the tolerance above."""
    model = make(2).eval()
    x = torch.randn(3, 6, 16)
    with torch.no_grad():
        with_it = model(x)
        for module in model.modules():
            if isinstance(module, LinearWithLoRA):
                module.lora.B.zero_()
        assert (model(x) - with_it).abs().max() > 0.1


def test_encoder_gradients_agree_with_the_reference_classes():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, dtype=torch.float64)
    encoder = nn.TransformerEncoder(layer, 2)
    plain = copy.deepcopy(encoder)
    replace_linear_with_lora(encoder, 4, 2.0)
    for layer in plain.layers:  # the reference would replace out_proj too, a subclass
        for name in ("linear1", "linear2"):
            setattr(layer, name, PlainLinearWithLoRA(getattr(layer, name), 4, 2.0))
    randomise(encoder)
    plain.to(torch.float64).load_state_dict(encoder.state_dict(), strict=True)
    x, target = torch.randn(2, 6, 3, 16, dtype=torch.float64)
    for model in (encoder, plain):
        (model(x) - target).square().sum().backward()
    for (name, ours), theirs in zip(encoder.named_parameters(), plain.parameters(), strict=True):
        assert theirs.grad.any() and torch.allclose(ours.grad, theirs.grad, 1e-10, 1e-12), name


def test_frozen_encoder_in_eval_keeps_its_adapters():
    """What takes the fast path in PyTorch: eval, nothing requires a gradient, no hooks."""
    model = make(2).eval().requires_grad_(False)
    x = torch.randn(3, 6, 16)
    torch.testing.assert_close(model(x), by_hand(model, x, None), atol=1e-5, rtol=1e-5)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(x), by_hand(model, x, None), atol=1e-5, rtol=1e-5)
