"""Second derivatives: under create_graph a gradient has a graph of its own, and a right one.

In float64 nothing is there to compare with that is more exact. So the values are quarters of whole
numbers, alpha is a half of one and the losses are squares: every product and sum fits into 53 bits,
and the results must be equal.
"""

from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian, hvp

from lora_ext import LinearWithLoRA, lora_linear
from lora_ext.testing import NAMES, Case, compare, make_inputs, plain_linear
from lora_ext.testing import LinearWithLoRA as PlainLinearWithLoRA
from lora_ext.testing.rule import broken_rules, expected
from tests.conftest import Backend, linear_of
from tests.op.test_autograd import make_layer
from tests.op.test_mutants import changed

SMALL = Case((3,), 5, 4, 2, dtype=torch.float64, alpha=1.5)
CASES = [
    SMALL,
    SMALL.but(bias=False),
    SMALL.but(lead=(2, 2)),
    SMALL.but(lead=()),
    SMALL.but(dropout=0.4),
    SMALL.but(base=False),
    SMALL.but(base=False, dropout=0.4),
]
# Which of x, weight, bias, A, B require a gradient.
NEEDS = {
    "all": "x weight bias A B",
    "frozen_base": "x A B",
    "no_dx": "A B",
    "A_frozen": "x B",
    "B_frozen": "x A",
    "A_frozen_no_dx": "B",
    "x_alone": "x",
    "weight_alone": "weight",
    "A_frozen_base_trains": "x weight B",
}


def leaves(case: Case, needs: str = NEEDS["all"]) -> list[torch.Tensor | None]:
    """Return x, weight, bias, A and B; those named in `needs` require a gradient."""
    inputs = make_inputs(case)
    given = [(n, inputs[n]) for n in NAMES]
    if case.dtype == torch.float64:
        given = [(n, None if t is None else (4 * t).round() / 4) for n, t in given]
    return [None if t is None else t.detach().requires_grad_(n in needs.split()) for n, t in given]


def with_mask(linear, case: Case):
    """Return a function of x, weight, bias, A and B with the case's mask."""
    keep = make_inputs(case).get("keep")
    masked = {} if keep is None else {"keep": keep}
    return lambda *tensors: linear(*tensors, case.alpha, **masked)


def penalty_gradients(
    linear, case: Case, needs: str, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Return the gradients of a loss that holds the squares of the first gradients.

    The first gradient's own dy is a function of y, as in any loss but a sum. It is computed in
    `dtype` on the case's values.
    """
    tensors = [
        None if t is None else t.detach().to(dtype).requires_grad_(t.requires_grad)
        for t in leaves(case, needs)
    ]
    wanted = {
        n: t for n, t in zip(NAMES, tensors, strict=True) if t is not None and t.requires_grad
    }
    y = with_mask(linear, case)(*tensors)
    first = torch.autograd.grad(y.square().sum(), list(wanted.values()), create_graph=True)
    loss = y.square().sum() + sum(g.square().sum() for g in first)
    second = torch.autograd.grad(loss, list(wanted.values()))
    return dict(zip(wanted, second, strict=True))


def wrong_penalties(linear, case: Case, needs: str) -> list[str]:
    """Return what of `penalty_gradients` breaks the error rule."""
    ours, plain, exact = (
        penalty_gradients(function, case, needs, dtype)
        for function, dtype in (
            (linear, case.dtype),
            (plain_linear, case.dtype),
            (plain_linear, torch.float64),
        )
    )
    eps = 0 if case.dtype == torch.float64 else torch.finfo(case.dtype).eps
    found = [
        error
        for n, want in exact.items()
        for error in compare(
            f"d{n}", ours[n], plain[n], want, lambda norm, t=want: 16 * eps * norm(t)
        )
    ]
    return [str(error) for error in found if error.broken]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradgradcheck_passes(backend: Backend, case):
    given = [t for t in leaves(case) if t is not None]

    def function(*tensors):
        rest = iter(tensors)
        arguments = [None if t is None else next(rest) for t in leaves(case)]
        return with_mask(backend.linear, case)(*arguments)

    assert torch.autograd.gradgradcheck(function, given)


@pytest.mark.parametrize("needs", NEEDS.values(), ids=NEEDS)
@pytest.mark.parametrize("case", [SMALL, SMALL.but(dropout=0.4), SMALL.but(base=False)], ids=str)
def test_a_gradient_penalty_is_the_plain_layers(backend: Backend, case, needs):
    if not case.base:
        needs = " ".join(n for n in needs.split() if n in "xAB")
    if not needs:
        pytest.skip("nothing of the base requires a gradient where there is none")
    assert wrong_penalties(backend.linear, case, needs) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("needs", ["x A B", "A B"])
def test_a_gradient_penalty_keeps_the_error_rule(backend: Backend, dtype, needs):
    case = Case((37,), 96, 160, 8, dtype)
    assert wrong_penalties(backend.linear, case, needs) == []


def test_hessian_is_the_plain_layers(backend: Backend):
    x, weight, bias, A, B = leaves(SMALL)

    def loss(linear, x, A, B):
        return linear(x, weight, bias, A, B, SMALL.alpha).sin().sum()

    ours, plain = (hessian(partial(loss, f), (x, A, B)) for f in (backend.linear, plain_linear))
    for mine, other in zip(sum(ours, ()), sum(plain, ()), strict=True):
        torch.testing.assert_close(mine, other)


def test_hessian_vector_product_is_the_plain_layers(backend: Backend):
    """By differentiating twice backwards: hvp's way, with a dy that has no graph."""
    x, weight, bias, A, B = leaves(SMALL)
    vector = torch.randn_like(x), torch.randn_like(A), torch.randn_like(B)

    def loss(linear, x, A, B):
        return linear(x, weight, bias, A, B, SMALL.alpha).square().sum()

    (_, ours), (_, plain) = (
        hvp(partial(loss, f), (x, A, B), vector) for f in (backend.linear, plain_linear)
    )
    for mine, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, other)


def test_third_derivatives_are_right(backend: Backend):
    third = []
    for linear in (backend.linear, plain_linear):
        x, weight, bias, A, B = tensors = leaves(SMALL, "x A B")
        y = linear(*tensors, SMALL.alpha).sin().sum()
        for wanted in (A, x, B):
            (gradient,) = torch.autograd.grad(y, wanted, create_graph=True)
            y = gradient.square().sum()
        third.append(gradient)
    torch.testing.assert_close(*third)


def test_the_first_gradient_is_the_same_with_and_without_a_graph(backend: Backend):
    """To rounding: the one by our kernels, the other by PyTorch's operations."""
    want = expected(Case((37,), 96, 160, 8))
    tensors = [want.inputs[n].detach().requires_grad_() for n in NAMES]
    y, dy = backend.linear(*tensors, 1.7), want.inputs["dy"].detach().requires_grad_()
    for create in (True, False):
        grads = torch.autograd.grad(y, tensors, dy, create_graph=create, retain_graph=True)
        assert all(g.requires_grad == create for g in grads)
        got = {f"d{n}": g.detach() for n, g in zip(NAMES, grads, strict=True)}
        assert broken_rules(got, want) == []


@pytest.mark.parametrize("attached", ["nothing", "hook", "subclass"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trains"])
def test_a_layers_gradient_penalty_is_the_plain_layers(attached, frozen):
    """With something attached to the linear, the low-rank part runs alone over its result."""
    if attached == "subclass":

        class Linear(nn.Linear):
            pass

    else:
        Linear = nn.Linear
    linear = Linear(SMALL.K, SMALL.N, dtype=SMALL.dtype).requires_grad_(not frozen)
    ours, plain = (
        kind(linear, SMALL.R, SMALL.alpha) for kind in (LinearWithLoRA, PlainLinearWithLoRA)
    )
    if attached == "hook":
        linear.register_forward_hook(lambda module, args, y: y)
    values = make_layer(SMALL).lora.state_dict()
    second = []
    for layer in (ours, plain.double()):
        layer.lora.load_state_dict(values)
        x = make_inputs(SMALL)["x"].requires_grad_()
        parameters = [x, layer.lora.A, layer.lora.B] + ([] if frozen else [linear.weight])
        (dx,) = torch.autograd.grad(layer(x).sin().sum(), x, create_graph=True)
        second.append(torch.autograd.grad(dx.square().sum(), parameters))
    for mine, other in zip(*second, strict=True):
        torch.testing.assert_close(mine, other)


WRONG = {
    "h_without_its_graph": (
        "if need_dB and rows is not None:  # h again",
        "if False:  # h again",
    ),
    "h_again_without_the_mask": ("h = reference.masked(rows, keep) @", "h = rows @"),
    "gradient_through_h_lost": ("if dh is not None:", "if False:"),
    "gradient_through_h_without_the_mask": (
        "reference.masked(dh @ A.to(dh.dtype).T, keep)",
        "dh @ A.to(dh.dtype).T",
    ),
    "kernels_under_create_graph": ("if under_create_graph or", "if"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_second_derivative_is_refused(name):
    module = changed("functional.py", WRONG[name])
    refused = []
    for case in (SMALL, SMALL.but(dropout=0.4)):
        for needs in NEEDS.values():
            try:
                refused += wrong_penalties(linear_of("reference", module), case, needs)
            except RuntimeError as error:
                refused.append(str(error))
    assert refused


def test_create_graph_over_lora_linear_needs_no_backend_named():
    """As a user calls it."""
    tensors = leaves(SMALL)
    assert torch.autograd.gradgradcheck(lambda *t: lora_linear(*t, SMALL.alpha), tensors)


def test_a_factor_changed_in_place_is_noticed_where_h_is_computed_again():
    """Without dx an ordinary backward reads no A, and takes it changed as PyTorch does."""
    x, weight, bias, A, B = leaves(SMALL, NEEDS["no_dx"])
    for create_graph in (False, True):
        y = lora_linear(x, weight, bias, A, B, SMALL.alpha)
        with torch.no_grad():
            A.mul_(2)
        if create_graph:
            with pytest.raises(RuntimeError, match="A must be as it was in the forward"):
                torch.autograd.grad(y.sum(), B, create_graph=True)
        else:
            want = SMALL.alpha * (x @ (A / 2)).T @ torch.ones_like(y)
            assert torch.equal(torch.autograd.grad(y.sum(), B)[0], want)
