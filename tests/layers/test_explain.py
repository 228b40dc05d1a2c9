"""explain() says what the call then does: the backend that runs, or the error that is raised."""

import contextlib
from unittest import mock

import pytest
import torch
from torch import nn

from lora_ext import LinearWithLoRA, LoRALayer, explain
from lora_ext.backends import BACKENDS
from tests.numerics import assert_same_up_to_rounding

HALF, DOUBLE = torch.bfloat16, torch.float64


def make(base=torch.float32, **options) -> LinearWithLoRA:
    torch.manual_seed(0)
    layer = LinearWithLoRA(nn.Linear(12, 10, dtype=base), 3, 1.5, **options)
    nn.init.normal_(layer.lora.B)
    return layer


@contextlib.contextmanager
def backends_called():
    """Note each backend whose forward is called."""
    called = []

    def noting(name, forward):
        def noted(call):
            called.append(name)
            return forward(call)

        return noted

    with contextlib.ExitStack() as stack:
        for name, module in BACKENDS.items():
            noted = noting(name, module.forward)
            stack.enter_context(mock.patch.object(module, "forward", noted))
        yield called


def outcome(layer, x) -> str:
    """Return what the call does, in explain's words."""
    with backends_called() as called:
        try:
            layer(x)
        except (TypeError, ValueError) as error:
            return f"raises: {error}"
    (name,) = called
    return f"{name}: runs"


def autocast():
    return torch.autocast("cpu", dtype=HALF)


def sparse_B(layer):
    layer.lora.B = nn.Parameter(layer.lora.B.detach().to_sparse())


def dropout(layer):
    layer.lora.dropout = 0.25


CASES = {
    "float32": (torch.float32, torch.float32, {}, None),
    "float64": (DOUBLE, DOUBLE, {}, None),
    "half_base_float32_adapters": (HALF, HALF, {}, None),
    "float64_layer_on_float32": (DOUBLE, torch.float32, {}, None),
    "float32_layer_on_float64": (torch.float32, DOUBLE, {}, None),
    "float16_A_over_bfloat16": (HALF, HALF, {"dtype": torch.float16}, None),
    "integers": (torch.float32, torch.int64, {}, None),
    "reference_by_name": (torch.float32, torch.float32, {"backend": "reference"}, None),
    "triton_by_name": (torch.float32, torch.float32, {"backend": "triton"}, None),
    "sparse_B": (torch.float32, torch.float32, {}, sparse_B),
    "sparse_B_by_name": (torch.float32, torch.float32, {"backend": "cpp"}, sparse_B),
    "dropout": (torch.float32, torch.float32, {}, dropout),
    "dropout_by_name": (torch.float32, torch.float32, {"backend": "reference"}, dropout),
}


@pytest.mark.parametrize("around", [contextlib.nullcontext, autocast], ids=["plain", "autocast"])
@pytest.mark.parametrize("case", CASES)
def test_it_says_what_the_call_does(case, around):
    base, x_dtype, options, change = CASES[case]
    layer = make(base, **options)
    if change is not None:
        change(layer)
    x = torch.ones(4, 12, dtype=x_dtype)
    with around():
        assert explain(layer, x).splitlines()[0] == outcome(layer, x)


@pytest.mark.parametrize("features", [11, 13])
def test_a_wrong_width_is_said_as_the_call_says_it(features):
    layer, x = make(), torch.ones(4, features)
    said = explain(layer, x)
    assert said == outcome(layer, x) and f"x must have shape (..., 12), got (4, {features})" in said


def test_autocast_makes_mixed_dtypes_fit():
    """A float64 layer on float32 raises, a float32 layer on float16 runs in autocast alone."""
    layer, x = make(), torch.ones(4, 12, dtype=torch.float16)
    assert explain(layer, x).startswith("raises: weight must have x's dtype torch.float16")
    with autocast():
        assert ": runs" in explain(layer, x).splitlines()[0]
        layer(x)


def test_it_runs_nothing_and_draws_no_number():
    layer = make()
    dropout(layer)
    state = torch.get_rng_state()
    with backends_called() as called:
        explain(layer)
    assert not called and torch.equal(torch.get_rng_state(), state)


def test_a_sparse_B_runs_on_the_reference_and_is_named():
    """A backend is asked about the whole call: B is as much of it as x."""
    layer = make()
    x, dense = torch.randn(4, 12), layer.lora.B.detach().clone()
    want = layer(x)
    sparse_B(layer)
    assert explain(layer, x).splitlines()[0] == "reference: runs"
    assert "cpp: takes strided tensors, B is torch.sparse_coo" in explain(layer, x)
    with torch.no_grad():
        assert_same_up_to_rounding(layer(x), want)
    assert torch.equal(layer.lora.B.to_dense(), dense)
    layer.backend = "cpp"
    with pytest.raises(
        ValueError, match="backend 'cpp' can't run .*, B is torch.sparse_coo"
    ) as info:
        layer(x)
    assert len(str(info.value)) < 200


@pytest.mark.parametrize("name", ["A", "bias"])
def test_a_sparse_operand_is_named(name):
    layer = make(backend="cpp")
    owner = layer.lora if name == "A" else layer.linear
    setattr(owner, name, nn.Parameter(getattr(owner, name).detach().to_sparse()))
    with pytest.raises((TypeError, ValueError), match=rf"{name} is torch.sparse_coo") as info:
        layer(torch.randn(4, 12))
    assert len(str(info.value)) < 200


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_the_backend_is_asked_with_a_mask_where_one_is_drawn(training, p):
    layer = make().train(training)
    layer.lora.dropout = p
    module, asked = BACKENDS["cpp"], []
    unsupported = module.unsupported

    def asking(call):
        asked.append(call.low.keep is not None)
        return unsupported(call)

    with mock.patch.object(module, "unsupported", asking):
        explain(layer, torch.randn(4, 12))
        layer(torch.randn(4, 12))
    assert asked and set(asked) == {training and p > 0}


def test_low_rank_part_of_a_called_linear_is_run_by_a_backend():
    layer = make()
    layer.linear.register_forward_hook(lambda module, args, y: 2 * y)
    x = torch.randn(4, 12)
    alone = AssertionError("the low-rank part by itself is a result more to move")
    with backends_called() as called, mock.patch.object(LoRALayer, "forward", side_effect=alone):
        y = layer(x)
    assert len(called) == 1
    want = layer.linear(x) + 1.5 * (x @ layer.lora.A @ layer.lora.B)
    assert_same_up_to_rounding(y, want)
