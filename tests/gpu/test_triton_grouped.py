"""Several layers of one x by Triton, jointly: launches, bits, and wrong kernels that are refused.

In Triton's interpreter, next to tests/op/test_grouped.py, which holds the error rule over the
regimes; and what is chosen on cards, without either interpreter or GPU.
"""

import pytest
import torch

pytest.importorskip("triton")

from lora_ext import gated_mlp
from lora_ext.backends import triton
from lora_ext.backends.triton import group_kernels, group_launches, grouping, regime
from lora_ext.call import Call
from lora_ext.parts import Part
from lora_ext.testing import expected
from lora_ext.testing.backend import make_call
from tests.conftest import Backend
from tests.gpu.changed import changed
from tests.gpu.launched import record_launches, run_once
from tests.op.groups import FP16, FP32, ODD, WIDE, broken_in_group

KERNELS = ("lora_linears_shrink_kernel", "lora_linears_bwd_dx_kernel")
# Ranks of one block and of several, more columns than a tile, masks of each, of one, and none.
MASKED = [ODD.but(dropout=0.3), ODD.but(N=40, R=19, dropout=0.3, alpha=-0.5)]
MIXED = [ODD.but(N=70, R=3), ODD.but(N=40, R=8, dropout=0.3), ODD.but(N=9, bias=False)]
GROUPS = [MIXED, MASKED]
NEEDS = (True, False, False, True, True)

COLUMN = "* M * ROW + COLUMN[g]"
LEGS = "acc = base_product(\n                    acc, dy[g]"
SHRINK_MASK = "kept = keep_only(x_tile, keep[g], m0, k0, M, K, BLOCK_M, BLOCK_K)"
STRIP_MASK = "kept = keep_only(x_tile, keep[g], m0, k0, M, K, STRIP_M, STRIP)"
DX_MASK = "part, keep[g], m0, k0 + i * HALF"
DX_PART = "half += keep_only("
MUTANTS = {
    "columns_of_the_first_layer": (COLUMN, COLUMN.replace("[g]", "[0]")),
    "columns_one_off": (COLUMN, COLUMN.replace("COLUMN[g]", "COLUMN[g] + (g > 0)")),
    "steps_of_the_shrink_left_out": ("tl.minimum(first + steps * BLOCK_K, K)", "first + BLOCK_K"),
    "parts_of_the_shrink_overlap": ("first = s * steps * BLOCK_K", "first = s * BLOCK_K"),
    "a_layers_sum_in_the_nexts": ("a_tile, acc[g], input", "a_tile, acc[0], input"),
    "mask_of_the_first_layer_in_h": (SHRINK_MASK, SHRINK_MASK.replace("[g]", "[len(R) - 1]")),
    "mask_of_the_last_layer_in_dA": (STRIP_MASK, STRIP_MASK.replace("[g]", "[len(R) - 1]")),
    "mask_of_the_last_layer_in_dx": (DX_MASK, DX_MASK.replace("keep[g]", "keep[len(R) - 1]")),
    "mask_of_the_first_half_in_both": (DX_MASK, DX_MASK.replace(" + i * HALF", "")),
    "masked_part_of_the_last_alone": (DX_PART, DX_PART.replace("+=", "=")),
    "a_half_left_out": ("for i in tl.static_range(2):", "for i in tl.static_range(1):"),
    "leg_of_the_last_layer_left_out": (
        f"for g in tl.static_range(len(R)):\n                {LEGS}",
        f"for g in tl.static_range(len(R) - 1):\n                {LEGS}",
    ),
    "legs_each_from_zero": (LEGS, LEGS.replace("acc, dy", "acc * 0, dy")),
    "weight_of_the_first_layer": ("acc, dy[g], w[g]", "acc, dy[g], w[0]"),
    "low_rank_part_of_dx_left_out": ("if keep[g] is None:", "if keep[g] is None and g > 0:"),
    "scale_of_the_first_layer_in_dA": ("scale[g] * acc[g]", "scale[0] * acc[g]"),
    "dB_of_the_first_layer_alone": ("pid -= runs", "pid -= runs + (g == 0)"),
}


@pytest.fixture
def interpreted(backend: Backend, monkeypatch):
    """Run once, in the interpreter, with plans made again."""
    run_once(backend, "triton-two_launches", monkeypatch)
    monkeypatch.setattr(grouping, "_plans", {})


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """The names of the kernels that are launched."""
    return record_launches(monkeypatch)


@pytest.mark.parametrize("cases", GROUPS, ids=["mixed", "masked"])
def test_x_is_shrunk_once_and_dx_written_once(interpreted, launched, cases):
    assert broken_in_group(cases, "triton") == []
    G = len(cases)
    assert launched == [
        KERNELS[0],
        *["lora_linear_fwd_kernel"] * G,
        *["lora_linear_bwd_dy_kernel"] * G,
        KERNELS[1],
    ]


def test_more_layers_than_legs_are_summed(interpreted, launched):
    cases = [ODD.but(N=n, R=r, dtype=FP16, adapter_dtype=FP32) for n, r in ((9, 2), (5, 1)) * 3]
    assert broken_in_group(cases, "triton") == []
    assert launched.count(KERNELS[0]) == launched.count(KERNELS[1]) == 2


@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_kernels_are_refused(interpreted, monkeypatch, tmp_path, name):
    module = changed(group_kernels, MUTANTS[name], tmp_path)
    for kernel in KERNELS:
        monkeypatch.setattr(group_launches, kernel, getattr(module, kernel))
    assert any(broken_in_group(cases, "triton") for cases in GROUPS)


def calls_of(cases) -> tuple[list[Call], list[torch.Tensor]]:
    """Return the calls of a group and their dy."""
    wants = [expected(case) for case in cases]
    calls = [make_call(w.inputs, case.alpha) for w, case in zip(wants, cases, strict=True)]
    return calls, [want.inputs["dy"] for want in wants]


@pytest.mark.parametrize("case", [WIDE.but(R=5), WIDE.but(R=40, dropout=0.3)], ids=str)
@pytest.mark.parametrize("forward", ["two_launches", "persistent", "torch_base"])
def test_jointly_a_single_layer_has_the_bits_of_its_own_call(interpreted, launched, forward, case):
    ((call,), (dy,)) = calls_of([case])
    with regime(forward=forward, backward="two_launches", group="joint"):
        (y,), (h,) = triton.forward_group([call])
        (got,) = triton.backward_group([dy], [call], [h], [NEEDS])
        assert set(KERNELS) < set(launched)
        want_y, want_h = triton.forward(call)
        want = triton.backward(dy, call, want_h, NEEDS)
    assert torch.equal(y, want_y) and torch.equal(h, want_h)
    # A mask's part of dx comes first in a single call, and last in a sum of legs.
    bitwise = slice(1 if case.dropout else 0, None)
    for a, b in zip(got[bitwise], want[bitwise], strict=True):
        assert (a is b is None) or torch.equal(a, b)


def test_one_layer_is_not_run_jointly_unasked(interpreted, launched):
    ((call,), (dy,)) = calls_of([WIDE])
    with regime():
        (y,), (h,) = triton.forward_group([call])
        (got,) = triton.backward_group([dy], [call], [h], [NEEDS])
        assert not set(KERNELS) & set(launched)
        assert torch.equal(y, triton.forward(call)[0])
        assert torch.equal(got[0], triton.backward(dy, call, h, NEEDS)[0])


@pytest.mark.parametrize("without_dx", [False, True])
def test_a_group_asks_each_layer_for_what_it_needs(interpreted, without_dx):
    calls, dys = calls_of(MIXED)
    _, hs = triton.forward_group(calls)
    needs = [(not without_dx, False, False, *own) for own in ((1, 0), (0, 1), (1, 1))]
    got = triton.backward_group(dys, calls, hs, needs)
    for own, call, dy, h, need in zip(got, calls, dys, hs, needs, strict=True):
        _, *want = triton.backward(dy, call, h, (False, *need[1:]))
        assert [g is None for g in own[1:]] == [not n for n in need[1:]]
        for a, b in zip(own[1:], want, strict=True):
            assert b is None or torch.allclose(a, b, rtol=1e-5, atol=1e-5)
    assert [dx is not None for dx, *_ in got] == [not without_dx, False, False]


def test_a_gated_mlp_runs_its_first_layers_jointly(interpreted, launched):
    cases = [WIDE.but(N=40, R=3, dropout=0.3), WIDE.but(N=40), WIDE.but(K=40, N=24)]
    parts = []
    for case in cases:
        given = expected(case).inputs
        own = {name: given[name].detach().requires_grad_() for name in ("weight", "bias", "A", "B")}
        parts.append(Part(**own, scale=case.alpha, dropout=case.dropout))
    x = expected(cases[0]).inputs["x"].detach().requires_grad_()
    leaves = [x, *(t for part in parts for t in part[:4])]
    found = {}
    for name in ("triton", "reference"):
        torch.manual_seed(0)
        y = gated_mlp.run(x, parts[:2], parts[2], gated_mlp.Formula("silu"), "act", name)
        found[name] = y, *torch.autograd.grad(y.square().sum(), leaves)
    # And `down` as a group of one, which alone is asked for here.
    assert launched.count(KERNELS[0]) == launched.count(KERNELS[1]) == 2
    for got, want in zip(found["triton"], found["reference"], strict=True):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()  # three products, one square
