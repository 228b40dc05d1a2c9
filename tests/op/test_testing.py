"""lora_ext.testing itself: what it accepts and what it refuses."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from lora_ext import lora_linear
from lora_ext.dropout import pack_bits, unpack_bits
from lora_ext.testing import (
    LAYOUTS,
    NAMES,
    TAILS,
    Case,
    Error,
    LinearWithLoRA,
    broken_rules,
    check,
    compare,
    errors,
    every_case,
    expect,
    expected,
    gradients,
    make_inputs,
    plain_linear,
)

MASKED = TAILS.but(K=91, dropout=0.3)


def test_plain_of_the_rule_is_the_reference_class():
    """`plain_linear` is what everything is measured by: it must be the reference classes."""
    want = expected(TAILS)
    layer = LinearWithLoRA(torch.nn.Linear(96, 160), 8, TAILS.alpha)
    state = {"linear.weight": want.inputs["weight"], "linear.bias": want.inputs["bias"]}
    state |= {"lora.A": want.inputs["A"], "lora.B": want.inputs["B"]}
    layer.load_state_dict(state, strict=True)
    assert torch.equal(layer(want.inputs["x"]), want.plain["y"])
    assert plain_linear(*(want.inputs[n] for n in NAMES), 0.0).any()


def test_plain_with_a_mask_drops_for_the_low_rank_part_alone():
    want = expected(MASKED.but(dtype=torch.float64))
    x, weight, bias, A, B = (want.inputs[n] for n in NAMES)
    kept = unpack_bits(want.inputs["keep"], 91)
    y = F.linear(x, weight, bias) + MASKED.alpha * ((x * kept) @ A @ B)
    torch.testing.assert_close(want.plain["y"], y)
    dx = want.inputs["dy"] @ weight
    dx = dx + MASKED.alpha * kept * (want.inputs["dy"] @ B.T @ A.T)
    torch.testing.assert_close(want.plain["dx"], dx)
    torch.testing.assert_close(want.plain["h"], (x * kept) @ A)


def test_plain_without_a_base_is_the_low_rank_part():
    case = MASKED.but(base=False, dtype=torch.float64)
    want = expected(case)
    assert want.inputs["weight"] is None and want.inputs["bias"] is None
    assert sorted(want.plain) == ["dA", "dB", "dx", "h", "y"]
    whole = expected(case.but(base=True))
    low = whole.plain["y"] - F.linear(*(whole.inputs[n] for n in ("x", "weight", "bias")))
    torch.testing.assert_close(
        plain_linear(
            *(None if n in ("weight", "bias") else whole.inputs[n] for n in NAMES),
            case.alpha,
            keep=whole.inputs["keep"],
        ),
        low,
    )


@pytest.mark.parametrize("K", [1, 7, 8, 9, 91, 96])
def test_mask_is_packed_least_significant_bit_first(K):
    kept = torch.rand(5, K) < 0.5
    bits = pack_bits(kept)
    assert bits.shape == (5, -(-K // 8)) and bits.dtype == torch.uint8
    assert torch.equal(unpack_bits(bits, K), kept)
    for m, k in torch.cartesian_prod(torch.arange(5), torch.arange(bits.shape[1] * 8)).tolist():
        bit = int(bits[m, k // 8]) >> (k % 8) & 1
        assert bit == (bool(kept[m, k]) if k < K else 0)


def test_mask_drops_its_share():
    keep = make_inputs(Case((100,), 100, 1, 1, dropout=0.3))["keep"]
    assert 0.27 < 1 - unpack_bits(keep, 100).double().mean() < 0.33


def test_a_mask_leaves_the_other_inputs_as_they_are():
    one, other = make_inputs(TAILS), make_inputs(TAILS.but(dropout=0.3))
    assert all(torch.equal(one[n], other[n]) for n in (*NAMES, "dy")) and "keep" not in one


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_keeps_the_values_or_says_so(name):
    laid_out, contiguous = make_inputs(TAILS.but(layout=name)), make_inputs(TAILS)
    changed = [n for n in (*NAMES, "dy") if not torch.equal(laid_out[n], contiguous[n])]
    assert changed == ([name.split("_")[0]] if "expanded" in name else [])
    tensor = laid_out[LAYOUTS[name][0]]
    aligned = tensor.is_contiguous() and tensor.data_ptr() % 16 == 0
    assert aligned == (name == "contiguous")


def test_every_case_has_a_name_of_its_own():
    cases = every_case()
    assert len(set(map(str, cases))) == len(set(cases)) > 200


def test_check_accepts_lora_linear_and_refuses_one_percent():
    check(lora_linear, TAILS)

    def wrong(x, weight, bias, A, B, alpha):
        return lora_linear(x, weight, bias, A, B, 1.01 * alpha)

    for dtype, name in ((torch.float32, "y"), (torch.bfloat16, "dA")):
        with pytest.raises(
            AssertionError, match=rf"^M37-K96-N160-R8-\w+:\n{name}: .* error .* > 2"
        ):
            check(wrong, TAILS.but(dtype=dtype))


def test_check_refuses_a_mask_that_is_not_applied():
    def without(*arguments, keep):
        return lora_linear(*arguments)

    def right(x, weight, bias, A, B, alpha, *, keep):
        return plain_linear(x, weight, bias, A, B, alpha, keep=keep)

    check(right, MASKED)
    with pytest.raises(AssertionError, match="y: max error"):
        check(without, MASKED)


def test_one_wrong_element_of_many_is_seen():
    want = expected(TAILS.but(dtype=torch.bfloat16))
    got = gradients(lora_linear, want.inputs, TAILS.alpha)
    assert broken_rules(got, want) == []
    limit = {e.norm: e.limit for e in errors(got, want) if e.result == "dweight"}
    got["dweight"][7, 3] += 4 * limit["max"]
    (line,) = broken_rules(got, want)
    assert line.startswith("dweight: max error")


def test_a_small_error_in_every_element_is_seen():
    """Below what the largest element's error allows, above the usual one."""
    want = expected(TAILS)
    limit = {e.norm: e.limit for e in errors({"y": want.plain["y"]}, want)}
    y = want.exact["y"] + 0.9 * limit["max"]
    (line,) = broken_rules({"y": y.float()}, want)
    assert line.startswith("y: rms error")


def test_wrong_shape_and_dtype_are_named():
    want = expected(TAILS)
    got = {"y": want.plain["y"][:-1], "dA": want.plain["dA"].double()}
    assert broken_rules(got, want) == [
        "y: (36, 160) torch.float32, not (37, 160) torch.float32",
        "dA: (96, 8) torch.float64, not (96, 8) torch.float32",
    ]


def test_a_nan_of_ours_breaks_the_rule_and_one_of_plain_lifts_it():
    assert Error("y", "max", math.nan, 0.1, 0.1).broken
    assert not Error("y", "max", math.nan, math.nan, 0.1).broken
    assert not Error("y", "max", 0.3, 0.1, 0.1).broken and Error("y", "max", 0.31, 0.1, 0.1).broken


def test_compare_takes_the_floor_it_is_given():
    exact = torch.ones(4, dtype=torch.float64)
    found = compare("loss", exact + 0.5, exact, exact, lambda norm: 0.5 * norm(exact))
    assert [error.norm for error in found] == ["max", "rms"]
    assert not any(error.broken for error in found)
    assert all(error.share == 1.0 for error in found)
    tighter = compare("loss", exact + 0.5, exact, exact, lambda norm: 0.4 * norm(exact))
    assert all(error.broken for error in tighter)


def test_only_the_gradients_asked_for_are_made():
    inputs = make_inputs(TAILS)
    want = expect(inputs, TAILS.alpha, of=("x", "A", "B"))
    assert sorted(want.exact) == sorted(want.plain) == ["dA", "dB", "dx", "h", "y"]
    assert sorted(gradients(lora_linear, inputs, TAILS.alpha, of=())) == ["y"]


@pytest.mark.slow
def test_importing_it_takes_no_test_package():
    script = "import sys, lora_ext.testing\nprint({'pytest', 'hypothesis'} & set(sys.modules))"
    command = [sys.executable, "-W", "ignore", "-c", script]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.stdout.strip() == "set()", ran.stderr
