"""torch.func, torch.export and torch.compile with moving shapes, over layers of ours."""

import io

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from lora_ext import lora_linear, lora_linears
from lora_ext.parts import LEAST
from lora_ext.testing import make_inputs
from tests.conftest import Backend
from tests.numerics import assert_same_up_to_rounding
from tests.op.test_autograd import CASE, leaves, make_layer
from tests.stacks.test_compile import NEEDS_COMPILER
from tests.stacks.test_training import use_backend
from tests.training import batches, loss_of, make_models


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad, torch.func.jacrev])
def test_transform_of_lora_linear_raises_and_says_what_to_do(backend: Backend, transform):
    x, *others = leaves(CASE)
    with pytest.raises(RuntimeError, match="lora_linear has no rule .* call a LinearWithLoRA"):
        transform(lambda x: backend.linear(x, *others, CASE.alpha).sum())(x)


def test_other_errors_of_lora_linear_stay_as_they_are():
    x, weight, bias, A, B = leaves(CASE)
    with pytest.raises(ValueError, match="A must have shape"):
        torch.func.grad(lambda x: lora_linear(x, weight, bias, A.T, B, 1.0).sum())(x)


def test_vmap_over_models_is_each_model_by_itself(backend: Backend):
    """An ensemble: parameters stacked, one functional call."""
    models = [make_models()["ours"] for _ in range(3)]
    for model in models:
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        use_backend(model, None)
    stacked, _ = torch.func.stack_module_state(models)
    x = batches()[0][0]
    got = torch.func.vmap(
        lambda state: torch.func.functional_call(models[0], state, (x,)), randomness="error"
    )(stacked)
    for model, y in zip(models, got, strict=True):
        use_backend(model, backend.name)
        torch.testing.assert_close(y, model(x), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(got[0], got[1])


def test_functional_call_computes_with_what_it_is_given():
    model = make_models()["ours"]
    x = batches()[0][0]
    other = {n: torch.randn_like(p) * 0.3 for n, p in model.named_parameters()}
    y = torch.func.functional_call(model, other, (x,))
    assert not torch.allclose(y, model(x))
    model.load_state_dict(other)
    torch.testing.assert_close(y, model(x), atol=1e-4, rtol=1e-4)


def test_jvp_through_the_layer_is_the_derivative():
    layer = make_layer(CASE.but(dtype=torch.float64))
    inputs = make_inputs(CASE.but(dtype=torch.float64))
    x, direction = inputs["x"], torch.randn_like(inputs["x"])
    _, tangent = torch.func.jvp(layer, (x,), (direction,))
    with torch.no_grad():  # linear in x but for the bias
        torch.testing.assert_close(tangent, layer(x + direction) - layer(x))


@pytest.mark.parametrize("strict", [False, True], ids=["default", "strict"])
def test_exported_model_gives_the_same_for_any_batch(strict):
    model = make_models()["ours"]
    x = batches(rows=6)[0][0]
    dynamic = ({0: torch.export.Dim("rows", min=1)},)
    program = torch.export.export(model, (x[:3],), dynamic_shapes=dynamic, strict=strict)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer)
    assert set(program.state_dict) == set(model.state_dict())
    with torch.no_grad():
        assert_same_up_to_rounding(loaded.module()(x), model(x))


def test_exported_model_trains():
    """In the default mode; a strict export holds the forward of an autograd Function alone."""
    model = make_models(torch.float64)["ours"]
    x, target = batches(rows=6)[0]
    exported = torch.export.export(model, (x.double(),)).module()
    loss_of(exported, x, target).backward()
    loss_of(model, x, target).backward()
    for name, parameter in exported.named_parameters():
        if name.endswith(("lora.A", "lora.B")):
            torch.testing.assert_close(parameter.grad, model.get_parameter(name).grad)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=NEEDS_COMPILER)])
def test_compiled_training_takes_any_batch_without_a_recompile(compiler):
    """dynamic=True: one graph for every batch size, forward and backward."""
    models = make_models(torch.float64)
    model, plain = (models[name].blocks[0].up for name in ("ours", "plain"))
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=compiler)
    for number, rows in enumerate((4, 7, 2, 11)):
        x = batches(rows=rows)[number][0].double()
        with torch._dynamo.config.patch(error_on_recompile=True):
            y = compiled(x)
        y.square().sum().backward()
        want = plain(x)
        want.square().sum().backward()
        torch.testing.assert_close(y, want)
        for factor in "AB":
            ours, theirs = (getattr(layer.lora, factor).grad for layer in (model, plain))
            torch.testing.assert_close(ours, theirs)


def test_compiled_group_has_one_graph_for_every_batch_without_a_gradient():
    """A group of few rows runs its layers: a compiler may not be asked how many there are."""
    layers = nn.ModuleList(make_layer(CASE) for _ in range(2))
    compiled = torch.compile(lambda x: lora_linears(x, layers), dynamic=True, backend="eager")
    with torch.no_grad():
        for rows in (4, 7, LEAST // CASE.K + 1):
            x = torch.randn(rows, CASE.K)
            with torch._dynamo.config.patch(error_on_recompile=True):
                ys = compiled(x)
            for layer, y in zip(layers, ys, strict=True):
                assert_same_up_to_rounding(y, layer(x))


def test_default_compile_goes_over_to_dynamic_shapes_once(backend: Backend):
    """Without dynamic= a second batch size compiles again, as shapes become symbols; no more."""
    model = make_models(torch.float64)["ours"].blocks[0]
    use_backend(model, backend.name)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for rows in (4, 7, 5, 11):
        x = batches(rows=rows)[0][0].double()
        assert torch.equal(compiled(x), model(x))
    assert counter.frame_count == 2


def test_a_changed_alpha_or_dropout_is_seen_by_compiled_code():
    """PyTorch takes a custom operator's floats for constants, and compiles again for others."""
    layer = make_layer(CASE)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    x = torch.randn(5, layer.in_features)
    for alpha, dropout in ((0.5, 0.0), (0.25, 0.0), (0.25, 1.0), (0.5, 0.0)):
        layer.lora.alpha, layer.lora.dropout = alpha, dropout
        assert_same_up_to_rounding(compiled(x), layer(x))
    assert counter.frame_count <= 4


def test_a_layer_over_a_hooked_linear_compiles_in_one_graph():
    layer = make_layer(CASE)
    layer.linear.register_forward_hook(lambda module, args, y: 2 * y)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.randn(5, layer.in_features)
    assert_same_up_to_rounding(compiled(x), layer(x))


class ByFunction(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        linear, lora = self.layer.linear, self.layer.lora
        return lora_linear(x, linear.weight, linear.bias, lora.A, lora.B, lora.scale)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("how", ["layer", "function", "called"])
@pytest.mark.parametrize("leads", [((5,), (7,)), ((2, 5), (3, 4))])
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_traced_layer_takes_other_rows_and_trains(how, grad, leads):
    """A Function, or its tuple, would keep the rows that it was traced with."""
    layer = make_layer(CASE)
    model = ByFunction(layer) if how == "function" else layer
    if how == "called":
        layer.linear.register_forward_hook(lambda module, args, y: 2 * y)
    first, then = ((*lead, layer.in_features) for lead in leads)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, torch.randn(first))
    x = torch.randn(then)
    assert_same_up_to_rounding(traced(x), layer(x))
    if grad:
        dy = torch.randn(*then[:-1], layer.out_features)
        ours, want = (
            torch.autograd.grad(m(x), list(layer.parameters()), dy) for m in (traced, layer)
        )
        for mine, other in zip(ours, want, strict=True):
            assert_same_up_to_rounding(mine, other)


def test_symbolically_traced_layer_gives_the_same():
    layer = make_layer(CASE)
    x = torch.randn(7, layer.in_features)
    assert_same_up_to_rounding(torch.fx.symbolic_trace(layer)(x), layer(x))


@pytest.mark.parametrize("x", [None, [1.0], 2.0], ids=str)
def test_x_that_is_no_tensor_is_named(x):
    with pytest.raises(TypeError, match="^x must be a torch.Tensor, got "):
        make_layer(CASE)(x)
