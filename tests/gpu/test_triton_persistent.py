"""The persistent regime: wrong kernels that the checks refuse, and what it compiles to.

The first in Triton's interpreter, the rest without either interpreter or GPU.
"""

import re

import pytest
import torch

pytest.importorskip("triton")

from lora_ext.backends.triton import (
    backward_launches,
    cards,
    forward_launches,
    persistent_kernels,
    tiling,
    tuning,
)
from lora_ext.backends.triton.backward_launches import Backward
from lora_ext.backends.triton.forward_launches import Forward
from lora_ext.backends.triton.regimes import REGIMES
from lora_ext.testing import TAILS, Case, check
from tests.conftest import Backend, linear_of
from tests.gpu import codegen
from tests.gpu.changed import changed
from tests.gpu.launched import INTERPRETED, launches_of, record_launches, run_once
from tests.op.test_mutants import refused

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
compiled = pytest.mark.skipif(INTERPRETED, reason="needs the compiler, not the interpreter")
KERNELS = {
    "lora_linear_fwd_persistent_kernel": forward_launches,
    "lora_linear_bwd_dx_persistent_kernel": backward_launches,
}
# More tiles than programs; h in parts; a rank of two blocks, and dB without parts; half dtypes; no
# bias; a mask.
CASES = [
    TAILS,
    TAILS.but(dropout=0.3),
    TAILS.but(lead=(70,), N=64, bias=False),
    Case((19,), 72, 88, 100),
]
CASES += [TAILS.but(dtype=FP16, adapter_dtype=FP32)]

LOOP = "tl.range(tl.program_id(0), tiles, PROGRAMS"
H = "sum_of_h(h, h_out, m0, n0, r0, M, R, SPLITS"
RANKS, ONE = (f"    for r0 in tl.static_range({ranks}):" for ranks in ("0, R, BLOCK_R", "1"))
MUTANTS = {
    "last_tile_left_out": (LOOP, LOOP.replace("tiles", "tiles - 1")),
    "first_tiles_alone": (LOOP, LOOP.replace("tiles", "PROGRAMS")),
    "each_program_the_first_tile": ("tile_of(pid, M", "tile_of(pid % PROGRAMS, M"),
    "first_step_again": ("x.load([m0, k0])", "x.load([m0, 0])"),
    "steps_left_out": ("range(0, K, BLOCK_K)", "range(0, K - BLOCK_K, BLOCK_K)"),
    "halves_swapped": ("y.store([m0, n0], left", "y.store([m0, n0], right"),
    "a_half_left_out": ("y.store([m0, n0 + HALF], right.to(y.dtype))", "pass"),
    "bias_twice": ("acc += tl.load(bias", "acc += 2 * tl.load(bias"),
    "bias_of_the_first_tile": ("mask=offs_n < N, other", "mask=offs_n < BLOCK_N, other"),
    "second_block_of_ranks_left_out": (
        f"        {RANKS}",
        "            for r0 in tl.static_range(1):",
    ),
    "parts_of_h_left_out": (H, H.replace("SPLITS", "1")),
    "h_not_given_back": (H, H.replace("n0", "n0 + 1")),
    "mask_forgotten_in_dx": ("keep_only(part, keep, m0, n0, M, N, BLOCK_M, BLOCK_N)", "part"),
    "mask_of_the_other_half": ("m0, n0 + HALF, M, N", "m0, n0, M, N"),
    "masked_half_left_out": ("right += masked_part(", "masked_part("),
    "mask_forgotten_in_dA": ("x, t, keep, dA", "x, t, None, dA"),
    "first_run_of_dB_left_out": ("for run in tl.range(pid,", "for run in tl.range(pid + 1,"),
    "scale_forgotten_in_dB": ("dB_parts, dB, scale", "dB_parts, dB, 1.0"),
    "scale_forgotten_in_strips_of_dB": ("h, None, dB, scale", "h, None, dB, 1.0"),
    "strips_of_a_lane_left_out": ("if lane < lanes:", "if lane < lanes - 1:"),
    "low_rank_part_of_dx_unscaled": ("dx, scale_dx, power_dx", "dx, 1.0, power_dx"),
}


@pytest.fixture
def interpreted(backend: Backend, monkeypatch):
    """Run once, next to the regime itself, with plans made again."""
    run_once(backend, "triton-persistent", monkeypatch)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_regime_runs_what_the_wrong_kernels_are_shown(interpreted, monkeypatch, case):
    launched = record_launches(monkeypatch)
    check(linear_of("triton"), case)
    assert set(KERNELS) <= set(launched)


@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_kernels_are_refused(interpreted, monkeypatch, tmp_path, name):
    module = changed(persistent_kernels, MUTANTS[name], tmp_path)
    for kernel, where in KERNELS.items():
        monkeypatch.setattr(where, kernel, getattr(module, kernel))
    assert refused(linear_of("triton"), CASES) is not None


def call_of(direction: str, M: int, R: int, dtype: torch.dtype, masked: bool = False):
    """Return a forward or a backward over meta tensors."""
    N = K = 4096

    def empty(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    keep = empty(M, K // 32, of=torch.int32) if masked else None
    x, weight, A, B = empty(M, K), empty(N, K), empty(K, R), empty(R, N)
    if direction == "forward":
        return Forward(x, weight, empty(N), A, B, 0.5, keep)
    return Backward(empty(M, N), x, weight, A, B, empty(M, R), 0.5, (True, True, True), keep)


def problem_of(call: Forward | Backward):
    """Return what the choice depends on."""
    forward = isinstance(call, Forward)
    return tuning.forward_problem(call) if forward else tuning.backward_problem(call)


def launched(card: cards.Card, direction: str, call, tile: tiling.Tile) -> list:
    """Return the launches of a call in this regime."""
    run = tuning.planned(direction, "persistent", call, problem_of(call), tile, card)
    return launches_of(lambda: run(call))


def first_use_of_h(ttgir: str, arguments: dict) -> str:
    """Return what a kernel does first: wait for the launch before it, or read h, or neither.

    A tile of h, or of t in a backward, is the one read of (BLOCK_M, BLOCK_R).
    """
    tile = f"{arguments['BLOCK_M']}x{arguments['BLOCK_R']}x"
    wait, read = "griddepcontrol.wait", rf"(?:tt\.load|async_copy_global_to_local) .*tensor<{tile}!"
    found = re.search(f"{wait}|{read}", ttgir)
    return "neither" if found is None else "waits" if found[0] == wait else "reads"


QUICK = ("sm_90", "forward", 8192, 16, BF16, False)
COMPILED = [
    (family, *case)
    for family in ("sm_90", "sm_100")
    for case in (
        ("forward", 8192, 16, BF16, False),
        ("forward", 2048, 16, FP16, False),
        ("forward", 2048, 32, FP16, False),
        ("forward", 8192, 64, FP16, False),
        ("forward", 2048, 100, FP16, False),
        ("forward", 8192, 128, FP16, False),
        ("backward", 8192, 16, BF16, False),
        ("backward", 8192, 64, FP16, True),
        ("backward", 2048, 128, FP16, False),
    )
    if (family, case[0]) != ("sm_100", "backward")
]


@compiled
@pytest.mark.parametrize(
    ("family", "direction", "M", "R", "dtype", "masked"),
    [pytest.param(*c, marks=() if c == QUICK else pytest.mark.slow) for c in COMPILED],
)
def test_both_launches_fit_an_sm_and_wait_in_time(
    family, direction, M, R, dtype, masked, tmp_path, monkeypatch
):
    """No spills; TMA in and out; h read after the wait; at small ranks room for both on an SM."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    card = next(card for card in cards.KNOWN.values() if card.family == family)
    call = call_of(direction, M, R, dtype, masked)
    tiles = REGIMES[direction]["persistent"].tiles(problem_of(call), card)
    assert tiles
    pairs = [launched(card, direction, call, tile) for tile in tiles]
    made = [[codegen.compile_launch(family, *launch) for launch in pair] for pair in pairs]
    codegen.machine_code([result for results in made for result in results])
    for pair, results in zip(pairs, made, strict=True):
        machines = [codegen.read(result, loops=True) for result in results]
        for machine in machines:
            assert machine.stack == machine.atomics == machine.waiting == 0
            assert machine.shared <= card.shared_bytes
        assert "griddepcontrol.launch_dependents" in results[0].asm["ptx"]
        assert results[1].metadata.launch_pdl
        assert first_use_of_h(results[1].asm["ttgir"], pair[1][2]) == "waits"
        assert "cp.async.bulk.tensor.2d.global.shared" in results[1].asm["ptx"]
        expected = "HGMMA" if family == "sm_90" else "UTC"
        assert machines[1].matrix.startswith(expected) and machines[1].wide >= 2
        if R <= 16 and M == 8192:
            assert registers_of(pair, machines) <= 65536
            shared = sum(machine.shared + cards.KIB for machine in machines)
            assert shared <= card.shared_bytes + cards.KIB


def registers_of(pair: list, machines: list[codegen.Machine]) -> int:
    """Return the registers of a program of each launch: a thread has them by eights."""
    threads = (32 * launch[2]["num_warps"] for launch in pair)
    return sum(n * -(-m.registers // 8) * 8 for n, m in zip(threads, machines, strict=True))


@compiled
@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "found"),
    [
        (("                    gdc_wait()", "                    pass"), "reads"),
        (("DEPENDENT and r0 == 0", "DEPENDENT and r0 > 0"), "reads"),
    ],
)
def test_a_kernel_that_reads_h_too_soon_is_noticed(change, found, tmp_path, monkeypatch):
    module = changed(persistent_kernels, change, tmp_path)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    name = "lora_linear_fwd_persistent_kernel"
    monkeypatch.setattr(forward_launches, name, getattr(module, name))
    card = cards.KNOWN["H100"]
    tile = tiling.persistent_tiles(card, "half", 16)[0]
    _, second = launched(card, "forward", call_of("forward", 8192, 16, BF16), tile)
    ttgir = codegen.compile_launch("sm_90", *second).asm["ttgir"]
    assert first_use_of_h(ttgir, second[2]) == found
