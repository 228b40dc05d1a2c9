"""Mixed precision as it is trained with: autocast, a loss scaler, float32 adapters over halves."""

import copy

import pytest
import torch

from lora_ext import replace_linear_with_lora
from tests.conftest import Backend
from tests.stacks.test_training import use_backend
from tests.training import (
    MLP,
    assert_trains_like_plain,
    batches,
    loss_of,
    make_models,
    train,
    with_float32_adapters,
)

HALVES = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)


class Scaled:
    """Forward under autocast; backward and step through a GradScaler."""

    def __init__(self, half, init_scale=2.0**10, **options):
        self.half = half
        self.scaler = torch.amp.GradScaler(
            torch.get_default_device().type, init_scale=init_scale, **options
        )

    def backward(self, model, x, target):
        with torch.autocast(torch.get_default_device().type, dtype=self.half):
            loss = loss_of(model, x, target)
        self.scaler.scale(loss).backward()
        return loss.detach()

    def step(self, optimizer):
        self.scaler.unscale_(optimizer)  # so that the gradients kept are the true ones
        self.scaler.step(optimizer)
        self.scaler.update()


@HALVES
def test_autocast_and_scaler_train_like_the_plain_layer(backend: Backend, half):
    models = make_models()
    use_backend(models["ours"], backend.name)
    results = {"exact": train(models["exact"])}
    for name in ("ours", "plain"):
        scaled = Scaled(half)
        results[name] = train(models[name], scaled.backward, step=scaled.step)
        assert scaled.scaler.get_scale() == 2.0**10, "a step was skipped"
    assert all(t.dtype == torch.float32 for t in results["ours"].state.values())
    assert_trains_like_plain(**results, dtype=half)


@HALVES
def test_float32_adapters_over_a_half_base_train_like_plain(backend: Backend, half):
    models = make_models(half)
    use_backend(models["ours"], backend.name)
    # The base as the halves have it, so that only the training's own roundings are compared.
    models["exact"].load_state_dict(models["plain"].state_dict())
    for name in ("ours", "plain"):
        with_float32_adapters(models[name])
    results = {name: train(model) for name, model in models.items()}
    assert all(t.dtype == torch.float32 for t in results["ours"].state.values())
    assert_trains_like_plain(**results, dtype=half)


@HALVES
def test_replace_keeps_adapters_of_a_half_model_in_float32_under_autocast(backend: Backend, half):
    model = MLP().to(half)
    replace_linear_with_lora(model, 4, 2.0)
    use_backend(model, backend.name)
    with torch.autocast(torch.get_default_device().type, dtype=half):
        y = model(batches()[0][0])  # float32 in
    assert y.dtype == half
    y.float().square().sum().backward()
    lora = model.blocks[0].up.lora
    assert lora.A.grad.dtype == lora.B.grad.dtype == torch.float32
    assert lora.B.grad.any() and model.head.weight.grad.dtype == half


def test_scaler_skips_the_step_of_an_overflow_and_recovers(backend: Backend):
    """A scale that float16 can't hold gives inf; no parameter may take it."""
    model = make_models()["ours"]
    use_backend(model, backend.name)
    before = copy.deepcopy(model.state_dict())
    scaled = Scaled(torch.float16, init_scale=2.0**40, backoff_factor=2.0**-30)
    x, target = batches()[0]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    scaled.backward(model, x, target)
    scaled.step(optimizer)
    assert scaled.scaler.get_scale() == 2.0**10, "no overflow was seen"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    optimizer.zero_grad()
    scaled.backward(model, x, target)
    scaled.step(optimizer)
    assert scaled.scaler.get_scale() == 2.0**10, "it overflowed again"
    assert not torch.equal(model.head.lora.A, before["head.lora.A"])
    assert all(p.isfinite().all() for p in model.parameters())
