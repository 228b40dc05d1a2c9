"""What the rest of PyTorch expects of a differentiable operation."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from lora_ext import LinearWithLoRA
from lora_ext.testing import LAYOUTS, NAMES, Case, check, gradients, make_inputs
from tests.conftest import Backend
from tests.numerics import assert_same_up_to_rounding

CASE = Case((5,), 12, 10, 3)
DOUBLE = CASE.but(dtype=torch.float64)


def leaves(case: Case) -> list[torch.Tensor | None]:
    """Return x, weight, bias, A and B of a case, each requiring a gradient."""
    inputs = make_inputs(case)
    return [None if inputs[n] is None else inputs[n].detach().requires_grad_() for n in NAMES]


def make_layer(case: Case = CASE, backend: str | None = None) -> LinearWithLoRA:
    """Return a layer with the case's values: B is not zero."""
    linear = torch.nn.Linear(case.K, case.N, bias=case.bias, dtype=case.dtype)
    layer = LinearWithLoRA(linear, case.R, case.alpha, backend=backend)
    inputs = make_inputs(case)
    with torch.no_grad():
        for parameter, name in ((layer.weight, "weight"), (layer.lora.A, "A"), (layer.lora.B, "B")):
            parameter.copy_(inputs[name])
        if case.bias:
            layer.bias.copy_(inputs["bias"])
    return layer


@pytest.mark.parametrize(
    "case",
    [
        DOUBLE,
        DOUBLE.but(bias=False),
        DOUBLE.but(lead=(2, 3)),
        DOUBLE.but(lead=(2, 1, 2)),
        DOUBLE.but(lead=()),
        DOUBLE.but(lead=(1,), R=1),
        DOUBLE.but(layout="x_every_other_row"),
        DOUBLE.but(layout="weight_transposed", alpha=-0.3),
    ],
    ids=str,
)
def test_gradcheck_passes(backend: Backend, case):
    inputs = leaves(case)
    assert torch.autograd.gradcheck(lambda *t: backend.linear(*t, case.alpha), inputs)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("lead", [(5,), (2, 3), ()], ids=["2d", "3d", "1d"])
def test_without_gradient_gives_the_same_bits_and_saves_nothing(backend: Backend, mode, lead):
    tensors = leaves(CASE.but(lead=lead))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with mode():
            y = backend.linear(*tensors, CASE.alpha)
        frozen = backend.linear(*(t.detach() for t in tensors), CASE.alpha)
    assert saved == [] and not y.requires_grad and not frozen.requires_grad
    assert y.is_inference() == (mode is torch.inference_mode)
    want = backend.linear(*tensors, CASE.alpha)
    assert torch.equal(y, want) and torch.equal(frozen, want)


def test_result_without_gradient_may_be_written_into_later(backend: Backend):
    """A frozen encoder's features, changed by something that trains."""
    with torch.no_grad():
        y = backend.linear(*leaves(CASE.but(lead=(2, 3))), CASE.alpha)
    shift = torch.ones(CASE.N, requires_grad=True)
    y.add_(shift).sum().backward()
    assert torch.equal(shift.grad, torch.full((CASE.N,), 6.0))


def test_inference_tensors_as_parameters_run(backend: Backend):
    with torch.inference_mode():
        tensors = [t.clone() for t in leaves(CASE)]
        inside = backend.linear(*tensors, CASE.alpha)
    with torch.no_grad():
        assert torch.equal(backend.linear(*tensors, CASE.alpha), inside)


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("adapter", [torch.float32, None], ids=["fp32", "same"])
def test_autocast_gives_the_dtype_of_linear(backend: Backend, amp, x_dtype, adapter):
    inputs = make_inputs(CASE.but(dtype=x_dtype, adapter_dtype=adapter))
    tensors = [inputs[n].detach().requires_grad_() for n in NAMES]
    x, weight, bias, A, B = tensors
    with torch.autocast("cpu", dtype=amp):
        y = backend.linear(*tensors, CASE.alpha)
        plain = F.linear(x, weight, bias)
        plain = plain + CASE.alpha * (x @ A @ B)
    assert y.dtype == plain.dtype == amp
    ours = torch.autograd.grad(y, tensors, inputs["dy"].to(amp))
    theirs = torch.autograd.grad(plain, tensors, inputs["dy"].to(amp))
    for name, mine, other, tensor in zip(NAMES, ours, theirs, tensors, strict=True):
        assert mine.dtype == tensor.dtype, name
        assert_same_up_to_rounding(mine.to(amp), other.to(amp))


def test_autocast_leaves_float64_alone(backend: Backend):
    tensors = leaves(DOUBLE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = backend.linear(*tensors, CASE.alpha)
        assert y.dtype == F.linear(*tensors[:3]).dtype == torch.float64
    assert torch.equal(y, backend.linear(*tensors, CASE.alpha))
    y.sum().backward()
    assert all(t.grad.dtype == torch.float64 for t in tensors)


def test_autocast_switched_off_inside_runs_in_full(backend: Backend):
    tensors = leaves(CASE)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        y = backend.linear(*tensors, CASE.alpha)
    assert torch.equal(y, backend.linear(*tensors, CASE.alpha))


def test_backward_inside_autocast_keeps_dtypes(backend: Backend):
    tensors = leaves(CASE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        backend.linear(*tensors, CASE.alpha).sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in tensors)


def test_gradients_accumulate(backend: Backend):
    layer = make_layer(backend=backend.name)
    x = make_inputs(CASE)["x"]
    layer(x).square().sum().backward()
    once = {n: p.grad.clone() for n, p in layer.named_parameters()}
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter.grad, 2 * once[name])


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "autocast"])
def test_checkpointing_gives_equal_gradients(backend: Backend, use_reentrant, amp):
    inputs = make_inputs(CASE.but(lead=(2, 3)))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
        dy = inputs["dy"].bfloat16() if amp else inputs["dy"]
        want = gradients(backend.linear, inputs | {"dy": dy}, CASE.alpha)

        def checkpointed(*arguments):
            return checkpoint(backend.linear, *arguments, use_reentrant=use_reentrant)

        leaf = {n: inputs[n].detach().requires_grad_() for n in NAMES}
        y = checkpointed(*leaf.values(), CASE.alpha)
    y.backward(dy)
    assert torch.equal(y, want["y"])
    assert all(torch.equal(t.grad, want[f"d{n}"]) for n, t in leaf.items())


@pytest.mark.parametrize("dx", [False, True])
def test_what_was_saved_is_read_and_not_what_it_has_become(backend: Backend, dx):
    """Where saved tensors may be written to: PyTorch keeps what they were."""
    found = []
    for write in (False, True):
        x, *others = leaves(CASE)
        with torch.autograd.graph.allow_mutation_on_saved_tensors():
            y = backend.linear(x.requires_grad_(dx) * 1, *others, CASE.alpha)
            with torch.no_grad():
                for t in others:
                    t.mul_(3 if write else 1)
            y.sum().backward()
        found.append([t.grad for t in (x, *others) if t.grad is not None])
    assert len(found[0]) == 4 + dx and all(map(torch.equal, *found))


def pickled(layer):
    return pickle.loads(pickle.dumps(layer))


def torch_saved(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, torch_saved])
def test_copy_of_a_layer_is_its_own_and_equal(backend: Backend, copied):
    layer = make_layer(backend=backend.name)
    x = make_inputs(CASE)["x"]
    layer(x).sum().backward()
    twin = copied(layer)
    assert torch.equal(twin(x), layer(x)) and twin.backend == layer.backend
    twin(x).sum().backward()
    with torch.no_grad():
        twin.lora.B.add_(1), twin.weight.add_(1)
    assert not torch.equal(twin(x), layer(x))
    assert torch.equal(layer(x), make_layer(backend=backend.name)(x))


@settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    lead=st.lists(st.integers(0, 9), max_size=3).map(tuple),
    K=st.integers(1, 70),
    N=st.integers(1, 70),
    R=st.integers(1, 20),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    bias=st.booleans(),
    layout=st.sampled_from([name for name in LAYOUTS if name != "bias_strided"]),
)
def test_any_shape_keeps_the_error_rule(backend: Backend, lead, K, N, R, dtype, bias, layout):
    if "dy" in layout or layout == "x_expanded":  # takes the first element of what must have one
        lead = tuple(max(size, 1) for size in lead) or (1,)
    if layout in ("x_transposed", "x_every_other_row", "dy_transposed") and not lead:
        lead = (2,)
    check(backend.linear, Case(lead, K, N, R, dtype, bias=bias, layout=layout))
