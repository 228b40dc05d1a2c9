"""The persistent regime: wrong kernels that the checks refuse, and what it compiles to.

The first in Triton's interpreter, the rest without either interpreter or GPU.
"""

import importlib.util
import os
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from lora_ext.backends import triton as backend
from lora_ext.backends.triton import cards, forward_launches, launches, persistent_kernels, tuning
from lora_ext.backends.triton.forward_launches import Forward
from lora_ext.testing import TAILS, Case, check
from tests.conftest import Backend, linear_of
from tests.gpu import codegen
from tests.op.test_mutants import refused

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SOURCE = Path(persistent_kernels.__file__)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
compiled = pytest.mark.skipif(INTERPRETED, reason="needs the compiler, not the interpreter")
# More tiles than programs; h in parts; a rank of two blocks; half dtypes; no bias.
CASES = [TAILS, TAILS.but(lead=(70,), N=64, bias=False), Case((19,), 72, 88, 100)]
CASES += [TAILS.but(dtype=FP16, adapter_dtype=FP32)]

LOOP = "tl.range(tl.program_id(0), tiles, PROGRAMS"
FORWARD_MUTANTS = {
    "last_tile_left_out": (LOOP, LOOP.replace("tiles", "tiles - 1")),
    "first_tiles_alone": (LOOP, LOOP.replace("tiles", "PROGRAMS")),
    "each_program_the_first_tile": ("tile_of(pid, M", "tile_of(pid % PROGRAMS, M"),
    "first_step_again": ("x.load([m0, k0])", "x.load([m0, 0])"),
    "steps_left_out": ("range(0, K, BLOCK_K)", "range(0, K - BLOCK_K, BLOCK_K)"),
    "halves_swapped": ("y.store([m0, n0], left", "y.store([m0, n0], right"),
    "a_half_left_out": ("y.store([m0, n0 + HALF], right.to(y.dtype))", "pass"),
    "bias_twice": ("acc += tl.load(bias", "acc += 2 * tl.load(bias"),
    "bias_of_the_first_tile": ("mask=offs_n < N, other", "mask=offs_n < BLOCK_N, other"),
    "second_block_of_ranks_left_out": ("tl.static_range(0, R, BLOCK_R)", "tl.static_range(1)"),
    "parts_of_h_left_out": ("tl.static_range(1, SPLITS)", "tl.static_range(1, 1)"),
    "a_part_of_h_twice": ("(s * R)", "(1 * R)"),
    "h_not_given_back": ("mask=inside & (n0 == 0)", "mask=inside & (n0 < 0)"),
}


def kernels_of(source: str, folder: Path):
    """Return a changed copy of the kernels: from a file, which Triton reads them from."""
    path = folder / "changed.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(f"{backend.__name__}.changed", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def changed(change: tuple[str, str]) -> str:
    """Return the kernels' source with one place changed."""
    source = SOURCE.read_text()
    assert source.count(change[0]) == 1, f"{change[0]!r} is not there once: fix the test"
    return source.replace(*change)


@pytest.fixture
def interpreted(backend: Backend, monkeypatch):
    """Run once, next to the regime itself, with plans made again."""
    if str(backend) != "triton-persistent" or not INTERPRETED:
        pytest.skip("runs once, in the interpreter")
    monkeypatch.setattr(tuning, "_plans", {})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_regime_runs_what_the_wrong_kernels_are_shown(interpreted, monkeypatch, case):
    launched = []
    real = launches.launch

    def launch(kernel, grid, arguments):
        launched.append(kernel.__name__)
        real(kernel, grid, arguments)

    monkeypatch.setattr(launches, "launch", launch)
    check(linear_of("triton"), case)
    assert "lora_linear_fwd_persistent_kernel" in launched


@pytest.mark.parametrize("name", FORWARD_MUTANTS)
def test_wrong_kernels_are_refused(interpreted, monkeypatch, tmp_path, name):
    module = kernels_of(changed(FORWARD_MUTANTS[name]), tmp_path)
    kernel = "lora_linear_fwd_persistent_kernel"
    monkeypatch.setattr(forward_launches, kernel, getattr(module, kernel))
    assert refused(linear_of("triton"), CASES) is not None


def launched(card: cards.Card, M: int, R: int, dtype: torch.dtype, tile: cards.Tile) -> list:
    """Return the launches of a forward in this regime, over meta tensors."""
    sizes = ((M, 4096), (4096, 4096), (4096,), (4096, R), (R, 4096))
    call = Forward(*(torch.empty(s, dtype=dtype, device="meta") for s in sizes), 0.5, None)
    run = tuning.planned("forward", "persistent", call, tuning.forward_problem(call), tile, card)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launches, "launch", lambda *launch: found.append(launch))
        run(call)
    return found


def first_use_of_h(ttgir: str) -> str:
    """Return what a kernel does first: wait for the launch before it, or read h, or neither.

    h is what it reads in float32, in a call of halves.
    """
    wait, read = "griddepcontrol.wait", r"(?:tt\.load|async_copy_global_to_local) .*ptr<f32>"
    found = re.search(f"{wait}|{read}", ttgir)
    return "neither" if found is None else "waits" if found[0] == wait else "reads"


QUICK = ("sm_90", 8192, 16, BF16)
COMPILED = [
    (family, M, R, dtype)
    for family in ("sm_90", "sm_100")
    for M, R, dtype in ((8192, 16, BF16), (2048, 16, FP16), (2048, 32, FP16), (8192, 64, FP16),
                        (2048, 100, FP16), (8192, 128, FP16))
]  # fmt: skip


@compiled
@pytest.mark.parametrize(
    ("family", "M", "R", "dtype"),
    [pytest.param(*c, marks=() if c == QUICK else pytest.mark.slow) for c in COMPILED],
)
def test_both_launches_fit_an_sm_and_wait_in_time(family, M, R, dtype, tmp_path, monkeypatch):
    """No spills; TMA in and out; h read after the wait; at small ranks room for both on an SM."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    card = next(card for card in cards.KNOWN.values() if card.family == family)
    tiles = cards.persistent_tiles(card, "half", R)
    assert tiles
    for tile in tiles:
        first, second = launched(card, M, R, dtype, tile)
        machines = []
        for kernel, grid, arguments in (first, second):
            result = codegen.compile_launch(family, kernel, grid, arguments)
            machines.append(codegen.read(result, loops=True))
            assert machines[-1].stack == machines[-1].atomics == machines[-1].waiting == 0
        assert (
            "griddepcontrol.launch_dependents" in codegen.compile_launch(family, *first).asm["ptx"]
        )
        assert result.metadata.launch_pdl
        assert first_use_of_h(result.asm["ttgir"]) == "waits"
        assert "cp.async.bulk.tensor.2d.global.shared" in result.asm["ptx"]
        expected = "HGMMA" if family == "sm_90" else "UTC"
        assert machines[1].matrix.startswith(expected) and machines[1].wide >= 2
        shared = sum(machine.shared + cards.KIB for machine in machines)
        assert max(machine.shared for machine in machines) <= card.shared_bytes
        if R <= 16 and M == 8192:
            threads = [32 * launch[2]["num_warps"] for launch in (first, second)]
            registers = [-(-machine.registers // 8) * 8 for machine in machines]
            assert sum(n * each for n, each in zip(threads, registers, strict=True)) <= 65536
            assert shared <= card.shared_bytes + cards.KIB


@compiled
@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "found"),
    [
        (("                gdc_wait()", "                pass"), "reads"),
        (("DEPENDENT and r0 == 0", "DEPENDENT and r0 > 0"), "reads"),
    ],
)
def test_a_kernel_that_reads_h_too_soon_is_noticed(change, found, tmp_path, monkeypatch):
    module = kernels_of(changed(change), tmp_path)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    name = "lora_linear_fwd_persistent_kernel"
    monkeypatch.setattr(forward_launches, name, getattr(module, name))
    card = cards.KNOWN["H100"]
    tile = cards.persistent_tiles(card, "half", 16)[0]
    _, second = launched(card, 8192, 16, BF16, tile)
    assert first_use_of_h(codegen.compile_launch("sm_90", *second).asm["ttgir"]) == found
