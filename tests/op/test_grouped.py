"""lora_linears: several layers of one x against the error rule, the single layers and mutants."""

import gc
import weakref

import pytest
import torch
from torch import nn

from lora_ext import LinearWithLoRA, lora_linears
from lora_ext.backends import BACKENDS
from lora_ext.grouped import run
from lora_ext.parts import parts_of
from lora_ext.testing import make_inputs
from tests.numerics import assert_same_up_to_rounding
from tests.op.groups import DTYPES, GROUPS, ODD, WIDE, broken_in_group, cases_of, refused_group
from tests.op.test_mutants import changed


@pytest.mark.parametrize(("dtype", "adapter"), DTYPES, ids=str)
@pytest.mark.parametrize("name", GROUPS)
def test_group_keeps_the_error_rule(backend, name, dtype, adapter):
    if backend.interpreted and backend.variant and "group" not in backend.around.keywords:
        pytest.skip("runs call after call: the single calls' tests run these")
    if backend.interpreted and (GROUPS[name][0].M > 100 or name == "six" or dtype != torch.float32):
        pytest.skip("slow in the interpreter: the single calls' tests run these")
    if backend.name == "triton" and dtype == torch.float64:
        pytest.skip("triton takes no float64")
    if any(case.format != "plain" for case in GROUPS[name]):
        if backend.name == "triton" or dtype == torch.float64:
            pytest.skip("triton takes no codes, and codes no float64")
    assert broken_in_group(cases_of(name, dtype, adapter), backend.name) == []


MASK = "keep=draw_keep(x, p, mask)"
GROUPED_MUTANTS = {
    "one_mask_for_all": (
        f"low = low._replace({MASK})",
        f"first = calls[0].low.keep if calls else None\n"
        f"            low = low._replace(keep=first) if calls else low._replace({MASK})",
    ),
    "dx_of_the_last_alone": ("dx = one if dx is None else dx\n", "dx = one\n"),
    "h_of_the_first_for_all": ("rows_of(dy), call, h,", "rows_of(dy), call, saved[3],"),
    "scale_of_the_first_for_all": ("append((A, B, scale))", "append((A, B, group.calls[0][3][2]))"),
    "dropout_not_scaled": ("(scale_of(dropout) if dropout else 1)", "1"),
    "gradients_of_the_first_for_all": ("gradients[4 * i : 4 * i + 4] = own", "gradients[:4] = own"),
    "codes_of_the_first_in_dx": ("base = of.backward", "base = laid_out[0].backward"),
    "mask_not_kept": ("LowRank(*factors[i], keep)", "LowRank(*factors[i], None)"),
}  # fmt: skip


@pytest.mark.parametrize("name", GROUPED_MUTANTS)
def test_wrong_group_is_refused(name):
    assert refused_group("cpp", changed("grouped.py", GROUPED_MUTANTS[name]))


def test_right_group_is_accepted():
    assert refused_group("cpp", changed("grouped.py")) is None


def layers_of(*sizes: tuple[int, int], K: int = 24, dtype=torch.float32, **kwargs):
    """Return adapted layers of (N, R) over K features, with a B that is not zero."""
    layers = [LinearWithLoRA(nn.Linear(K, N, dtype=dtype), R, 1.5, **kwargs) for N, R in sizes]
    for layer in layers:
        nn.init.normal_(layer.lora.B)
    return layers


def gradients(ys, x, layers):
    wrt = [x] * x.requires_grad
    wrt += [p for layer in layers if layer is not None for p in layer.parameters()]
    return torch.autograd.grad(sum(y.square().sum() for y in ys if y is not None), wrt)


def assert_same(got, want):
    for one, other in zip(got, want, strict=True):
        assert_same_up_to_rounding(one, other)


@pytest.mark.parametrize("mask", ["hash", "torch"])
def test_plain_linears_and_none_are_members_and_draw_nothing(mask):
    first, last = layers_of((16, 4), (8, 3), dropout=0.3, dropout_mask=mask)
    layers = [first, nn.Linear(24, 12), None, last, nn.Linear(24, 5, bias=False)]
    x = torch.randn(5, 7, 24, requires_grad=True)
    results = []
    for ys in (
        lambda: lora_linears(x, layers),
        lambda: [None if layer is None else layer(x) for layer in layers],
    ):
        torch.manual_seed(3)
        results.append((y := ys(), gradients(y, x, layers), torch.get_rng_state()))
    (ys, grads, state), (single_ys, single_grads, single_state) = results
    assert ys[2] is None and "_LoRALinears" in type(ys[0].grad_fn).__name__
    assert_same([y for y in ys if y is not None], [y for y in single_ys if y is not None])
    assert_same(grads, single_grads)
    assert torch.equal(state, single_state)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("lead", [(1,), (3,), (400,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_of_one_layer_have_the_single_ones_bits(dtype, lead, dropout):
    case = WIDE.but(lead=lead, dtype=dtype, dropout=dropout)
    inputs = make_inputs(case)
    x, weight, bias, A, B, dy = (inputs[n] for n in ("x", "weight", "bias", "A", "B", "dy"))
    keep, ops = inputs.get("keep"), torch.ops.lora_ext
    y, h = ops.linear_fwd(x, weight, bias, A, B, 1.5, keep=keep)
    (same_y,), same_h = ops.linears_fwd(
        x, [weight], [bias], [A], [B], [1.5], ["plain"], [keep], [None]
    )
    assert torch.equal(y, same_y) and torch.equal(h, same_h)
    needs = [True] * 5
    want = ops.linear_bwd(dy, x, weight, A, B, h, 1.5, needs, keep=keep)
    got = ops.linears_bwd(
        [dy], x, [weight], [A], [B], [h], [1.5], needs, ["plain"], [keep], [None]
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_group_of_one_is_the_single_layer_bit_for_bit():
    (layer,) = layers_of((16, 4))
    x = torch.randn(5, 24, requires_grad=True)
    (y,) = lora_linears(x, [layer])
    assert torch.equal(y, layer(x))
    assert all(map(torch.equal, gradients([y], x, [layer]), gradients([layer(x)], x, [layer])))


def test_x_without_gradient_frozen_bases_and_unused_results():
    layers = layers_of((16, 4), (8, 3), (8, 2))
    for layer in layers:
        layer.linear.requires_grad_(False)
    x = torch.randn(9, 24)
    ys = lora_linears(x, layers)
    (ys[0].sum() + ys[2].square().sum()).backward()  # v alone has no gradient
    got = [p.grad for layer in layers for p in layer.lora.parameters()]
    assert [g is None for g in got] == [False, False, True, True, False, False]
    for p in (p for layer in layers for p in layer.parameters()):
        p.grad = None
    (layers[0](x).sum() + layers[2](x).square().sum()).backward()
    want = [p.grad for layer in layers for p in layer.lora.parameters()]
    assert_same([g for g in got if g is not None], [g for g in want if g is not None])


def test_backward_twice_and_a_result_changed_in_place():
    layers = layers_of((16, 4), (8, 3))
    x = torch.randn(9, 24, requires_grad=True)
    ys = lora_linears(x, layers)
    loss = sum(y.view(3, 3, -1).mul_(2).square().sum() for y in ys)
    wrt = [x, *(p for layer in layers for p in layer.parameters())]
    first = torch.autograd.grad(loss, wrt, retain_graph=True)
    again = torch.autograd.grad(loss, wrt)
    assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_second_derivatives(dropout):
    layers = [*layers_of((5, 2), (3, 2), K=4, dtype=torch.float64, dropout=dropout)]
    layers.append(nn.Linear(4, 3, dtype=torch.float64))
    parameters = [p for layer in layers for p in layer.parameters()]

    def outputs(x, *_):
        torch.manual_seed(0)
        return tuple(lora_linears(x, layers))

    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(outputs, (x, *parameters))
    assert torch.autograd.gradgradcheck(outputs, (x, *parameters))


def test_autocast_gives_what_the_single_layers_give():
    layers = layers_of((16, 4), (8, 3))
    x = torch.randn(9, 24, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ys, singles = lora_linears(x, layers), [layer(x) for layer in layers]
    assert "_LoRALinears" in type(ys[0].grad_fn).__name__
    assert [y.dtype for y in ys] == [torch.bfloat16] * 2
    assert_same(ys, singles)
    for got, want in zip(gradients(ys, x, layers), gradients(singles, x, layers), strict=True):
        assert got.dtype == want.dtype
        assert (got - want).abs().max() <= 0.02 * want.abs().max()


def spoil_hook(layers):
    layers[1].register_forward_hook(lambda *_: None)


def spoil_linear(layers):
    layers[0].linear.register_forward_pre_hook(lambda *_: None)


def spoil_backend(layers):
    layers[1].backend = "reference"


def spoil_frozen(layers):
    layers[0].lora.A.requires_grad_(False)


def spoil_dtype(layers):
    layers[1].double()


REASONS = {
    spoil_hook: "hooks",
    spoil_linear: "hooks",
    spoil_backend: "backend of its own",
    spoil_frozen: "A is frozen",
    spoil_dtype: "do not fit",
}


@pytest.mark.parametrize("spoil", REASONS, ids=lambda f: f.__name__)
def test_what_a_group_does_not_take_goes_by_single_layers(spoil):
    layers = layers_of((16, 4), (8, 3), dropout=0.2)
    spoil(layers)
    x = torch.randn(9, 24, requires_grad=True)
    state = torch.get_rng_state()
    parts = parts_of(layers, x)
    why = parts if isinstance(parts, str) else run(x, parts)
    assert isinstance(why, str) and REASONS[spoil] in why
    assert torch.equal(torch.get_rng_state(), state)
    if spoil is spoil_dtype:
        with pytest.raises(TypeError, match="weight must have x's dtype"):
            lora_linears(x, layers)
        return
    ys = lora_linears(x, layers)
    torch.set_rng_state(state)
    assert_same(ys, [layer(x) for layer in layers])


def test_more_layers_than_a_product_has_legs():
    layers = layers_of(*[(4, 2)] * 9)
    x = torch.randn(3, 24)
    assert "9" in run(x, parts_of(layers, x))
    assert_same(lora_linears(x, layers), [layer(x) for layer in layers])


def test_a_layer_that_is_none_of_ours_is_named():
    with pytest.raises(TypeError, match="layers must hold modules or None, got int"):
        lora_linears(torch.ones(1, 3), [3])


def test_group_keeps_x_once_and_nothing_after_it():
    layers = layers_of((16, 4), (8, 3), (8, 3))
    x = torch.randn(9, 24, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ys = lora_linears(x, layers)
    assert sum(t is x or t.data_ptr() == x.data_ptr() for t in kept) == 1
    kept.clear()
    y = weakref.ref(ys[0])
    del ys
    gc.collect()
    assert y() is None


def test_operator_refuses_lists_of_other_lengths():
    x, weight = torch.ones(2, 3), torch.ones(4, 3)
    A, B = torch.ones(3, 1), torch.ones(1, 4)
    with pytest.raises(RuntimeError, match="Bs must have 1 elements, one a layer, got 2"):
        torch.ops.lora_ext.linears_fwd(
            x, [weight], [None], [A], [B, B], [1.0], ["plain"], [None], [None]
        )
    other = torch.ones(5, 4)
    with pytest.raises(RuntimeError, match="layers of one x"):
        torch.ops.lora_ext.linears_bwd(
            [torch.ones(2, 4), other], None, [None] * 2, [A] * 2, [B] * 2, [None] * 2,
            [1.0] * 2, [True] + [False] * 8, ["plain"] * 2, [None] * 2, [None] * 2,
        )  # fmt: skip


def test_operators_have_shape_rules():
    x = torch.randn(5, ODD.K)
    W, A, B = torch.randn(7, ODD.K), torch.randn(ODD.K, 2), torch.randn(2, 7)
    two = (
        [W, W],
        [None, None],
        [A, A],
        [B, B],
        [1.0, 2.0],
        ["plain"] * 2,
        [None, None],
        [None] * 2,
    )
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.lora_ext.linears_fwd.default, (x, *two), test_utils=tests)
    dys, hs = [torch.randn(5, 7)] * 2, [x @ A] * 2
    rest = (["plain"] * 2, [None] * 2, [None] * 2)
    for needs in ([True] * 9, [False] + [True] * 8, [True, False, True, False, True] * 2):
        arguments = (dys, x, [W, W], [A, A], [B, B], hs, [1.0, 2.0], needs[:9], *rest)
        torch.library.opcheck(torch.ops.lora_ext.linears_bwd.default, arguments, test_utils=tests)


def test_backends_without_a_way_of_their_own_run_call_after_call():
    assert not hasattr(BACKENDS["reference"], "forward_group")
    assert all(hasattr(BACKENDS[name], "forward_group") for name in ("cpp", "triton"))
