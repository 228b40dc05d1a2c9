"""Activation checkpointing over blocks, gradient accumulation, a graph used twice."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from tests.conftest import Backend
from tests.stacks.test_training import use_backend
from tests.training import (
    assert_trains_like_plain,
    batches,
    loss_of,
    make_models,
    one_backward,
    train,
)

REENTRANT = pytest.mark.parametrize("use_reentrant", [False, True], ids=["hooks", "reentrant"])


class Checkpointed(nn.Module):
    """The model with each block recomputed in the backward."""

    def __init__(self, model, use_reentrant):
        super().__init__()
        self.model, self.use_reentrant = model, use_reentrant

    def forward(self, x):
        x = x.requires_grad_()  # without it the reentrant mode has no gradient to start from
        for block in self.model.blocks:
            x = checkpoint(block, x, use_reentrant=self.use_reentrant)
        return self.model.head(x)


@REENTRANT
@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "autocast"])
def test_checkpointed_training_is_the_plain_one(backend: Backend, use_reentrant, amp):
    def step(model, x, target):
        with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16, enabled=amp):
            loss = loss_of(model, x, target)
        loss.backward()
        return loss.detach()

    models = make_models()
    use_backend(models["ours"], backend.name)
    without = train(copy.deepcopy(models["ours"]), step)
    results = {"exact": train(models["exact"])}
    for name in ("ours", "plain"):
        results[name] = train(Checkpointed(models[name], use_reentrant), step)
        state = results[name].state
        results[name].state = {key.removeprefix("model."): v for key, v in state.items()}
    assert_trains_like_plain(**results, dtype=torch.bfloat16 if amp else torch.float32)
    assert torch.equal(results["ours"].losses, without.losses)
    assert all(torch.equal(results["ours"].state[n], t) for n, t in without.state.items())


@REENTRANT
def test_checkpointed_segments_give_the_same_gradients(backend: Backend, use_reentrant):
    model = make_models()["ours"]
    use_backend(model, backend.name)
    layers = nn.Sequential(*model.blocks, model.head)
    x = batches()[0][0]
    trained = [p for p in layers.parameters() if p.requires_grad]
    want = torch.autograd.grad(layers(x).square().sum(), trained)
    x.requires_grad_()
    checkpoint_sequential(layers, 2, x, use_reentrant=use_reentrant).square().sum().backward()
    for parameter, gradient in zip(trained, want, strict=True):
        assert gradient.any() and torch.equal(parameter.grad, gradient)


def test_accumulated_micro_batches_train_like_one_plain_batch(backend: Backend):
    def accumulate(model, x, target):
        losses = [
            loss_of(model, *part) / 4 for part in zip(x.chunk(4), target.chunk(4), strict=True)
        ]
        for loss in losses:  # all graphs alive at once, as in pipelining
            loss.backward()
        return sum(loss.detach() for loss in losses)

    models = make_models()
    use_backend(models["ours"], backend.name)
    results = {"ours": train(models["ours"], accumulate)}
    results |= {name: train(models[name], one_backward) for name in ("plain", "exact")}
    assert_trains_like_plain(**results)


def test_graph_kept_for_two_losses_gives_their_sum(backend: Backend):
    model = make_models(torch.float64)["ours"]
    use_backend(model, backend.name)
    y = model(batches()[0][0].double())
    y.sum().backward(retain_graph=True)
    first = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    y.square().sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()
    plain = make_models(torch.float64)["plain"]
    z = plain(batches()[0][0].double())
    (z.sum() + z.square().sum()).backward()
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            got = model.get_parameter(name).grad
            torch.testing.assert_close(got, parameter.grad)
            assert not torch.equal(got, first[name])
