"""Triton's kernels of dropout's mask: the bits of dropout.py, one launch, what they compile to.

The bits in Triton's interpreter or on a GPU, the rest without either.
"""

import mmap
import re

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from lora_ext.backends.triton import cards, launches, mask
from lora_ext.dropout import draw_bits, pack_bits
from tests.conftest import Backend
from tests.gpu import codegen
from tests.gpu.launched import INTERPRETED, launches_of

# Less than a byte, whole words, a row more than a program's and a column more than its.
SIZES = [(1, 1), (5, 7), (37, 96), (3, 100), (33, 1025), (9, 1056), (0, 5), (4, 0)]
SEEDS = [(1, 2), (2**31 - 1, 2**31 - 2), (2**40 + 3, -7)]
compiled = pytest.mark.skipif(INTERPRETED, reason="needs the compiler, not the interpreter")


@pytest.fixture
def kernels(backend: Backend):
    """Run with new tensors where the kernels can run: they have no regimes, so once."""
    if str(backend) != "triton-in_loop":
        pytest.skip("the mask's kernels run once, next to Triton's first regime")


def same(drawn: torch.Tensor, want: torch.Tensor) -> bool:
    return drawn.shape == want.shape and torch.equal(drawn.cpu(), want.cpu())


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_hash_draws_the_bits_of_torchs_operations(kernels, size):
    for numbers, p, first in zip(SEEDS, (0.05, 1 / 3, 1.0), (0, 17, 2**33 + 5), strict=True):
        seed = torch.tensor(numbers)
        want = draw_bits(seed, *size, p, first)
        assert same(mask.draw_keep(seed, *size, p, first), want), (numbers, p, first)
    every = mask.draw_keep(seed, *size, 0.0)
    assert same(every, pack_bits(torch.ones(size)))


def test_a_seed_may_have_any_stride(kernels):
    seed = torch.tensor([5, 1, 9, 1])[::2]
    assert same(mask.draw_keep(seed, 4, 40, 0.5), draw_bits(torch.tensor([5, 9]), 4, 40, 0.5))


def layouts(keep: torch.Tensor) -> list[torch.Tensor]:
    """Return a mask as PyTorch may draw it: dtypes, strides, an offset of one byte."""
    wide = torch.stack((keep, ~keep), 2).flatten(1)
    shifted = torch.cat((~keep, keep), 1)[:, keep.shape[1] :]
    dtypes = [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]
    return [keep, keep.T.contiguous().T, wide[:, ::2], shifted, *(keep.to(d) for d in dtypes)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_draw_is_packed_into_the_bits_of_torchs_operations(kernels, size):
    keep = torch.rand(size) < 0.7
    want = pack_bits(keep)
    for given in [*layouts(keep), keep.to(torch.uint8) * 254]:
        assert same(mask.pack_keep(given), want), (given.dtype, given.stride())
    one = torch.rand(1, size[1]) < 0.5
    assert same(mask.pack_keep(one.expand(size)), pack_bits(one.expand(size)))


@pytest.mark.skipif(not INTERPRETED, reason="one program alone runs in the interpreter only")
@pytest.mark.parametrize("cols", [2**13 + 5, 2**13], ids=["bytes", "words"])
def test_rows_past_2_to_the_31_elements_are_drawn_and_packed(kernels, monkeypatch, cols):
    """The last program alone; memory that it does not touch is never there."""
    from triton.runtime import interpreter

    rows, seed, p = 2**18 + 3, torch.tensor([5, 6]), 0.3
    assert rows * cols > 2**31
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    across = -(-cols // 1024)

    def last_program(kernel, grid, arguments):
        number = np.array([grid[0] - across], np.int32)
        program = interpreter.TensorHandle(number, mask.tl.int32)
        with monkeypatch.context() as patch:
            patch.setattr(
                interpreter.InterpreterBuilder, "create_get_program_id", lambda *_: program
            )
            kernel[(1,)](**arguments)

    monkeypatch.setattr(launches, "launch", last_program)
    drawn = mask.draw_keep(seed, rows, cols, p)
    first = rows // 32 * 32
    for row in range(first, rows):
        for column in (0, 5, 1023):
            kept = draw_row(seed, row, column, p)
            assert bool(drawn[row, column // 8] >> column % 8 & 1) == kept
    pages = torch.frombuffer(mmap.mmap(-1, rows * cols), dtype=torch.bool)
    keep = pages.view(rows, cols)
    keep[-3:] = torch.rand(3, cols) < 0.5
    packed = mask.pack_keep(keep)
    assert torch.equal(packed[-3:, :128], pack_bits(keep[-3:, :1024]))


def draw_row(seed: torch.Tensor, row: int, column: int, p: float) -> bool:
    from tests.op.test_dropout_mask import hash_of

    return hash_of(tuple(seed.tolist()), row, column) >= round(p * 2**32)


def empty(*shape: int, dtype: torch.dtype = torch.bool) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@compiled
def test_a_mask_is_one_launch_and_none_where_it_is_empty():
    seed = empty(2, dtype=torch.int64)
    assert len(launches_of(lambda: mask.draw_keep(seed, 300, 777, 0.1))) == 1
    assert len(launches_of(lambda: mask.pack_keep(empty(300, 777)))) == 1
    assert not launches_of(lambda: mask.draw_keep(seed, 0, 777, 0.1))
    assert not launches_of(lambda: mask.pack_keep(empty(300, 0)))


@compiled
def test_a_new_size_or_probability_does_not_recompile():
    seed = empty(2, dtype=torch.int64)

    def of(run) -> str:
        ((kernel, _, arguments),) = launches_of(run)
        return codegen.specialisation("sm_90", kernel, arguments)

    first = of(lambda: mask.draw_keep(seed, 8192, 4096, 0.1))
    for rows, cols, p, start in ((1, 4096, 0.5, 7), (16, 32, 0.0, 0), (77, 1024, 1.0, 1)):
        assert of(lambda given=(rows, cols, p, start): mask.draw_keep(seed, *given)) == first
    packed = of(lambda: mask.pack_keep(empty(8192, 4096)))
    assert of(lambda: mask.pack_keep(empty(7, 64))) == packed


SEED = empty(2, dtype=torch.int64)
# What runs a kernel, and whether its loads are of 128 bits alone: those of dense rows can be.
RUNS = {
    "draw": (lambda: mask.draw_keep(SEED, 8192, 4096, 0.1), False),
    "draw_bytes": (lambda: mask.draw_keep(SEED, 8192, 4097, 0.1), False),
    "pack": (lambda: mask.pack_keep(empty(8192, 4096)), True),
    "pack_half": (lambda: mask.pack_keep(empty(8192, 4096, dtype=torch.bfloat16)), True),
    "pack_float": (lambda: mask.pack_keep(empty(8192, 4096, dtype=torch.float32)), True),
    "pack_bytes": (lambda: mask.pack_keep(empty(8192, 4097)), False),
    "pack_transposed": (lambda: mask.pack_keep(empty(4096, 8192).T), False),
}
QUICK = ("sm_90", "pack")  # `make test` compiles it alone: each takes about a second


@compiled
@pytest.mark.parametrize(
    ("family", "name"),
    [
        pytest.param(family, name, marks=() if (family, name) == QUICK else pytest.mark.slow)
        for family in cards.FAMILIES
        for name in RUNS
    ],
)
def test_the_masks_kernels_fit_every_card(family, name, tmp_path, monkeypatch):
    """No spills, no atomics, and of dense rows loads of 128 bits alone."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    run, wide = RUNS[name]
    ((kernel, grid, arguments),) = launches_of(run)
    result = codegen.compile_launch(family, kernel, grid, arguments)
    machine = codegen.read(result, loops=False)
    assert machine.stack == machine.atomics == 0
    assert machine.shared <= 16 * cards.KIB and machine.registers <= 168
    if wide:
        text = result.asm["amdgcn" if family == "gfx942" else "ptx"]
        loads = re.findall(r"(?:ld\.global|(?:global|buffer)_load)[.\w]*", text)
        assert loads and all(re.search(r"v4\.b32|dwordx4", load) for load in loads), loads
