"""Infinities, NaN, zeros and factors at the edge of a dtype."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from lora_ext.testing import (
    NAMES,
    Case,
    Linear,
    broken_rules,
    expect,
    expected,
    gradients,
    make_inputs,
    plain_linear,
)
from tests.conftest import Backend

CASE = Case((37,), 96, 160, 8)
HALVES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_bad_value_stays_in_its_row(backend: Backend, value, dtype):
    case = CASE.but(dtype=dtype)
    clean = make_inputs(case)
    spoilt = clean | {"x": clean["x"].clone(), "dy": clean["dy"].clone()}
    spoilt["x"][5, 17] = value
    spoilt["dy"][11, 3] = value
    want, got = (gradients(backend.linear, inputs, case.alpha) for inputs in (clean, spoilt))
    plain = gradients(plain_linear, spoilt, case.alpha)
    for name, row in (("y", 5), ("dx", 11)):
        others = torch.arange(37) != row
        assert torch.equal(got[name][others], want[name][others])
        # An infinity or a NaN may not vanish either, as by a maximum or a masked load.
        assert torch.equal(got[name][row].isfinite(), plain[name][row].isfinite())
    # dweight and dA sum over rows: column 17 of x meets all of dy, and so on.
    for name in ("dweight", "dbias", "dB"):
        assert torch.equal(got[name].isfinite(), plain[name].isfinite()), name


@pytest.mark.parametrize("where", ["weight", "bias", "A", "B"])
def test_bad_parameter_reaches_what_plain_reaches(backend: Backend, where):
    inputs = make_inputs(CASE)
    inputs[where] = inputs[where].clone()
    inputs[where].view(-1)[3] = float("nan")
    got = gradients(backend.linear, inputs, CASE.alpha)
    plain = gradients(plain_linear, inputs, CASE.alpha)
    for name in got:
        assert torch.equal(got[name].isfinite(), plain[name].isfinite()), name


def test_alpha_zero_gives_the_linear_alone(backend: Backend):
    case = CASE.but(alpha=0.0)
    want = expected(case)
    got = gradients(backend.linear, want.inputs, 0.0)
    assert not got["dA"].any() and not got["dB"].any()


@pytest.mark.parametrize("alpha", [2, np.float32(2), np.int64(2), Fraction(2), True], ids=repr)
def test_any_real_number_is_an_alpha(backend: Backend, alpha):
    if backend.variant:
        pytest.skip("alpha is a float before a variant sees it")
    inputs = make_inputs(CASE)
    got = gradients(backend.linear, inputs, alpha)
    want = gradients(backend.linear, inputs, float(alpha))
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("alpha", [1e39, -1e39, float("inf"), float("nan")])
def test_alpha_that_is_not_finite_in_float32_shows(backend: Backend, alpha):
    """Where alpha meets the sums, y has the plain layer's infinities; Triton scales h, before."""
    if backend.variant == "addmm" and alpha != alpha:
        pytest.skip("MKL's addmm takes NaN for zero; this regime is PyTorch's own products")
    inputs = make_inputs(CASE)
    ours, plain = (gradients(f, inputs, alpha) for f in (backend.linear, plain_linear))
    assert not any(ours[name].isfinite().any() for name in ("y", "dx", "dA", "dB"))
    if backend.name != "triton":
        assert torch.equal(ours["y"].isnan(), plain["y"].isnan())
        assert torch.equal(ours["y"].isposinf(), plain["y"].isposinf())


def test_zero_b_gives_zero_gradient_for_a(backend: Backend):
    """The state in which training starts."""
    inputs = make_inputs(CASE)
    inputs["B"] = torch.zeros_like(inputs["B"])
    got = gradients(backend.linear, inputs, CASE.alpha)
    assert not got["dA"].any() and got["dB"].any()


@pytest.mark.parametrize("alpha", [1e4, -1e4])
def test_large_alpha_in_fp16_stays_finite_where_plain_does(backend: Backend, alpha):
    """Alpha in fp16 is near its maximum: rounded into A or B, or into a product, it overflows."""
    case = CASE.but(dtype=torch.float16, alpha=alpha)
    inputs = make_inputs(case)
    inputs["B"] = inputs["B"] / 64
    inputs["x"] = inputs["x"] / 8
    want = expect(inputs, alpha)
    got = gradients(backend.linear, inputs, alpha)
    assert want.plain["y"].isfinite().all(), "the test's own inputs overflow"
    for name, result in got.items():
        finite = want.plain[name].isfinite()
        assert result[finite].isfinite().all(), name
    largest = torch.finfo(torch.float16).max
    fits = {name: result for name, result in got.items() if want.exact[name].abs().max() < largest}
    assert "y" in fits and broken_rules(fits, want) == []


def test_alpha_beyond_fp16_works_where_the_result_fits(backend: Backend):
    """Alpha is never rounded to x's dtype: 1e6 is no fp16 number."""
    inputs = make_inputs(CASE.but(dtype=torch.float16))
    inputs["B"] = torch.full_like(inputs["B"], 2.0**-20)
    arguments = [inputs[n] for n in NAMES]
    exact = plain_linear(*(t.double() for t in arguments), 1e6)
    error = (backend.linear(*arguments, 1e6).double() - exact).abs().max()
    # h and its product with B are rounded once each: 2^-20 is subnormal, with 4 bits left.
    assert error <= exact.abs().max() / 16


def test_subnormal_inputs_are_not_flushed(backend: Backend):
    inputs = make_inputs(CASE)
    tiny = inputs | {"x": inputs["x"] * 1e-41, "bias": torch.zeros_like(inputs["bias"])}
    y = backend.linear(*(tiny[n] for n in NAMES), CASE.alpha)
    exact = plain_linear(*(tiny[n].double() for n in NAMES), CASE.alpha)
    assert ((y - exact).abs().max() / exact.abs().max()) < 0.01


def test_big_magnitudes_do_not_drown_small_rows(backend: Backend):
    """Each row is a problem of its own: no scale is shared across them."""
    inputs = make_inputs(CASE)
    inputs["x"] = inputs["x"] * torch.logspace(-12, 12, 37)[:, None]
    inputs["bias"] = None
    arguments = [inputs[n] for n in NAMES]
    exact = plain_linear(*(None if t is None else t.double() for t in arguments), CASE.alpha)
    error = (backend.linear(*arguments, CASE.alpha) - exact).abs().amax(1) / exact.abs().amax(1)
    assert error.max() < 1e-5  # float32, K = 96: each row has what is usual for a row


def rules_broken_at_rank_one(linear: Linear, seed: int) -> list[str]:
    """Check where y hangs on one number a row, h: its rounding shows 64 times in a whole row."""
    g = torch.Generator("cpu").manual_seed(seed)
    sizes = [(300, 300), (320, 300), (320,), (300, 1), (1, 320), (300, 320)]
    device = torch.get_default_device()
    drawn = [torch.randn(*size, generator=g, device="cpu").to(device) for size in sizes]
    inputs = dict(zip([*NAMES, "dy"], drawn, strict=True))
    want = expect(inputs, 64.0, device=device)
    return broken_rules(gradients(linear, inputs, 64.0), want)


@pytest.mark.parametrize("seed", [0, 2, 6, 9])  # where one running sum over K broke the rule
def test_large_alpha_at_rank_one(backend: Backend, seed):
    assert rules_broken_at_rank_one(backend.linear, seed) == []
