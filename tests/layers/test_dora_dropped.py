"""DoRA with a small dropout: a layer by one product with the weight and a sparse one."""

import pytest
import torch

from lora_ext import dora_dropped as module
from lora_ext.backends import BACKENDS
from lora_ext.call import Call, LowRank, Weight
from lora_ext.dora import row_scale
from lora_ext.dora_dropped import is_few
from lora_ext.dropout import pack_bits
from lora_ext.testing.parity import Parity, check_parity, why_skipped
from tests.conftest import small_call
from tests.op.dora import (
    DTYPES,
    LAYOUTS,
    SCALE,
    SIZES,
    P,
    operands,
    ours,
    plain,
    refused_dora,
    results,
)

WITHOUT_CPP = BACKENDS["cpp"].unsupported(small_call())
pytestmark = pytest.mark.skipif(WITHOUT_CPP is not None, reason=str(WITHOUT_CPP))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_y_and_gradients_are_as_close_to_float64_as_two_products(dtypes, layout):
    assert (why := refused_dora(dtypes=[dtypes], layouts=[layout])) is None, why


def test_without_a_bias_and_with_what_needs_no_gradient():
    given, weight, mask = operands((70, 91, 67, 4))
    given["bias"] = None
    exact, found = (results(of, given, weight, mask) for of in (plain, ours))
    for name, right in exact.items():
        torch.testing.assert_close(found[name], right, rtol=1e-4, atol=1e-3, msg=name)
    for name in ("x", "A", "B", "g"):
        leaves = {n: t if t is None else t.detach().clone() for n, t in given.items()}
        leaves[name].requires_grad_()
        ours(leaves, weight, mask).sum().backward()
        assert [n for n, t in leaves.items() if t is not None and t.grad is not None] == [name]


def test_where_x_is_dropped_its_gradient_is_that_of_the_plain_product_alone():
    """To the last digits, however large what the dropped product is multiplied by."""
    given, weight, mask = operands((70, 91, 67, 4))
    given["g"] = torch.full_like(given["g"], 1e4)
    given["x"].requires_grad_()
    ours(given, weight, mask).sum().backward()
    want = weight.sum(0).expand(70, 91)
    torch.testing.assert_close(given["x"].grad[~mask], want[~mask], rtol=1e-4, atol=2e-1)
    assert (given["x"].grad[mask].abs() > 1e4).any()


def test_both_derivatives_are_right():
    given, weight, mask = operands((6, 9, 5, 2), "float64")
    leaves = [t.requires_grad_() for t in given.values()]

    def of(*values):
        return ours(dict(zip(given, values, strict=True)), weight, mask)

    assert torch.autograd.gradcheck(of, leaves)
    assert torch.autograd.gradgradcheck(of, leaves)


def test_results_do_not_depend_on_the_number_of_threads():
    given = operands((300, 700, 600, 8))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results(ours, *given)
        torch.set_num_threads(4)
        four = results(ours, *given)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one["y"], four["y"])
    for name, right in one.items():
        torch.testing.assert_close(four[name], right, rtol=1e-4, atol=1e-3, msg=name)


def test_two_products_are_taken_where_one_is_not_faster():
    given, weight, _ = operands((128, 9, 7, 2))
    x, bias, A, B, g = given.values()
    call = Call(x, Weight(weight), bias, LowRank(A, B, 1.0, None))
    assert is_few(call, g, 0.05) and is_few(call._replace(bias=None), g, 0.05)
    assert not is_few(call, g, 0.0) and not is_few(call, g, 0.5)
    assert not is_few(call, g.double(), 0.05)
    low = call.low._replace(A=A.double(), B=B.double())
    for other in (
        {"x": x[:10]},
        {"x": x[:, :0], "weight": Weight(weight[:, :0])},
        {"weight": Weight(weight.bfloat16())},
        {"weight": Weight(weight.clone().requires_grad_())},
        {"bias": bias.double()},
        {"low": low},
    ):
        assert not is_few(call._replace(**other), g, 0.05), other
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_few(call, g, 0.05)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_norms_are_those_of_the_adapted_rows(dtypes, layout):
    for size in SIZES:
        given, weight, _ = operands(size, dtypes, layout)
        A, B = given["A"], given["B"]
        exact = weight.double() + SCALE * (A.double() @ B.double()).T
        g = row_scale(torch.ones(len(weight)), weight, A, B, SCALE)
        eps = torch.finfo(torch.promote_types(weight.dtype, torch.float32)).eps
        want = 1 / torch.linalg.vector_norm(exact, dim=1)
        torch.testing.assert_close(g.double(), want, rtol=8 * eps, atol=0)


def test_norms_without_the_kernel_are_the_same(monkeypatch):
    given, weight, _ = operands((9, 1100, 300, 8))
    with_it = row_scale(torch.ones(300), weight, given["A"], given["B"], SCALE)
    monkeypatch.setattr(BACKENDS["cpp"], "unsupported", lambda call: "asked to")
    without = row_scale(torch.ones(300), weight, given["A"], given["B"], SCALE)
    assert without is not with_it
    torch.testing.assert_close(without, with_it, rtol=1e-6, atol=0)


def test_the_operators_shape_rules_are_their_results():
    given, weight, mask = operands((70, 91, 67, 4), "bfloat16")
    x, A, B, keep, y = given["x"], given["A"], given["B"], pack_bits(mask), torch.empty(70, 67)
    ops = torch.ops.lora_ext
    norm = (ops.dora_norm, (weight, A, B, SCALE))
    fwd = (
        ops.dora_dropped_fwd,
        (y.bfloat16(), x, weight, None, x @ A, B, keep, given["g"], 1.0, P),
    )
    for op, arguments in (norm, fwd):
        fakes = (t.to("meta") if isinstance(t, torch.Tensor) else t for t in arguments)
        got, fake = op(*arguments), op(*fakes)
        assert (fake.shape, fake.dtype) == (got.shape, got.dtype)


WRONG = {
    "y": torch.zeros(3, 5),
    "x": torch.zeros(4, 6, dtype=torch.float64),
    "weight": torch.zeros(6, 5),
    "bias": torch.zeros(4),
    "h": torch.zeros(4, 3),
    "B": torch.zeros(2, 6),
    "keep": torch.zeros(4, 2, dtype=torch.uint8),
    "factor": torch.zeros(5, dtype=torch.float64),
    "p": 1.0,
}


@pytest.mark.parametrize("name", WRONG)
def test_the_operators_name_a_wrong_argument(name):
    given = {
        "y": torch.zeros(4, 5),
        "x": torch.zeros(4, 6),
        "weight": torch.zeros(5, 6),
        "bias": torch.zeros(5),
        "h": torch.zeros(4, 2),
        "B": torch.zeros(2, 5),
        "keep": torch.zeros(4, 1, dtype=torch.uint8),
        "factor": torch.zeros(5),
        "scale": 1.0,
        "p": 0.1,
    }
    ops = torch.ops.lora_ext
    ops.dora_dropped_fwd(**given)
    with pytest.raises(RuntimeError, match=rf", ({name}|x|y) must"):
        ops.dora_dropped_fwd(**given | {name: WRONG[name]})
    if name in ("weight", "keep", "factor"):
        backward = {
            "dx": given["x"],
            "dy": given["y"],
            **{n: given[n] for n in WRONG if n in given},
        }
        backward = {n: backward[n] for n in ("dx", "dy", "weight", "keep", "factor")}
        ops.dora_dropped_bwd(**backward)
        with pytest.raises(RuntimeError, match=f", {name} must"):
            ops.dora_dropped_bwd(**backward | {name: WRONG[name]})
    if name in ("weight", "B"):
        norm = {"weight": given["weight"], "A": torch.zeros(6, 2), "B": given["B"], "scale": 1.0}
        ops.dora_norm(**norm)
        with pytest.raises(RuntimeError, match=", (A|B) must"):
            ops.dora_norm(**norm | {name: WRONG[name]})


@pytest.mark.parametrize("feature", ["DoRA", "several adapters, DoRA"])
@pytest.mark.parametrize("base", ["nn.Linear", "Conv1D"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_layer_is_as_close_to_float64_as_pefts_own(monkeypatch, feature, base, dtype):
    """With its masks, of a small layer too."""
    case = Parity(feature, base, dtype, dropout=0.05)
    if why := why_skipped(case):
        pytest.skip(why)
    seen, own = [], module.dora_dropped
    monkeypatch.setattr(module, "_LEAST_ROWS", 1)
    monkeypatch.setattr(
        "lora_ext.integrations.peft_forward.dora_dropped",
        lambda *given: seen.append(given) or own(*given),
    )
    check_parity(case)
    assert len(seen) == (1 if feature == "DoRA" else 0)  # y of an adapter before is there already
