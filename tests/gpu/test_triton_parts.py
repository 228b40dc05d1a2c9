"""Kernels whose programs hand each other parts of a sum: run in any order, and wrong ones.

The regime decode's y and h, and a backward's t. In Triton's interpreter; what they compile to is in
test_triton_codegen.py.
"""

import contextlib
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from lora_ext.backends import triton
from lora_ext.backends.triton import (
    backward_kernels,
    backward_launches,
    cards,
    costs,
    decode_kernels,
    forward_launches,
    tiling,
    tuning,
)
from lora_ext.testing import TAILS, Case, broken_rules, expected, run_backend
from tests.conftest import Backend
from tests.gpu.changed import changed
from tests.gpu.interleaved import interleaved
from tests.gpu.launched import record_launches, run_once

DECODE, PASS_OVER_DY = "lora_linear_decode_kernel", "lora_linear_bwd_dy_kernel"
WHERE = {DECODE: forward_launches, PASS_OVER_DY: backward_launches}
# All sums in parts, of three blocks of rows; y in one part, of several tiles; a rank of two blocks;
# a mask; half dtypes.
CASES = [
    Case((70,), 200, 192, 8),
    Case((5,), 40, 200, 3),
    Case((19,), 72, 128, 100, dropout=0.3),
    TAILS.but(dtype=torch.float16, adapter_dtype=torch.float32),
]
SEEDS = range(6)
CARD = replace(cards.INTERPRETER, sms=16)  # enough for a sum over N in parts of several blocks
NEEDS = (True, False, False, True, False)

PART_OF_Y = "store_tile(part, acc, m0, n0, M, N, N, 1, BLOCK_M, BLOCK_N)"
LAST_OF_Y = "if tl.atomic_add(tiles + tile, 1) == splits:"
LAST_OF_H = "== blocks_r * h_splits - 1:"
SUM_OF_H = "h = load_h(h_parts, m0, r, M, R, h_splits, BLOCK_M, BLOCK_R)"
LEFT = "(before == splits)"
OF_Y = "acc = load_h(y_parts, m0, n0, M, N, splits, BLOCK_M, BLOCK_N)"
SUM_OF_Y = f"{OF_Y}\n                done = 1"
MUTANTS = {
    "a_part_of_y_lost": (PART_OF_Y, f"if s != splits - 1 or splits == 1: {PART_OF_Y}"),
    "each_part_the_first": (
        "tile, s = pid // splits, pid % splits",
        "tile, s = pid // splits, 0 * pid",
    ),
    "own_part_alone": (SUM_OF_Y, "done = 1"),
    "y_summed_before_all_have_arrived": (LAST_OF_Y, LAST_OF_Y.replace(":", " - 1:")),
    "y_summed_by_the_first": (LAST_OF_Y, LAST_OF_Y.replace("== splits", "== 0")),
    "y_without_waiting_for_h": ("done = tl.atomic_add(tiles + tile, 0)", "done = 1"),
    "y_summed_by_nobody_after_h": (LAST_OF_Y, LAST_OF_Y.replace("splits:", "splits + 1:")),
    "h_summed_before_all_have_arrived": (LAST_OF_H, ">= blocks_r * h_splits - 2:"),
    "h_summed_by_nobody": (LAST_OF_H, "== blocks_r * h_splits:"),
    "a_part_of_h_lost": (SUM_OF_H, SUM_OF_H.replace("h_splits", "h_splits - 1")),
    "sum_of_h_not_given_back": ("store_tile(h_out, h, m0, r,", "store_tile(h_sum, h, m0, r,"),
    "tiles_that_wait_for_h_left": (LEFT, "(before == splits + 1)"),
    "tiles_finished_too_soon_by_h": (LEFT, "(before == splits - 1)"),
    "counters_of_the_first_rows": ("tiles + m * tiles_n + at", "tiles + at"),
    "first_waiting_tile_alone": ("n0 = i * BLOCK_N", "n0 = n * BLOCK_N"),
    "mask_forgotten": ("x, a, keep, m0", "x, a, None, m0"),
    "bias_left_out": ("acc = add_bias(acc, bias, n0, N, BLOCK_N)", "pass"),
}
LAST_OF_T = "if tl.atomic_add(arrived + at, 1) == splits - 1:"
SUM_OF_T = "t_tile = load_h(t_parts, m0, r0, M, R, splits, BLOCK_M, BLOCK_R)"
PART_OF_T = "t_part = t_parts + s.to(tl.int64) * M * R"
MUTANTS_OF_T = {
    "a_part_of_t_lost": (SUM_OF_T, SUM_OF_T.replace("splits", "splits - 1")),
    "each_part_the_first": (PART_OF_T, PART_OF_T.replace("s.", "(0 * s).")),
    "own_part_alone": (SUM_OF_T, "pass"),
    "t_summed_before_all_have_arrived": (LAST_OF_T, LAST_OF_T.replace("- 1", "- 2")),
    "t_summed_by_nobody": (LAST_OF_T, LAST_OF_T.replace(" - 1", "")),
    "counter_of_another_block": ("at = pid_m * tl.num_programs(1)", "at = 0 * pid_m"),
}


@pytest.fixture
def interpreted(backend: Backend, monkeypatch):
    """Run once, next to the regime decode, with plans made again."""
    run_once(backend, "triton-decode", monkeypatch)
    monkeypatch.setattr(tuning, "card_of", lambda device: CARD)


def results(case: Case, seed: int | None, needs: tuple[bool, ...]) -> dict[str, torch.Tensor]:
    """Return a case's results, of programs in order or, with a seed, in one drawn from that."""
    with contextlib.nullcontext() if seed is None else interleaved(seed):
        return run_backend(triton, expected(case).inputs, case.alpha, needs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_programs_in_any_order_give_the_same_bits(interpreted, monkeypatch, case):
    launched = record_launches(monkeypatch)
    want = results(case, None, NEEDS)
    assert not broken_rules(want, expected(case))
    for seed in SEEDS:
        got = results(case, seed, NEEDS)
        assert all(torch.equal(t, want[name]) for name, t in got.items())
    assert all(launched.count(name) == 1 + len(SEEDS) for name in WHERE)


def test_sums_in_one_part_and_in_several_are_among_the_cases():
    (tile,) = tiling.decode_tiles(CARD, "half", 16)
    problems = [costs.Problem(c.M, c.K, c.N, c.R) for c in CASES]
    assert {costs.decode_splits(p, tile, CARD) for p in problems} >= {1, 2, 6}
    assert {costs.decode_h_splits(p, tile, CARD) for p in problems} >= {1, 2, 4}
    assert {tiling.dy_splits(CARD, "half", p.M, p.N, p.R) for p in problems} == {2, 3}


@pytest.mark.parametrize(
    ("kernel", "name"),
    [(DECODE, name) for name in MUTANTS] + [(PASS_OVER_DY, name) for name in MUTANTS_OF_T],
)
def test_wrong_kernels_are_refused(interpreted, monkeypatch, tmp_path, kernel, name):
    of_y = kernel == DECODE
    source, change = (
        (decode_kernels, MUTANTS[name]) if of_y else (backward_kernels, MUTANTS_OF_T[name])
    )
    monkeypatch.setattr(WHERE[kernel], kernel, getattr(changed(source, change, tmp_path), kernel))
    runs = ((case, seed, (False,) * 5 if of_y else NEEDS) for seed in SEEDS for case in CASES)
    assert any(broken_rules(results(*run), expected(run[0])) for run in runs)
