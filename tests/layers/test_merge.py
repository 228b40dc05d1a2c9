"""merge_ and unmerge_: into the weights and back, bit for bit."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lora_ext import explain, merge_, replace_linear_with_lora, unmerge_
from tests.layers.test_inject import TOKENS, ToyLM, assert_unchanged, randomise, snapshot
from tests.numerics import assert_same_up_to_rounding


def adapted(dtype=torch.float32, **options):
    model = ToyLM().to(dtype)
    replace_linear_with_lora(model, 3, 2.0, **options)
    randomise(model)
    return model


def test_merged_model_gives_the_same_output():
    model = adapted()
    want = model(TOKENS)
    merge_(model)
    torch.testing.assert_close(model(TOKENS), want)
    head = model.head
    assert explain(head) == "runs linear(x): the adapter is merged into its weight"
    x = torch.randn(4, 12)
    assert torch.equal(head(x), head.linear(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_merged_weight_is_the_exact_sum_rounded_once(dtype):
    model = adapted(dtype, scaling="alpha/rank")
    head = model.head
    lora = head.lora
    exact = head.weight.double() + lora.scale * (lora.A.double() @ lora.B.double()).T
    merge_(model)
    assert head.weight.dtype == dtype
    error = (head.weight.double() - exact).abs()
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + 8 * torch.finfo(torch.float32).eps
    assert (error <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unmerging_puts_back_the_very_parameters(dtype):
    model = adapted(dtype)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    before, want = snapshot(model), model(TOKENS)
    for _ in range(2):
        merge_(model)
        merge_(model)  # what is merged is left as it is
        unmerge_(model)
        unmerge_(model)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is p for name, p in parameters.items())
    assert_unchanged(model, before)
    assert torch.equal(model(TOKENS), want)


def test_tied_embedding_is_not_touched():
    model = adapted()
    embedding = model.embed.weight.clone()
    merge_(model)
    assert torch.equal(model.embed.weight, embedding)
    assert not torch.equal(model.head.weight, embedding)
    unmerge_(model)
    assert model.head.weight is model.embed.weight


def test_state_dict_while_merged_is_the_unmerged_one():
    model = adapted()
    want = copy.deepcopy(model.state_dict())
    merge_(model)
    got = model.state_dict()
    assert list(got) == list(want)
    assert all(torch.equal(got[key], value) for key, value in want.items())
    assert not any(value.requires_grad for value in got.values())
    assert torch.equal(model.head.state_dict(prefix="h.")["h.linear.weight"], want["embed.weight"])
    with pytest.raises(RuntimeError, match=r"the adapter is merged: call unmerge_\(model\)"):
        model.load_state_dict(want)


def test_frozen_weight_stays_frozen():
    model = adapted()
    model.head.weight.requires_grad_(False)
    merge_(model)
    assert not model.head.weight.requires_grad and model.blocks[0].up.weight.requires_grad


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copy_of_a_merged_model_unmerges(copied):
    model = adapted()
    want = model(TOKENS)
    merge_(model)
    twin = copied(model)
    unmerge_(twin)
    assert torch.equal(twin(TOKENS), want)
    assert twin.head.weight is twin.embed.weight
    assert model.head._unmerged_weight, "the copy unmerged the original"


def test_unmerging_follows_a_model_that_was_cast():
    model = adapted()
    merge_(model)
    model.to(torch.float64)
    unmerge_(model)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model(TOKENS).dtype == torch.float64


def test_unloading_leaves_plain_linears_that_give_the_same():
    model = adapted()
    want = model(TOKENS)
    shared = nn.Sequential(model, model.blocks[0].up)
    merge_(shared, unload=True)
    assert type(model.head) is nn.Linear and shared[1] is model.blocks[0].up
    assert not any("lora" in name for name in model.state_dict())
    assert type(shared[1]) is nn.Linear
    torch.testing.assert_close(model(TOKENS), want)
    # The plain model that the state_dict describes gives the same too.
    plain = ToyLM()
    plain.head.weight = nn.Parameter(torch.empty(20, 12))
    plain.load_state_dict(model.state_dict(), strict=True)
    assert_same_up_to_rounding(plain(TOKENS), model(TOKENS))


def test_merging_errors_change_nothing():
    with pytest.raises(ValueError, match="model must have LinearWithLoRA layers"):
        merge_(ToyLM())
    with pytest.raises(ValueError, match="model must have LinearWithLoRA layers"):
        unmerge_(ToyLM())
    with pytest.raises(TypeError, match="model must be an nn.Module, got dict"):
        merge_({})
    model = adapted()
    model.blocks[1].down.linear.register_forward_hook(lambda m, a, y: y)
    before = snapshot(model)
    with pytest.raises(ValueError, match="blocks.1.down can't be merged: linear has hooks"):
        merge_(model)
    assert_unchanged(model, before)
    assert not any(m._unmerged_weight for m in (model.head, model.blocks[0].up))
    with pytest.raises(ValueError, match="model is itself a LinearWithLoRA"):
        merge_(model.head, unload=True)


@pytest.mark.filterwarnings("ignore:Positional args:FutureWarning")
def test_state_of_a_merged_layer_takes_its_arguments_by_place():
    head = adapted().head
    unmerged = head.weight
    merge_(head)
    into = {}
    assert head.state_dict(into, "a.", True) is into
    assert into["a.linear.weight"] is unmerged and "linear.weight" not in into
    plain = head.state_dict({}, "a.")
    assert not plain["a.linear.weight"].requires_grad
    assert torch.equal(plain["a.linear.weight"], unmerged)
