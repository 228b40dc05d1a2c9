"""group_ on siblings, layers of one x: what makes them run together, and what alone."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_ext import (
    LinearWithLoRA,
    group_,
    merge_,
    replace_linear_with_lora,
    ungroup_,
    unmerge_,
)
from tests.numerics import assert_same_up_to_rounding
from tests.stacks.grouped import X, assert_same_outcomes, graph_of, lora_layers, outcome


class Attention(nn.Module):
    """Three linears of one x, and what a test does between them."""

    def __init__(self, dropout: float = 0.0, between=lambda module, x: x):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(24, 24), nn.Linear(24, 8), nn.Linear(24, 8)
        replace_linear_with_lora(self, 4, 2.0, dropout=dropout, dropout_mask="torch")
        for layer in lora_layers(self):
            nn.init.normal_(layer.lora.B)
        self.between = between

    def forward(self, x):
        q = self.q(x)
        x = self.between(self, x)
        return torch.cat([q, self.k(x), self.v(x)], -1)


def pair(dropout: float = 0.0, **kwargs) -> tuple[Attention, Attention]:
    """Return a grouped module and its like with single layers."""
    single = Attention(dropout, **kwargs)
    model = copy.deepcopy(single)
    return model, single


def runs_together(model: nn.Module, x: torch.Tensor) -> bool:
    return "_LoRALinearsBackward" in graph_of(model(x.detach().requires_grad_()))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_siblings_run_together_from_the_second_call_on(dropout):
    model, single = pair(dropout)
    report = group_(model)
    assert not runs_together(model, X)
    assert runs_together(model, X) and "run q+k+v together" in str(report)
    assert_same_outcomes(model, single, X)


def another_tensor(module, x):
    return x * 1


def draws(module, x):
    torch.rand(1)
    return x


@pytest.mark.parametrize("between", [another_tensor, draws])
def test_siblings_that_a_call_shows_to_differ_are_not_grouped(between):
    model, single = pair(0.3, between=between)
    report = group_(model)
    assert_same_outcomes(model, single, X)
    assert "run k+v together" in str(report)


@pytest.mark.parametrize("between", [another_tensor, draws])
def test_siblings_that_differ_later_fall_back_and_say_why(between):
    model, single = pair(0.0)
    report = group_(model)
    assert_same_outcomes(model, single, X)
    model.between = single.between = between
    if between is draws:  # the order of draws matters where there are masks
        for module in (model, single):
            for layer in lora_layers(module):
                layer.lora.dropout = 0.3
        outcome(model, X)  # its masks came too early: seen now, and from now on as single layers
    assert_same_outcomes(model, single, X)
    assert "run k+v together" in str(report)


def test_x_changed_in_place_between_siblings():
    model, single = pair()
    group_(model)
    outcome(model, X)
    assert runs_together(model, X)
    model.between = single.between = lambda module, x: x.mul_(2)
    x = X.repeat(99, 1, 1)
    with torch.no_grad():
        for _ in range(3):
            assert_same_up_to_rounding(model(x.clone()), single(x.clone()))


def test_a_sibling_that_is_not_called():
    model, single = pair()
    report = group_(model)
    assert_same_outcomes(model, single, X)
    single_forward = type(single).forward
    type(single).forward = lambda self, x: torch.cat([self.q(x), self.v(x)], -1)
    try:
        for module in (model, single):
            module.k.requires_grad_(False)
        assert_same_outcomes(model, single, X)
        assert "run q+v together" in str(report)
    finally:
        type(single).forward = single_forward


def test_nothing_is_held_after_a_call_and_after_an_error():
    model, _ = pair()
    group_(model)

    def fail(module, x):
        raise KeyError("between")

    model(X)
    for between in (lambda module, x: x, fail):
        model.between = between
        x = X.clone().requires_grad_()
        alive = weakref.ref(x)
        try:
            y = model(x)
            del y
        except KeyError:
            pass
        del x
        gc.collect()
        assert alive() is None
        assert model.__dict__["_lora_group"].scope is None
    model.between = lambda module, x: x
    assert runs_together(model, X)


def test_threads_do_not_share_results():
    model, single = pair()
    group_(model)
    model(X)
    barrier = threading.Barrier(2)
    inputs = [torch.randn(5, 24), torch.randn(5, 24)]
    results = {}
    model.between = lambda module, x: (barrier.wait(), x)[1]

    def work(i):
        for _ in range(5):
            results.setdefault(i, []).append(model(inputs[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, ys in results.items():
        for y in ys:
            assert_same_up_to_rounding(y, single(inputs[i]))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing(reentrant, dropout):
    model, single = pair(dropout)
    group_(model)

    class Checkpointed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    assert_same_outcomes(Checkpointed(model), Checkpointed(single), X)
    assert runs_together(model, X)


@pytest.mark.parametrize("miss", [False, True])
def test_calls_in_flight_are_computed_again_as_they_were(miss):
    model, _ = pair()
    report = group_(model)

    def losses(count):
        return [checkpoint(model, X, use_reentrant=False).sum() for _ in range(count)]

    if miss:
        losses(1)[0].backward()
        losses(1)[0].backward()
        assert "run q+k+v together" in str(report)
        model.between = another_tensor
    for loss in losses(3):  # the plan may not change before the last one's backward
        loss.backward()
    losses(1)[0].backward()
    assert f"run {'k+v' if miss else 'q+k+v'} together" in str(report) or miss


def test_autocast_and_grad_modes():
    model, single = pair()
    report = group_(model)
    assert_same_outcomes(model, single, X)
    with torch.no_grad():
        assert_same_up_to_rounding(model(X.repeat(99, 1, 1)), single(X.repeat(99, 1, 1)))
    with torch.inference_mode():
        assert_same_up_to_rounding(model(X), single(X))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(X).dtype == torch.bfloat16
        assert runs_together(model, X)
    assert "run q+k+v together" in str(report)
    model.between = lambda module, x: (torch.set_grad_enabled(False), x)[1]
    with torch.enable_grad():
        y = model(X.clone().requires_grad_())
        torch.set_grad_enabled(True)
    assert_same_up_to_rounding(y, single(X))


def test_state_copies_pickles_and_merging_are_as_before():
    model, single = pair(0.1)
    keys, modules = list(single.state_dict()), [n for n, _ in single.named_modules()]
    group_(model)
    model(X)
    assert list(model.state_dict()) == keys
    assert [n for n, _ in model.named_modules()] == modules
    assert type(model).__name__ == "Attention" and isinstance(model.q, LinearWithLoRA)
    model.between = single.between = another_tensor  # a lambda can't be pickled
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model.q)):
        assert all("_lora_group" not in m.__dict__ for m in other.modules())
        assert type(other) in (Attention, LinearWithLoRA)
        assert torch.equal(
            other.eval()(X), (model if type(other) is Attention else model.q).eval()(X)
        )
        model.train()
    merge_(model)
    merge_(single)
    assert_same_up_to_rounding(model(X), single(X))
    unmerge_(model)
    unmerge_(single)
    model.between = single.between = lambda module, x: x
    assert_same_outcomes(model, single, X)
    assert ungroup_(model) == 4 and type(model) is Attention and type(model.q) is LinearWithLoRA
    assert ungroup_(model) == 0


def test_hooks_on_a_sibling_run_and_make_all_run_alone():
    model, single = pair()
    report = group_(model)
    calls = []
    handle = model.k.register_forward_hook(lambda *_: calls.append(1))
    assert_same_outcomes(model, single, X)
    assert len(calls) == 3 and "a layer has hooks" in str(report)
    handle.remove()
    assert runs_together(model, X)


def test_arguments_are_checked():
    with pytest.raises(TypeError, match="model must be an nn.Module, got int"):
        group_(3)
    with pytest.raises(ValueError, match="model must have LinearWithLoRA layers"):
        group_(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="recompute must be 'act' or 'all', got 'none'"):
        group_(Attention(), recompute="none")


def test_a_class_given_after_group_is_not_taken_away():
    model, _ = pair()
    group_(model)
    model.q.__class__ = type("Wrapped", (type(model.q),), {})
    with pytest.raises(ValueError, match="q was given a class after group_, a Wrapped"):
        ungroup_(model)


@pytest.mark.slow
def test_compiled_code_runs_the_single_layers():
    model, single = pair()
    group_(model)
    compiled = torch.compile(model, fullgraph=True)
    x = X.clone().requires_grad_()
    torch.testing.assert_close(compiled(x), single(x), rtol=1e-5, atol=1e-5)
