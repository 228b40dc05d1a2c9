"""Layers over bitsandbytes' quantised linears whose weight is read and not called, on a CPU."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lora_ext import LinearWithLoRA, explain
from lora_ext.bases import base_of
from lora_ext.call import Weight
from lora_ext.codes import dequantised
from lora_ext.functional import adapted
from lora_ext.testing import Case, broken_rules, expect, gradients, make_inputs

bnb = pytest.importorskip("bitsandbytes", reason="needs the package bitsandbytes")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
CASE = Case((3, 5), 128, 70, 8)
RAGGED = Case((7,), 91, 33, 4)
KINDS = ["nf4", "fp4", "nf4_nested", "fp4_nested_128", "int8"]
EACH = pytest.mark.parametrize("kind", KINDS)


def base(kind: str, case: Case, weight: torch.Tensor, bias: torch.Tensor | None):
    """Return bitsandbytes' linear of a weight, as it is while a model trains."""
    name, *more = kind.split("_")
    if name == "int8":
        made = bnb.nn.Linear8bitLt(case.K, case.N, bias is not None, has_fp16_weights=False)
    else:
        nested = "nested" in more
        made = bnb.nn.Linear4bit(
            case.K, case.N, bias is not None, quant_type=name, compress_statistics=nested
        )
        made.weight.blocksize = 128 if "128" in more else 64
    made.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    made = made.to("cpu").requires_grad_(False).train()
    if bias is not None:
        made.bias.data = bias.clone()
    return made


def layer_of(kind: str, case: Case, seed: int = 0):
    """Return a layer and the inputs it was made of; `weight` is what its base's codes stand for."""
    inputs = make_inputs(case, seed)
    layer = LinearWithLoRA(base(kind, case, inputs["weight"], inputs["bias"]), case.R, case.alpha)
    layer.lora.to(inputs["A"].dtype)
    layer.lora.load_state_dict({"A": inputs["A"], "B": inputs["B"]})
    codes = base_of(layer.linear, x=inputs["x"])
    assert isinstance(codes, Weight), codes
    inputs["weight"] = dequantised(codes, case.N, case.K, case.dtype)
    return layer, inputs | {"codes": codes}


def through(layer: LinearWithLoRA):
    """Return the layer as a function of its operands, as lora_ext.testing calls one."""

    def linear(x, weight, bias, A, B, alpha, *, codes):
        state = {"lora.A": A, "lora.B": B}
        return torch.func.functional_call(layer, state, (x,))

    return linear


def held(layer, inputs, case, linear=None):
    want = expect(inputs, case.alpha, ("x", "A", "B"))
    got = gradients(linear or through(layer), inputs, case.alpha, ("x", "A", "B"))
    assert broken_rules(got, want) == []


@EACH
@pytest.mark.parametrize("case", [CASE, RAGGED, CASE.but(bias=False), CASE.but(lead=(1,))], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_layer_keeps_the_error_rule_of_what_its_codes_stand_for(kind, case, dtype):
    case = case.but(dtype=dtype, adapter_dtype=None if dtype == FP32 else FP32)
    layer, inputs = layer_of(kind, case)
    assert explain(layer, inputs["x"]).startswith("cpp: runs")
    held(layer, inputs, case)


@EACH
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_codes_stand_for_the_values_that_bitsandbytes_computes_with(kind, dtype):
    case = CASE.but(dtype=dtype)  # of whole blocks: see docs/stacks.md for the others
    layer, inputs = layer_of(kind, case)
    linear = layer.linear
    if kind == "int8":
        identity = torch.eye(case.K, dtype=dtype)
        linear.bias = None
        theirs = linear(identity).T
    else:
        state = copy.copy(linear.weight.quant_state)
        state.dtype = dtype  # by what it multiplies with, the forward asks for x's
        theirs = bnb.functional.dequantize_4bit(linear.weight.data, state)
    assert theirs.dtype == dtype and torch.equal(inputs["weight"], theirs)


@EACH
def test_layer_gives_what_it_gives_composed(kind):
    layer, inputs = layer_of(kind, CASE)
    y = layer(inputs["x"])
    layer.linear.register_forward_hook(lambda *_: None)
    assert explain(layer, inputs["x"]).startswith("runs linear(x) + lora(x), composed: ")
    want = layer(inputs["x"])
    assert y.dtype == want.dtype
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)


@EACH
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_autocast_gives_the_composed_result_and_dtype(kind, dtype):
    layer, inputs = layer_of(kind, CASE.but(dtype=dtype, adapter_dtype=FP32))
    ours, theirs = (inputs["x"].clone().requires_grad_() for _ in range(2))
    with torch.autocast("cpu", BF16):
        assert explain(layer, ours).startswith("cpp: runs")
        y, want = layer(ours), layer._composed(theirs)
    assert y.dtype == want.dtype
    y.backward(torch.ones_like(y))
    want.backward(torch.ones_like(want))
    for a, b in ((y, want), (ours.grad, theirs.grad)):
        assert (a - b).float().norm() <= 0.01 * b.float().norm()


@EACH
@pytest.mark.parametrize("change", ["to", "copied", "loaded"])
def test_layer_is_right_after_it_was_moved_copied_or_loaded(kind, change):
    layer, inputs = layer_of(kind, CASE)
    layer(inputs["x"])
    if change == "to":
        layer = layer.to("cpu")
    elif change == "copied":
        layer = copy.deepcopy(layer)
    else:
        other, inputs = layer_of(kind, CASE, seed=1)
        state = {n: t for n, t in other.state_dict().items() if "weight_format" not in n}
        if kind == "int8":
            layer.load_state_dict(state, strict=False)
        else:
            stats = {n[14:]: t for n, t in state.items() if n.startswith("linear.weight.")}
            loaded = bnb.nn.Params4bit.from_prequantized(
                state["linear.weight"], stats, device="cpu", module=layer.linear
            )
            layer.linear.weight = loaded
            layer.load_state_dict({n: t for n, t in state.items() if "weight" not in n}, False)
    held(layer, inputs, CASE)


@EACH
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_bit(kind, reentrant):
    layer, inputs = layer_of(kind, CASE)
    grads = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        x = inputs["x"].clone().requires_grad_()
        layer.zero_grad()
        run(x).backward(inputs["dy"])
        grads.append((x.grad, layer.lora.A.grad, layer.lora.B.grad))
    assert all(map(torch.equal, *grads))


@pytest.mark.slow
def test_second_derivatives_are_those_over_the_weight_itself():
    _, inputs = layer_of("nf4", CASE.but(lead=(4,)))
    given = [inputs[n].double().requires_grad_() for n in ("x", "A", "B")]

    def by_codes(x, A, B):
        return adapted(x, inputs["codes"], None, A, B, 0.5)

    assert torch.autograd.gradcheck(by_codes, given)
    assert torch.autograd.gradgradcheck(by_codes, given)
    x, A, B = (t.detach().float().requires_grad_() for t in given)
    y = by_codes(x, A, B)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    z = x @ inputs["weight"].T + 0.5 * (x @ A @ B)
    (want,) = torch.autograd.grad(z.square().sum(), x, create_graph=True)
    torch.testing.assert_close(dx, want, rtol=1e-4, atol=1e-4)
    ours, theirs = (torch.autograd.grad(t.square().sum(), A)[0] for t in (dx, want))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())


WHY_CALLED = {
    "int8_eval": ("int8", lambda layer, x: layer.eval(), "rounds x to int8 too, in eval mode"),
    "compute_dtype": (
        "nf4",
        lambda layer, x: vars(layer.linear).update(compute_dtype=BF16, compute_type_is_set=True),
        "computes in torch.bfloat16 what x has in torch.float32",
    ),
    "packed": (
        "nf4",
        lambda layer, x: vars(layer.linear.weight.quant_state).update(packing_format_for_cpu=True),
        "has its weight laid out by bitsandbytes for its own product",
    ),
    "bias": (
        "nf4",
        lambda layer, x: setattr(layer.linear.bias, "data", layer.linear.bias.bfloat16()),
        "has a bias of torch.bfloat16 for an x of torch.float32",
    ),
    "not_quantised": (
        "nf4",
        lambda layer, x: vars(layer.linear.weight).update(quant_state=None),
        "is not quantised yet",
    ),
    "shape": (
        "nf4",
        lambda layer, x: vars(layer.linear.weight.quant_state).update(shape=(128, 70)),
        "has a weight quantised in shape (128, 70)",
    ),
    "hooks": ("int8", lambda layer, x: layer.linear.register_forward_hook(print), "has hooks"),
}


@pytest.mark.parametrize("case", WHY_CALLED)
def test_why_a_base_is_called_is_told(case):
    kind, change, why = WHY_CALLED[case]
    layer, inputs = layer_of(kind, CASE)
    change(layer, inputs["x"])
    told = explain(layer, inputs["x"])
    assert told == f"runs linear(x) + lora(x), composed: linear {why}"


def test_a_changed_nested_scale_is_seen():
    layer, inputs = layer_of("nf4_nested", CASE)
    before = base_of(layer.linear, x=inputs["x"])
    assert base_of(layer.linear, x=inputs["x"]).scale is before.scale  # made once
    layer.linear.weight.quant_state.absmax.add_(1)
    assert not torch.equal(base_of(layer.linear, x=inputs["x"]).scale, before.scale)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_weights_subclass_is_asked_for_nothing(kind, monkeypatch):
    """Params4bit answers each attribute through Python, 1.4 us: a call of the layer took 9."""
    layer, inputs = layer_of(kind, CASE)
    asked = []
    own = bnb.nn.Params4bit.__torch_function__

    def counted(cls, function, types, args=(), kwargs=None):
        asked.append(function)
        return own(function, types, args, kwargs)

    monkeypatch.setattr(bnb.nn.Params4bit, "__torch_function__", classmethod(counted))
    layer(inputs["x"])
    assert not asked
    layer.linear.weight.is_cpu  # noqa: B018  the count sees it
    assert asked
