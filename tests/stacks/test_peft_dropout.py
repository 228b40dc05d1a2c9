"""lora_dropout in training: PEFT's own masks, losses and generator state, as one operation."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_ext import functional
from tests.training import MLP, batches, train

peft = pytest.importorskip("peft", reason="needs the package peft")

from lora_ext.integrations.peft import accelerate  # noqa: E402

X = batches()[0][0].double()


def make(p: float) -> nn.Module:
    torch.manual_seed(4)
    targets = ["up", "down", "head"]
    config = peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=p, target_modules=targets, init_lora_weights=False
    )
    return peft.get_peft_model(MLP().double(), config)


@pytest.fixture
def fused(monkeypatch):
    """Count the calls of the autograd Function, which composed layers do not make with a weight."""
    calls, apply = [], functional._LoRALinear.apply

    def counted(x, weight, *others):
        calls.append(weight is not None)
        return apply(x, weight, *others)

    monkeypatch.setattr(functional._LoRALinear, "apply", counted)
    return calls


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_training_draws_pefts_masks_and_leaves_its_generator_state(fused, p):
    results = []
    for ours in (True, False):
        model = make(p).train()
        if ours:
            report = accelerate(model)
            assert len(report.accelerated) == 5 and not report.left
        torch.manual_seed(11)
        results.append((train(model), torch.get_rng_state()))
    assert fused and all(fused), "a layer ran composed"
    (mine, my_state), (other, other_state) = results
    assert torch.equal(my_state, other_state)
    torch.testing.assert_close(mine.losses, other.losses)
    for name, value in other.state.items():
        torch.testing.assert_close(mine.state[name], value, msg=name)
    zero = [name for name, value in other.state.items() if name.endswith(".grad")]
    assert all((other.state[name] == 0).all() == (p == 1.0) for name in zero)


@pytest.mark.parametrize(
    "x",
    [X[:, 0], X, X.unsqueeze(1), X.mT.contiguous().mT, torch.cat((X, X), -1)[..., :16]],
    ids=["2d", "3d", "4d", "transposed", "sliced"],
)
def test_the_mask_follows_the_memory_of_x_as_pefts_does(x):
    theirs, ours = make(0.3).train(), make(0.3).train()
    accelerate(ours)
    ys = []
    for model in (theirs, ours):
        torch.manual_seed(5)
        ys.append(model.base_model.model.head(x))
    torch.testing.assert_close(*ys)


def test_hash_draws_masks_of_its_own_and_p_zero_or_eval_draws_nothing():
    model, plain = make(0.3).train(), make(0.3).eval()
    accelerate(model, dropout_mask="hash")
    torch.manual_seed(5)
    first, second = model(X), model(X)
    torch.manual_seed(5)
    assert torch.equal(model(X), first) and not torch.equal(first, second)
    none = make(0.0).train()
    accelerate(none)
    state = torch.get_rng_state()
    torch.testing.assert_close(model.eval()(X), plain(X))
    none(X)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_draws_the_same_mask_in_the_recompute(use_reentrant):
    results = []
    for checkpointed in (True, False):
        model = make(0.3).train()
        accelerate(model)
        x = X.clone().requires_grad_()
        torch.manual_seed(5)
        y = checkpoint(model, x, use_reentrant=use_reentrant) if checkpointed else model(x)
        torch.rand(9)
        y.square().sum().backward()
        low = model.base_model.model.head.lora_A["default"].weight.grad
        results.append((y.detach(), x.grad, low))
    for mine, other in zip(*results, strict=True):
        assert torch.equal(mine, other)


def test_gradients_reach_pefts_parameters_without_a_copy():
    """A.T and B.T go in; what comes back is laid out so that autograd need not copy it."""
    model = make(0.0)
    accelerate(model)
    y = model(X).square().sum()
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, record_shapes=True) as profile:
        y.backward()
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    shapes = {tuple(w["default"].weight.shape) for m in layers for w in (m.lora_A, m.lora_B)}
    copied = [
        event.name
        for event in profile.events()
        if event.name in ("aten::clone", "aten::copy_", "aten::contiguous")
        and any(tuple(shape) in shapes for shape in event.input_shapes)
    ]
    assert not copied
    for layer in layers:
        for factor in (layer.lora_A, layer.lora_B):
            assert factor["default"].weight.grad.is_contiguous()


def test_an_unknown_mask_is_named():
    with pytest.raises(ValueError, match="dropout_mask must be 'hash' or 'torch', got 'numpy'"):
        accelerate(make(0.1), dropout_mask="numpy")
