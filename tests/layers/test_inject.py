"""replace_linear_with_lora and mark_only_lora_as_trainable on models."""

import copy

import pytest
import torch
from torch import nn

from lora_ext import LinearWithLoRA, mark_only_lora_as_trainable, replace_linear_with_lora
from lora_ext.testing import replace_linear_with_lora as replace_plain


class Block(nn.Module):
    def __init__(self, width=12):
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return self.norm(x + self.down(torch.relu(self.up(x))))


class ToyLM(nn.Module):
    """A language model in small: two blocks and a head tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(12, 20, bias=False)
        self.head.weight = self.embed.weight
        self.unused = None

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


TOKENS = torch.arange(14).view(2, 7)


def names_of(model):
    return [name for name, m in model.named_modules() if isinstance(m, LinearWithLoRA)]


def randomise(model):
    for module in model.modules():
        if isinstance(module, LinearWithLoRA):
            nn.init.normal_(module.lora.B, std=0.3)


def snapshot(model):
    """All that a failed call may not have changed."""
    return {n: type(m) for n, m in model.named_modules()}, copy.deepcopy(model.state_dict())


def assert_unchanged(model, before):
    types, state = before
    assert {n: type(m) for n, m in model.named_modules()} == types
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())


def test_replaced_model_is_the_reference_model():
    torch.manual_seed(5)
    plain = ToyLM()
    ours = copy.deepcopy(plain)
    torch.manual_seed(7)
    replace_plain(plain, 3, 2.0)
    after_plain = torch.rand(1)
    torch.manual_seed(7)
    replace_linear_with_lora(ours, 3, 2.0)
    assert torch.equal(torch.rand(1), after_plain)
    assert list(ours.state_dict()) == list(plain.state_dict())
    for key, value in plain.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    randomise(ours)
    plain.load_state_dict(ours.state_dict(), strict=True)
    torch.testing.assert_close(ours(TOKENS), plain(TOKENS))
    nn.init.normal_(plain.blocks[1].down.lora.B)
    ours.load_state_dict(plain.state_dict(), strict=True)
    torch.testing.assert_close(ours(TOKENS), plain(TOKENS))


def test_zero_b_leaves_the_output_as_it_was():
    model = ToyLM()
    before = model(TOKENS)
    replace_linear_with_lora(model, 3, 2.0)
    torch.testing.assert_close(model(TOKENS), before)


def test_replacing_twice_changes_nothing():
    model = ToyLM()
    replace_linear_with_lora(model, 3, 2.0)
    randomise(model)
    before = snapshot(model)
    state = torch.get_rng_state()
    replace_linear_with_lora(model, 8, 1.0)
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_are_shared_and_ties_hold():
    model = ToyLM()
    weight = model.head.weight
    replace_linear_with_lora(model, 3, 2.0)
    assert model.head.weight is model.embed.weight is weight
    names = [name for name, p in model.named_parameters() if p is weight]
    assert names == ["embed.weight"]
    model(TOKENS).sum().backward()
    assert weight.grad is not None


def test_module_in_two_places_keeps_one_adapter():
    shared = nn.Linear(12, 12)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(nn.ReLU(), shared)})
    replace_linear_with_lora(model, 3, 2.0)
    assert isinstance(model["a"], LinearWithLoRA) and model["b"][1] is model["a"]
    block = Block()
    model = nn.Sequential(block, block)
    replace_linear_with_lora(model, 3, 2.0)
    assert model[0] is model[1] and type(block.up.linear) is nn.Linear


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ({"target_modules": ["up"]}, ["blocks.0.up", "blocks.1.up"]),
        ({"target_modules": ["0.up", "head"]}, ["blocks.0.up", "head"]),
        ({"target_modules": ["p"], "exclude_modules": []}, None),  # "up" ends in it, not a name
        ({"target_modules": r"blocks\.1\..*"}, ["blocks.1.up", "blocks.1.down"]),
        ({"target_modules": "up"}, None),  # an expression is for the whole name
        ({"target_modules": ("up",), "exclude_modules": "blocks.0.*"}, ["blocks.1.up"]),
        (
            {"exclude_modules": ["head", "down"]},
            ["blocks.0.up", "blocks.1.up"],
        ),
        ({"exclude_modules": ".*"}, None),
        ({"target_modules": []}, None),
    ],
    ids=str,
)
def test_selection_takes_what_it_names(selection, expected):
    model = ToyLM()
    if expected is None:
        before = snapshot(model)
        with pytest.raises(ValueError, match="nothing to replace: .* none of the 5 linear layers"):
            replace_linear_with_lora(model, 3, 2.0, **selection)
        assert_unchanged(model, before)
    else:
        replace_linear_with_lora(model, 3, 2.0, **selection)
        assert names_of(model) == expected


def test_second_call_adapts_more_and_a_misspelt_one_raises():
    model = ToyLM()
    replace_linear_with_lora(model, 3, 2.0, target_modules=["up"])
    first = model.blocks[0].up
    replace_linear_with_lora(model, 5, 1.0, target_modules=["down"])
    assert model.blocks[0].up is first and model.blocks[0].down.lora.rank == 5
    with pytest.raises(ValueError, match="nothing to replace: target_modules=\\['dwon'\\]"):
        replace_linear_with_lora(model, 5, 1.0, target_modules=["dwon"])


def test_subclass_is_left_alone_unless_named():
    class MyLinear(nn.Linear):
        pass

    model = nn.ModuleDict({"plain": nn.Linear(4, 4), "mine": MyLinear(4, 4)})
    replace_linear_with_lora(model, 2, 1.0)
    assert type(model["mine"]) is MyLinear and names_of(model) == ["plain"]
    replace_linear_with_lora(model, 2, 1.0, target_modules=["mine"])
    assert names_of(model) == ["plain", "mine"] and type(model["mine"].linear) is MyLinear


def test_attention_projection_is_left_alone_and_refused_by_name():
    model = nn.TransformerEncoderLayer(8, 2, 16)
    replace_linear_with_lora(model, 2, 1.0)
    assert names_of(model) == ["linear1", "linear2"]
    before = snapshot(model)
    with pytest.raises(ValueError, match="self_attn.out_proj, but nn.MultiheadAttention reads"):
        replace_linear_with_lora(model, 2, 1.0, target_modules=["out_proj"])
    assert_unchanged(model, before)


def test_options_reach_the_layers():
    model = ToyLM().to(torch.bfloat16)
    replace_linear_with_lora(model, 4, 8, dtype=torch.bfloat16, scaling="alpha/rank")
    for name in names_of(model):
        lora = model.get_submodule(name).lora
        assert (lora.A.dtype, lora.scaling, lora.scale) == (torch.bfloat16, "alpha/rank", 2.0)


@pytest.mark.parametrize(
    ("bias", "trainable"),
    [
        ("none", {"lora.A", "lora.B"}),
        ("lora_only", {"lora.A", "lora.B", "up.linear.bias"}),
        ("all", {"lora.A", "lora.B", "up.linear.bias", "norm.bias"}),
    ],
)
def test_marking_trains_the_adapters_alone(bias, trainable):
    model = ToyLM()
    replace_linear_with_lora(model, 3, 2.0)
    mark_only_lora_as_trainable(model, bias)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == any(name.endswith(end) for end in trainable), name
    model(TOKENS).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_marking_errors_change_nothing():
    model = ToyLM()
    with pytest.raises(ValueError, match="model must have LinearWithLoRA layers"):
        mark_only_lora_as_trainable(model)
    replace_linear_with_lora(model, 3, 2.0)
    with pytest.raises(ValueError, match="bias must be 'none', 'lora_only' or 'all', got 'some'"):
        mark_only_lora_as_trainable(model, "some")
    with pytest.raises(TypeError, match="model must be an nn.Module, got list"):
        mark_only_lora_as_trainable([])
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank must be at least 1, got 0"),
        ({"rank": -4}, ValueError, "rank must be at least 1, got -4"),
        ({"rank": 2.0}, TypeError, "rank must be an integer, got float"),
        ({"rank": True}, TypeError, "rank must be an integer, got bool"),
        ({"alpha": "16"}, TypeError, "alpha must be a number, got str"),
        ({"alpha": None}, TypeError, "alpha must be a number, got NoneType"),
        ({"alpha": float("nan")}, ValueError, "alpha must be finite, got nan"),
        ({"scaling": "rank"}, ValueError, "scaling must be one of 'alpha', .*, got 'rank'"),
        ({"dtype": torch.int8}, TypeError, "dtype must be a floating-point torch.dtype, got torch"),
        ({"dtype": "fp16"}, TypeError, "dtype must be a floating-point torch.dtype, got 'fp16'"),
        ({"target_modules": "("}, ValueError, "target_modules must be a regular expression: "),
        ({"target_modules": [3]}, TypeError, "target_modules must hold strings, got int"),
        ({"exclude_modules": 3}, TypeError, "exclude_modules must hold strings, got int"),
        ({"model": nn.Linear(2, 2)}, ValueError, "model is itself an nn.Linear, .* LinearWithLoRA"),
        ({"model": nn.ReLU()}, ValueError, "model must have an nn.Linear in it, ReLU has none"),
        ({"model": "resnet"}, TypeError, "model must be an nn.Module, got str"),
        (
            {"model": nn.Sequential(nn.LazyLinear(2)), "target_modules": ["0"]},
            ValueError,
            "linear must have its weight: call the LazyLinear on an input first",
        ),
    ],
    ids=str,
)
def test_wrong_argument_is_named_and_the_model_unchanged(arguments, error, message):
    model = ToyLM()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        replace_linear_with_lora(**({"model": model, "rank": 3, "alpha": 2.0} | arguments))
    assert_unchanged(model, before)
