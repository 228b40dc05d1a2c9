"""The hand-written backward: what is asked for and no more, in fresh tensors, repeatable."""

from itertools import product

import pytest
import torch

import lora_ext
from lora_ext.testing import NAMES, Case, broken_rules, expected, gradients, make_inputs
from tests.conftest import Backend
from tests.op.test_backends import named

CASE = Case((37,), 96, 160, 8)
# Each gradient alone, each two, all but each one, all: what is computed or saved hangs on two of
# them or on one that is missing. The other subsets refuse no wrong kernel that these let pass.
SOME_NEEDS = [n for n in product((False, True), repeat=5) if any(n) and sum(n) != 3]


def leaves(inputs, needs=(True,) * 5):
    """Return detached x, weight, bias, A, B of which those needed require a gradient."""
    pairs = zip((inputs[n] for n in NAMES), needs, strict=True)
    return [None if t is None else t.detach().requires_grad_(need) for t, need in pairs]


def skip_what_another_variant_runs(backend: Backend, needs: tuple[bool, ...]) -> None:
    """Keep one backward, of what all need, for variants of the forward: it does not see `needs`."""
    if backend.default_backward and not all(n or i == 2 for i, n in enumerate(needs)):
        pytest.skip(f"{backend} has triton's backward, run without a variant")


@pytest.mark.parametrize("needs", SOME_NEEDS, ids=named)
@pytest.mark.parametrize("case", [CASE, CASE.but(dtype=torch.bfloat16)], ids=str)
def test_only_gradients_asked_for_are_computed_and_saved(backend: Backend, case, needs):
    skip_what_another_variant_runs(backend, needs)
    want = expected(case)
    x, weight, bias, A, B = tensors = leaves(want.inputs, needs)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = backend.linear(*tensors, case.alpha)
    y.backward(want.inputs["dy"])

    assert [t.grad is not None for t in tensors] == list(needs)
    asked = {f"d{n}": t.grad for n, t in zip(NAMES, tensors, strict=True) if t.grad is not None}
    assert broken_rules({"y": y.detach()} | asked, want) == []

    # What is saved of an input is the input: a copy would double the activations of a model. A and
    # B, thin and alive anyway, may be saved unread.
    need_dx, need_dweight, _, need_dA, need_dB = needs
    names = {t.data_ptr(): n for n, t in zip(NAMES, tensors, strict=True)}
    kept = [names.get(t.data_ptr(), "own") for t in saved]
    assert ("x" in kept) == (need_dA or need_dweight)
    assert ("weight" in kept) == need_dx
    assert "bias" not in kept
    own = [t.shape for t in saved if t.data_ptr() not in names]
    assert own == ([(x.shape[0], A.shape[1])] if need_dB else [])  # h


@pytest.mark.parametrize("needs", [n for n in SOME_NEEDS if not n[2]], ids=named)
def test_without_a_bias_only_what_is_asked_for_comes(backend: Backend, needs):
    skip_what_another_variant_runs(backend, needs)
    case = CASE.but(bias=False)
    want = expected(case)
    tensors = leaves(want.inputs, needs)
    backend.linear(*tensors, case.alpha).backward(want.inputs["dy"])
    grads = [None if t is None else t.grad for t in tensors]
    assert [g is not None for g in grads] == list(needs)
    got = {f"d{n}": g for n, g in zip(NAMES, grads, strict=True) if g is not None}
    assert broken_rules(got, want) == []


@pytest.mark.parametrize(
    "case",
    [
        CASE,
        CASE.but(dtype=torch.bfloat16),
        CASE.but(dtype=torch.float16, adapter_dtype=torch.float32),
        Case((300,), 520, 200, 12),
        Case((1,), 520, 200, 12, torch.bfloat16),
    ],
    ids=str,
)
def test_same_inputs_give_the_same_bits(backend: Backend, case):
    inputs = make_inputs(case)
    first = gradients(backend.linear, inputs, case.alpha)
    for _ in range(1 if backend.interpreted else 3):  # programs in one order: nothing to race
        again = gradients(backend.linear, inputs, case.alpha)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("layout", ["contiguous", "dy_expanded", "weight_transposed"])
@pytest.mark.parametrize("lead", [(37,), (4, 9), ()], ids=["2d", "3d", "1d"])
def test_results_are_fresh_and_inputs_untouched(backend: Backend, lead, layout):
    inputs = make_inputs(CASE.but(lead=lead, layout=layout))
    before = {name: t.clone() for name, t in inputs.items()}
    results = gradients(backend.linear, inputs, CASE.alpha)
    for name, t in inputs.items():
        assert torch.equal(t, before[name]), f"{name} was written to"
    storages = [t.untyped_storage().data_ptr() for t in (*inputs.values(), *results.values())]
    assert len(set(storages)) == len(storages), "a result shares memory"
    values = {name: t.clone() for name, t in results.items()}
    for name, t in results.items():
        t.fill_(float("nan"))  # if two shared memory, one would take the other with it
        values.pop(name)
        assert all(torch.equal(results[other], values[other]) for other in values)


@pytest.mark.parametrize("needs", [(True,) * 5, (False, False, False, True, True)], ids=named)
def test_retained_graph_gives_equal_gradients_twice(backend: Backend, needs):
    inputs = make_inputs(CASE)
    tensors = leaves(inputs, needs)
    wanted = [t for t in tensors if t.requires_grad]
    y = backend.linear(*tensors, CASE.alpha)
    first = torch.autograd.grad(y, wanted, inputs["dy"], retain_graph=True)
    for gradient in first:  # writing into a result must not reach what is saved
        gradient.mul_(1)
    second = torch.autograd.grad(y, wanted, inputs["dy"])
    assert all(map(torch.equal, first, second))


def test_gradient_written_into_leaves_saved_tensors_alone(backend: Backend):
    inputs = make_inputs(CASE)
    tensors = leaves(inputs)
    y = backend.linear(*tensors, CASE.alpha)
    first = torch.autograd.grad(y, tensors, inputs["dy"], retain_graph=True)
    want = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.zero_()
    second = torch.autograd.grad(y, tensors, inputs["dy"])
    assert all(map(torch.equal, want, second))


@pytest.mark.parametrize("lead", [(37,), (4, 9), ()], ids=["2d", "3d", "1d"])
def test_result_may_be_written_into(backend: Backend, lead):
    """nn.ReLU(inplace=True) after a linear is common, and y is no saved tensor."""
    case = CASE.but(lead=lead)
    want = expected(case)

    def then_double_in_place(*arguments):
        return backend.linear(*arguments).mul_(2)

    def then_double(*arguments):
        return backend.linear(*arguments) * 2

    ours = gradients(then_double_in_place, want.inputs, case.alpha)
    plain = gradients(then_double, want.inputs, case.alpha)
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


@pytest.mark.parametrize("saved", ["x", "weight", "A", "B"])
@pytest.mark.parametrize("lead", [(37,), (4, 9)], ids=["2d", "3d"])
def test_saved_input_changed_before_backward_raises(backend: Backend, lead, saved):
    inputs = make_inputs(CASE.but(lead=lead))
    tensors = leaves(inputs)
    y = backend.linear(*tensors, CASE.alpha)
    with torch.no_grad():
        tensors[NAMES.index(saved)].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(inputs["dy"])


def test_input_not_saved_may_change_before_backward(backend: Backend):
    """An optimizer step between forward and backward of a frozen layer is no error."""
    inputs = make_inputs(CASE)
    x, weight, bias, A, B = leaves(inputs, (False, False, False, True, True))
    y = backend.linear(x, weight, bias, A, B, CASE.alpha)
    with torch.no_grad():
        weight.add_(1), A.add_(1), bias.add_(1)
    y.backward(inputs["dy"])
    assert broken_rules({"dA": A.grad, "dB": B.grad}, expected(CASE)) == []


def test_undefined_output_gradient_is_taken_as_zero(backend: Backend):
    """A result that the loss does not depend on, as in a branch multiplied away."""
    tensors = leaves(make_inputs(CASE))
    y = backend.linear(*tensors, CASE.alpha)
    (y * 0).sum().backward()
    assert all(not t.grad.any() for t in tensors)


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize(("K", "N"), [(0, 5), (5, 0)])
def test_no_features_give_zeros(rows, K, N):
    x, A = torch.ones(rows, K, requires_grad=True), torch.ones(K, 2, requires_grad=True)
    B = torch.ones(2, N, requires_grad=True)
    y = lora_ext.lora_linear(x, torch.ones(N, K), None, A, B, 0.5)
    y.sum().backward()
    for got, like in ((y, torch.zeros(rows, N)), (x.grad, x), (A.grad, A), (B.grad, B)):
        assert torch.equal(got, torch.zeros_like(like))
