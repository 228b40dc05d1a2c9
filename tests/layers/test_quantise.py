"""quantise_(): plain models over codes, and bitsandbytes' checkpoints in both directions."""

import copy
import pickle
from functools import partial
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
import torch.multiprocessing  # which has tensors sent in shared memory
from torch import nn

from lora_ext import (
    LinearWithLoRA,
    QuantisedLinear,
    explain,
    mark_only_lora_as_trainable,
    merge_,
    quantise_,
    replace_linear_with_lora,
)
from lora_ext.codes import FORMATS
from lora_ext.testing import Case, broken_rules, compare, expect, gradients, make_inputs
from tests.training import MLP, batches

EACH = pytest.mark.parametrize("format", FORMATS)
K, N = 96, 42  # 42 * 96 elements are no whole number of blocks of 128


def linear(dtype=torch.float32, bias=True):
    return nn.Linear(K, N, bias=bias, dtype=dtype)


def of_bitsandbytes(format, plain, block_size=64, nested=False):
    bnb = pytest.importorskip("bitsandbytes", reason="needs the package bitsandbytes")
    if format == "int8":
        made = bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False)
    else:
        made = bnb.nn.Linear4bit(K, N, quant_type=format, compress_statistics=nested)
        made.weight = bnb.nn.Params4bit(
            plain.weight.detach(),
            blocksize=block_size,
            quant_type=format,
            compress_statistics=nested,
            module=made,
        )
    made.load_state_dict(plain.state_dict())
    return made.to("cpu").requires_grad_(False)


@EACH
def test_layer_keeps_the_error_rule_and_the_codes_are_read(format):
    model = nn.Sequential(nn.Linear(128, 70))
    case = Case((3, 5), 128, 70, 8, dropout=0.0)
    inputs = make_inputs(case)
    replace_linear_with_lora(model, 8, case.alpha)
    model[0].linear.load_state_dict({"weight": inputs["weight"], "bias": inputs["bias"]})
    report = quantise_(model, format)
    assert report.quantised == ["0.linear"] and not report.left and report.saved_mib > 0
    assert explain(model[0], inputs["x"]).startswith("cpp: runs")
    inputs |= {"weight": model[0].linear.dequantised(), "codes": model[0].linear.codes()}

    def ours(x, weight, bias, A, B, alpha, *, codes):
        return torch.func.functional_call(model[0], {"lora.A": A, "lora.B": B}, (x,))

    want = expect(inputs, case.alpha, ("x", "A", "B"))
    assert broken_rules(gradients(ours, inputs, case.alpha, ("x", "A", "B")), want) == []


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_alone_is_the_linear_of_what_its_codes_stand_for(format, dtype):
    model = nn.Sequential(linear(dtype))
    quantise_(model, format, block_size=128)
    assert type(model[0]) is QuantisedLinear and model[0].weight.requires_grad is False
    x, dy = torch.randn(4, K, dtype=dtype), torch.randn(4, N, dtype=dtype)
    weight, bias = model[0].dequantised(), model[0].bias.detach()

    def of(run, *tensors):
        x, dy, *others = tensors
        x = x.requires_grad_()
        y = run(x, *others)
        return y.detach(), *torch.autograd.grad(y, x, dy)

    got, plain = of(model, x, dy), of(nn.functional.linear, x, dy, weight, bias)
    exact = of(nn.functional.linear, *(t.detach().double() for t in (x, dy, weight, bias)))
    for name, ours, theirs, right in zip(("y", "dx"), got, plain, exact, strict=True):
        floor = partial(lambda right, norm: torch.finfo(dtype).eps / 2 * norm(right), right)
        found = compare(name, ours, theirs, right, floor)
        assert not any(error.broken for error in found), found


@EACH
@pytest.mark.parametrize("block_size", [64, 128])
def test_state_is_bitsandbytes_own_byte_for_byte(format, block_size):
    plain = linear()
    theirs = of_bitsandbytes(format, plain, block_size).state_dict()
    ours = QuantisedLinear(plain, format, block_size).state_dict()
    assert sorted(ours) == sorted(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


@EACH
@pytest.mark.parametrize("nested", [False, True])
def test_checkpoint_of_bitsandbytes_loads(format, nested):
    plain = linear()
    theirs = of_bitsandbytes(format, plain, 128, nested)
    ours = QuantisedLinear(linear(), format)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert ours.block_size == (64 if format == "int8" else 128)
    same = QuantisedLinear(plain, format, 128)
    assert torch.equal(ours.weight, same.weight) and torch.equal(ours.bias, same.bias)
    if nested and format != "int8":
        torch.testing.assert_close(ours.scale, same.scale, rtol=0.02, atol=0.01)
        state, bnb = theirs.weight.quant_state, pytest.importorskip("bitsandbytes")
        scale = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        assert torch.equal(ours.scale, scale)
    else:
        assert torch.equal(ours.scale, same.scale)


@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_checkpoint_of_ours_loads_into_bitsandbytes(format):
    bnb = pytest.importorskip("bitsandbytes", reason="needs the package bitsandbytes")
    ours = QuantisedLinear(linear(), format)
    state = {n.removeprefix("weight."): t for n, t in ours.state_dict().items() if "weight." in n}
    loaded = bnb.nn.Params4bit.from_prequantized(ours.weight.data, state, device="cpu")
    assert torch.equal(loaded.data, ours.weight)
    assert torch.equal(loaded.quant_state.absmax, ours.scale)
    assert tuple(loaded.quant_state.shape) == (N, K) and loaded.quant_state.dtype == torch.float32


@EACH
def test_state_that_does_not_fit_is_refused(format):
    ours = QuantisedLinear(linear(), format)
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        ours.load_state_dict(linear().state_dict())
    other = QuantisedLinear(nn.Linear(K, 10), format).state_dict()
    with pytest.raises(RuntimeError, match="weight is not one of this layer: weight must be "):
        ours.load_state_dict(other)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        ours.load_state_dict(ours.state_dict() | {"more": torch.ones(1)})
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, before[name])


@EACH
def test_scale_stays_float32_through_to_copies_and_pickles(format, tmp_path):
    model = nn.Sequential(linear())
    quantise_(model, format)
    x = torch.randn(3, K)
    want = model(x)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (copy.deepcopy(model), loaded):
        assert torch.equal(other(x), want)
    scale = model[0].scale
    model.bfloat16()
    assert model[0].scale.dtype == torch.float32 and torch.equal(model[0].scale, scale)
    assert model(x.bfloat16()).dtype == torch.bfloat16


def test_model_trains_over_codes_as_over_their_values():
    losses = {}
    for way in ("codes", "values"):
        torch.manual_seed(3)
        model = MLP(width=64)
        replace_linear_with_lora(model, 4, 2.0)
        quantise_(model, "nf4")
        mark_only_lora_as_trainable(model)
        if way == "values":
            for module in model.modules():
                if isinstance(module, LinearWithLoRA):
                    plain = nn.Linear(module.in_features, module.out_features)
                    plain.weight = nn.Parameter(module.linear.dequantised(), requires_grad=False)
                    plain.bias = module.linear.bias
                    module.linear = plain
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
        losses[way] = []
        for x, target in batches(width=64)[:1] * 8:
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(model(x).flatten(0, -2), target.flatten())
            loss.backward()
            optimiser.step()
            losses[way].append(loss.item())
    assert losses["codes"][-1] < 0.98 * losses["codes"][0]
    torch.testing.assert_close(losses["codes"], losses["values"], rtol=1e-4, atol=1e-4)


def test_what_is_left_is_told_and_shared_linears_stay_shared():
    model = nn.ModuleDict({"a": linear(), "c": linear(torch.float64), "d": linear()})
    model["b"] = model["a"]
    model["d"].register_forward_hook(lambda *_: None)
    report = quantise_(model)
    assert model["a"] is model["b"] and type(model["a"]) is QuantisedLinear
    assert report.left == {"c": "has a weight of torch.float64", "d": "has hooks"}
    assert "quantised 2 linears" in str(report) and "left 2" in str(report)
    assert quantise_(model).quantised == []  # again: nothing to do
    assert "format='nf4', block_size=64" in repr(model["a"])


def test_arguments_are_checked():
    with pytest.raises(TypeError, match="model must be an nn.Module, got int"):
        quantise_(3)
    with pytest.raises(ValueError, match="format must be one of nf4, fp4, int8, got 'int4'"):
        quantise_(nn.Sequential(linear()), "int4")
    with pytest.raises(ValueError, match="block_size must be a power of two from 32 .* got 48"):
        quantise_(nn.Sequential(linear()), block_size=48)
    with pytest.raises(ValueError, match="model must have an nn.Linear in it, below itself"):
        quantise_(linear())


def test_merging_into_codes_raises():
    model = nn.Sequential(linear())
    replace_linear_with_lora(model, 4, 1.0)
    quantise_(model)
    with pytest.raises(ValueError, match="0 can't be merged: "):
        merge_(model)


@EACH
def test_codes_of_inference_mode_are_read(format):
    with torch.inference_mode():
        made = QuantisedLinear(linear(), format)
        x = torch.randn(3, K)
        plain = made(x) - made.bias
        made.scale.mul_(2)
        torch.testing.assert_close(made(x) - made.bias, 2 * plain)


def test_scales_that_change_are_seen():
    """Of int8 what the kernels take is computed once, and again after each change."""
    made = QuantisedLinear(linear(), "int8")
    x = torch.randn(3, made.in_features)
    plain = made(x) - made.bias
    made.scale.mul_(2)
    torch.testing.assert_close(made(x) - made.bias, 2 * plain)
    made.scale = made.scale / 2
    torch.testing.assert_close(made(x) - made.bias, plain)
    assert made.codes().scale is made.codes().scale


def test_copy_after_a_change_of_the_scales_has_the_changed_ones():
    """A copy's tensors count their writes from 0: what was computed before is not taken along."""
    made = copy.deepcopy(QuantisedLinear(linear(), "int8"))
    x = torch.randn(3, made.in_features)
    plain = made(x) - made.bias
    made.scale.mul_(2)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        torch.testing.assert_close(other(x) - made.bias, 2 * plain)


@EACH
def test_state_loaded_by_another_process_is_seen_where_memory_is_shared(format):
    """Codes and scales of a model are shared both or neither: `share_memory()`, a spawned child."""
    model, new = (nn.Sequential(linear()) for _ in range(2))
    new[0].weight.data.mul_(3)
    quantise_(model, format)
    quantise_(new, format)
    x = torch.randn(3, K)
    before = model(x)
    model.share_memory()
    assert model[0].scale.is_shared()
    theirs = pickle.loads(ForkingPickler.dumps(model))  # as a child would get it
    assert torch.equal(theirs(x), before)
    theirs.load_state_dict(new.state_dict())
    assert torch.equal(theirs(x), new(x))
    assert torch.equal(model(x), new(x)) and not torch.equal(before, new(x))
    theirs.load_state_dict({k: v.clone() for k, v in new.state_dict().items()}, assign=True)
    theirs[0].scale.zero_()  # an own one now
    assert torch.equal(model(x), new(x))
