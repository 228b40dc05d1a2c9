"""prepack_(): the same numbers from weights laid out once, and what it reports."""

import itertools
import os
import re
from unittest import mock

import pytest
import torch
from torch import nn

import lora_ext
from lora_ext import LinearWithLoRA, lora_linears, prepack_, unpack_
from lora_ext.backends import cpp
from lora_ext.functional import adapted
from lora_ext.panels import Panels
from lora_ext.testing import Case, broken_rules, expected
from tests.layers.prepacked import NEEDS_CPP, let_every_dtype_pay, two_layers
from tests.numerics import assert_same_up_to_rounding
from tests.op.pairs import forced_pairs, the_other_kind

pytestmark = NEEDS_CPP
CASES = [
    Case((37,), 96, 160, 8),
    Case((40,), 91, 157, 3),  # K and N odd
    Case((1,), 96, 160, 8),  # dot products
    Case((300,), 900, 520, 24),  # past a strip, a tile and two blocks of the summed dimension
    Case((3, 50), 400, 264, 16),
]


@pytest.fixture(autouse=True)
def every_dtype_pays(monkeypatch):
    let_every_dtype_pay(monkeypatch)


@pytest.fixture
def model():
    return two_layers()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_packed_weight_of_the_other_kind_keeps_the_error_rule(case):
    with forced_pairs(the_other_kind()):
        test_packed_weight_keeps_the_error_rule(case, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_packed_weight_keeps_the_error_rule(case, dtype):
    want = expected(case.but(dtype=dtype))
    weight = want.inputs["weight"]
    panels = Panels(weight, backward=True)
    leaves = {n: want.inputs[n].detach().requires_grad_() for n in ("x", "bias", "A", "B")}
    x, bias, A, B = leaves.values()
    y = adapted(x, weight, bias, A, B, case.alpha, "cpp", panels=panels)
    grads = torch.autograd.grad(y, list(leaves.values()), want.inputs["dy"])
    got = {"y": y.detach()} | {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}
    assert not broken_rules(got, want)


@pytest.mark.parametrize("backward", [False, True])
def test_the_layout_is_read_for_y_and_for_dx(model, backward):
    """Poisoned with NaN, it must show: else the test above compares the plain way with itself."""
    prepack_(model, backward=backward)
    x = torch.randn(40, 48, requires_grad=True)
    model(x).sum().backward()
    assert x.grad.isfinite().all()
    for layer in (model[0], model[2]):
        layer._panels.forward.data.fill_(torch.nan)
    y = model(x)
    assert y.isnan().all()
    if backward:
        unpack_(model)
        prepack_(model, backward=True)
        for layer in (model[0], model[2]):
            layer._panels.backward.data.fill_(torch.nan)
        y = model(x)
        assert y.isfinite().all()
        x.grad = None
        y.sum().backward()
        assert x.grad.isnan().all()


def test_up_to_two_rows_the_weight_itself_is_read(model):
    prepack_(model, backward=True)
    for layer in (model[0], model[2]):
        layer._panels.forward.data.fill_(torch.nan)
        layer._panels.backward.data.fill_(torch.nan)
    for shape, few in (((48,), True), ((2, 48), True), ((3, 48), False), ((1, 3, 48), False)):
        x = torch.randn(shape, requires_grad=True)
        y = model(x)
        y.sum().backward()
        assert y.isfinite().all() == few and x.grad.isfinite().all() == few
        said = "laid out by prepack_" in lora_ext.explain(model[0], x)
        assert said == (not few)


def test_operators_pass_opcheck():
    inputs = expected(CASES[1]).inputs
    x, weight, bias, A, B = (inputs[n] for n in ("x", "weight", "bias", "A", "B"))
    ops = torch.ops.lora_ext
    for transposed in (True, False):
        torch.library.opcheck(ops.pack_weight.default, (weight, transposed))
        for pairs in (True, False):
            with forced_pairs(pairs):
                of_half = (weight[:, 1:].to(torch.bfloat16), transposed)
                torch.library.opcheck(ops.pack_weight.default, of_half)
    arguments = (x, ops.pack_weight(weight, True), bias, A, B, 0.7)
    torch.library.opcheck(ops.linear_fwd.default, arguments, {"format": "panels"})
    needs = [True, False, False, True, True]
    arguments = (inputs["dy"], x, ops.pack_weight(weight, False), A, B, x @ A, 0.7, needs)
    torch.library.opcheck(ops.linear_bwd.default, arguments, {"format": "panels"})


def test_report_counts_layers_and_memory(model):
    report = prepack_(model)
    assert report.packed == ["0", "2"] and not report.left
    rounded_up = 4 * (48 * 80 + 80 * 48)  # 33 columns take three panels of 16
    assert report.mib == pytest.approx(rounded_up / 2**20)
    assert str(report) == f"prepacked 2 layers in {rounded_up / 2**20:.1f} MiB, left 0"
    assert prepack_(model, backward=True).mib > report.mib


def test_what_is_left_has_its_reason(model):
    model[0].weight.requires_grad_(True)
    report = prepack_(model)
    assert report.packed == ["2"]
    assert report.left == {"0": "the weight requires grad: it is not frozen"}
    assert "left 1: the weight requires grad: it is not frozen (0)" in str(report)
    model.double()
    assert prepack_(model).left["2"] == (
        "PyTorch's own product is the faster one for torch.float64 on this CPU"
    )


def test_a_weight_of_inference_mode_is_left():
    """A write to it would go unseen."""
    with torch.inference_mode():
        layer = LinearWithLoRA(nn.Linear(48, 80), 4, 0.7).requires_grad_(False)
        report = prepack_(nn.Sequential(layer))
        assert layer(torch.ones(3, 48)).shape == (3, 80)
    assert "of inference mode, where PyTorch counts no writes" in report.left["0"]


def test_a_second_call_starts_again(model):
    prepack_(model)
    model[0].backend = "reference"
    report = prepack_(model)
    assert report.left == {"0": "the layer runs backend 'reference'"}
    assert model[0]._panels is None and model[2]._panels is not None


def test_a_merged_layer_is_left(model):
    lora_ext.merge_(model)
    report = prepack_(model)
    assert set(report.left.values()) == {"the adapter is merged: the layer runs linear(x)"}


def test_a_layer_on_the_composed_path_is_left(model):
    model[0].lora = nn.Identity()
    assert "lora is a Identity" in prepack_(model).left["0"]


def test_explain_tells(model):
    x = torch.randn(3, 48)
    assert "laid out" not in lora_ext.explain(model[0], x)
    prepack_(model)
    assert lora_ext.explain(model[0], x).splitlines()[0] == (
        "cpp: runs, its weight laid out by prepack_"
    )


def test_merging_and_unmerging_keep_it(model):
    prepack_(model)
    x = torch.randn(40, 48)
    before = model(x)
    lora_ext.merge_(model)
    torch.testing.assert_close(model(x), before)
    lora_ext.unmerge_(model)
    assert torch.equal(model(x), before) and model[0]._panels is not None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_fork_after_use(model):
    prepack_(model)
    x = torch.randn(40, 48)
    want = model(x)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # a forked process has none of the parent's threads
        os._exit(0 if torch.equal(model(x), want) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_unpack_gives_the_memory_back(model):
    prepack_(model)
    unpack_(model)
    assert model[0]._panels is None


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(4, 4).long(), "weight must have dtype float32, .* got torch.int64"),
        (torch.ones(4, 4, device="meta"), "weight must be strided and on cpu, got .* meta"),
        (torch.ones(4, 4).to_sparse(), "weight must be strided and on cpu, got .*sparse"),
    ],
    ids=["int64", "meta", "sparse"],
)
def test_weight_that_can_not_be_laid_out_has_its_reason(weight, message):
    assert re.match(message, cpp.why_not_packed(weight))


def test_operator_names_a_layout_of_another_size():
    x, A, B = torch.ones(40, 16), torch.ones(16, 2), torch.ones(2, 32)
    packed = torch.ops.lora_ext.pack_weight(torch.ones(48, 16), True)
    with pytest.raises(RuntimeError, match="weight must be"):
        torch.ops.lora_ext.linear_fwd(x, packed, None, A, B, 1.0, format="panels")


@pytest.mark.parametrize("argument", [None, nn.Linear(2, 2)], ids=["none", "no-lora"])
def test_wrong_models_raise(argument):
    with pytest.raises((TypeError, ValueError), match="model must"):
        prepack_(argument)


def test_layer_alone(model):
    layer = LinearWithLoRA(nn.Linear(8, 8).requires_grad_(False), 2, 1.0)
    assert prepack_(layer).packed == ["model"]


@pytest.mark.parametrize("first", [0, 1])
def test_layout_that_another_thread_takes_away_during_a_call(monkeypatch, first):
    """Each look at it may see another thread's `prepack_`, `unpack_` or nothing yet."""
    layer = LinearWithLoRA(nn.Linear(16, 8), 4, 1.0)
    nn.init.normal_(layer.lora.B)
    x = torch.randn(3, 16)
    want = layer(x)
    panels = mock.Mock()
    panels.why_stale.return_value = panels.for_input.return_value = None
    seen = itertools.islice(itertools.cycle([panels, None]), first, None)
    monkeypatch.setattr(LinearWithLoRA, "_panels", property(lambda layer: next(seen)))
    for _ in range(2):
        assert torch.equal(layer(x), want)
    for y in lora_linears(x, [layer, layer]):
        assert_same_up_to_rounding(y, want)
