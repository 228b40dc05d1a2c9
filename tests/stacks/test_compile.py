"""torch.compile and the operators as torch.library sees them."""

import shutil

import pytest
import torch

from lora_ext import lora_linear
from lora_ext.backends import BACKENDS
from lora_ext.testing import NAMES, Case, broken_rules, expected, gradients
from tests.conftest import Backend, small_call
from tests.op.test_autograd import make_layer

CASE = Case((6,), 24, 40, 4)
NEEDS_COMPILER = pytest.mark.skipif(
    not (shutil.which("c++") or shutil.which("g++")), reason="inductor needs a C++ compiler"
)
WITHOUT_CPP = BACKENDS["cpp"].unsupported(small_call())


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "case",
    [
        CASE,
        CASE.but(lead=(2, 3), bias=False),
        CASE.but(lead=()),
        CASE.but(dtype=torch.bfloat16, adapter_dtype=torch.float32),
    ],
    ids=str,
)
def test_compiled_graph_gives_eager_bits(backend: Backend, case):
    """aot_eager traces forward and backward and runs what was traced, unfused."""
    compiled = torch.compile(backend.linear, fullgraph=True, backend="aot_eager")
    want = expected(case)
    eager = gradients(backend.linear, want.inputs, case.alpha)
    ours = gradients(compiled, want.inputs, case.alpha)
    assert all(torch.equal(ours[name], eager[name]) for name in eager)


@NEEDS_COMPILER
@pytest.mark.parametrize("case", [CASE.but(lead=(2, 3))], ids=str)
def test_inductor_keeps_the_error_rule(backend: Backend, case):
    compiled = torch.compile(backend.linear, fullgraph=True)
    want = expected(case)
    assert broken_rules(gradients(compiled, want.inputs, case.alpha), want) == []


@NEEDS_COMPILER
def test_inductor_runs_a_frozen_layer_in_a_model(backend: Backend):
    """As in fine-tuning: only A and B train, what follows is written in place."""
    layer = make_layer(CASE, backend=backend.name)
    layer.linear.requires_grad_(False)
    model = torch.nn.Sequential(layer, torch.nn.ReLU(inplace=True))
    x = expected(CASE).inputs["x"]

    def step(run):
        model.zero_grad()
        y = run(x)
        y.square().sum().backward()
        return y.detach(), layer.lora.A.grad, layer.lora.B.grad

    eager = step(model)
    for ours, theirs in zip(step(torch.compile(model, fullgraph=True)), eager, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert layer.weight.grad is None


def test_compiled_layer_follows_batch_size_and_mode(backend: Backend):
    layer = make_layer(CASE, backend=backend.name)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (6, 3, 11, 1):
        x = torch.randn(rows, 24)
        assert torch.equal(compiled(x), layer(x))
        with torch.no_grad():
            assert torch.equal(compiled(x), layer(x))
        with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
            assert torch.equal(compiled(x), layer(x))


@pytest.mark.skipif(WITHOUT_CPP is not None, reason=str(WITHOUT_CPP))
@pytest.mark.parametrize(
    "case",
    [
        CASE,
        CASE.but(bias=False, dtype=torch.bfloat16),
        CASE.but(dropout=0.3),
        CASE.but(base=False),
        CASE.but(layout="A_transposed"),
        CASE.but(layout="B_transposed"),
    ],
    ids=str,
)
def test_operators_pass_opcheck(case):
    inputs = expected(case).inputs
    x, weight, bias, A, B = (inputs[n] for n in NAMES)
    ops, keep = torch.ops.lora_ext, {"keep": inputs.get("keep")}
    forward = (x, weight, bias, A, B, case.alpha)
    torch.library.opcheck(ops.linear_fwd.default, forward, keep)
    _, h = ops.linear_fwd(*forward, **keep)
    base = case.base
    for needs in (
        [True, base, base and case.bias, True, True],
        [False, False, False, True, True],
        [True] + [False] * 4,
    ):
        arguments = (inputs["dy"], x, weight, A, B, h, case.alpha, needs)
        torch.library.opcheck(ops.linear_bwd.default, arguments, keep)


@pytest.mark.skipif(WITHOUT_CPP is not None, reason=str(WITHOUT_CPP))
@pytest.mark.parametrize(
    ("argument", "shape", "message"),
    [
        ("x", (6,), r"x must have shape \(M, in_features\), got \(6,\)"),
        ("weight", (40, 23), r"weight must have shape \(40, 24\), got \(40, 23\)"),
        ("bias", (41,), r"bias must have shape \(40,\), got \(41,\)"),
        ("A", (23, 4), r"A must have shape \(24, 4\), got \(23, 4\)"),
        ("B", (4, 39), r"B must have shape \(4, 40\), got \(4, 39\)"),
    ],
)
def test_operator_called_by_itself_checks_shapes(argument, shape, message):
    inputs = expected(CASE).inputs | {argument: torch.zeros(shape)}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lora_ext.linear_fwd(*(inputs[n] for n in NAMES), 1.0)


@pytest.mark.skipif(WITHOUT_CPP is not None, reason=str(WITHOUT_CPP))
def test_operator_called_by_itself_checks_dtypes():
    inputs = expected(CASE).inputs
    x, weight, bias, A, B = (inputs[n] for n in NAMES)
    op = torch.ops.lora_ext.linear_fwd
    with pytest.raises(RuntimeError, match="weight must have x's dtype Float, got Double"):
        op(x, weight.double(), bias, A, B, 1.0)
    with pytest.raises(RuntimeError, match="A must have x's dtype Float, got BFloat16"):
        op(x, weight, bias, A.bfloat16(), B, 1.0)
    with pytest.raises(RuntimeError, match="x must have dtype float32, float64, bfloat16"):
        op(*(t.long() for t in (x, weight, bias, A, B)), 1.0)


def test_default_backend_is_the_first_that_runs():
    want = expected(CASE)
    arguments = [want.inputs[n] for n in NAMES]
    first = next(n for n, b in BACKENDS.items() if b.unsupported(small_call()) is None)
    chosen = lora_linear(*arguments, CASE.alpha)
    assert torch.equal(chosen, lora_linear(*arguments, CASE.alpha, backend=first))
