"""Dropout's mask as bits in C++ (csrc/cpu/keep.cpp): the bits of dropout.py, by every kernel."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_ext import dropout
from lora_ext.backends import BACKENDS
from lora_ext.dropout import _draws_as_torch, keep_mask, pack_bits
from tests.conftest import small_call

ROOT = Path(__file__).parents[2]
WITHOUT_CPP = BACKENDS["cpp"].unsupported(small_call())
pytestmark = pytest.mark.skipif(WITHOUT_CPP is not None, reason=str(WITHOUT_CPP))
# Less than a byte, less than a block of 64 and more, no rows, no columns.
SIZES = [(1, 1), (5, 7), (37, 96), (3, 100), (64, 64), (70, 65), (400, 129), (0, 5), (4, 0)]
SEEDS = [(0, 0), (1, 2), (2**31 - 1, 2**31 - 2), (123456789, 987654321)]


def check_every_size() -> None:
    """Hold both operators to dropout.py; test_every_instruction_set runs it in processes."""
    from lora_ext.ops import torch  # the schemas

    ops = torch.ops.lora_ext
    for rows, cols in SIZES:
        for numbers in SEEDS:
            for p in (0.0, 0.05, 0.5, 1 / 3, 0.999, 1.0):
                seed = torch.tensor(numbers)
                mask = keep_mask(seed, (rows, cols), p)
                drawn = ops.draw_keep(seed, rows, cols, p)
                assert torch.equal(drawn, pack_bits(mask)), (rows, cols, numbers, p)
        for given in layouts(mask := torch.rand(rows, cols) < 0.7):
            assert torch.equal(ops.pack_keep(given), pack_bits(mask)), (rows, cols, given.stride())
        check_generator(rows, cols)


def check_generator(rows: int, cols: int) -> None:
    """Hold `draw_bernoulli` to `bernoulli_`, its bits and the state that it leaves."""
    for words_before in (0, 1, 2, 623, 624, 625):
        for p in (0.0, 0.05, 0.5, 1 / 3, 0.95, 1 - 2**-40, 1.0):
            ours, theirs = torch.Generator(), torch.Generator()
            for generator in (ours, theirs):
                generator.manual_seed(words_before)
                torch.empty(words_before).uniform_(generator=generator)
            mask = torch.empty(rows, cols, dtype=torch.bool).bernoulli_(p, generator=theirs)
            state = ours.get_state()
            drawn = torch.ops.lora_ext.draw_bernoulli(state, rows, cols, p)
            assert torch.equal(drawn, pack_bits(mask)), (rows, cols, words_before, p)
            assert torch.equal(state, theirs.get_state()), (rows, cols, words_before, p)


def layouts(mask: torch.Tensor) -> list[torch.Tensor]:
    wide = torch.stack((mask, ~mask), 2).flatten(1)
    values = mask.to(torch.uint8)
    return [mask, mask.T.contiguous().T, wide[:, ::2], torch.cat((mask, mask))[: len(mask)],
            values, values * 128, values * 254]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same_bits(isa):
    script = "from tests.op.test_cpp_keep import check_every_size as check\ncheck()"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        cwd=ROOT,
        env=os.environ | {"LORA_EXT_CPU_ISA": isa, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr


def test_known_pytorchs_draw_as_the_kernel_does():
    """Else a wrong kernel would be taken for another PyTorch, and skip what follows."""
    if tuple(map(int, torch.__version__.split(".")[:2])) > (2, 14):
        pytest.skip("a PyTorch that none of this has been run with")
    assert _draws_as_torch()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_generators_draw_is_bernoullis(size):
    """Where this PyTorch draws in another way, `dropout_mask="torch"` asks `bernoulli_` itself."""
    if not _draws_as_torch():
        pytest.skip("this PyTorch's bernoulli_ draws in another way than the kernel")
    check_generator(*size)


@pytest.mark.parametrize("way", ["kernel", "bernoulli_"])
@pytest.mark.parametrize("lead", [(37,), (2, 3), ()], ids=str)
def test_torch_mask_is_that_of_dropout_in_either_way(monkeypatch, way, lead):
    if way == "bernoulli_":
        monkeypatch.setattr(dropout, "_draws_as_torch", lambda: False)
    x = torch.ones(*lead, 91)
    torch.manual_seed(3)
    want = torch.nn.functional.dropout(x, 0.3) != 0
    state = torch.get_rng_state()
    torch.manual_seed(3)
    assert torch.equal(dropout.draw_keep(x, 0.3, "torch"), pack_bits(want.view(-1, 91)))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("left", "seeded"), [(0, 1), (-1, 1), (625, 1), (5, 0)])
def test_state_that_is_not_the_twisters_is_refused(left, seeded):
    """Its words left would be read, and written, past the end of the state."""
    state = torch.Generator().manual_seed(1).get_state()
    state[8:16].view(torch.int32).copy_(torch.tensor([left, seeded]))
    before = state.clone()
    with pytest.raises(RuntimeError, match=f"must be one of MT19937, got {left} words left"):
        torch.ops.lora_ext.draw_bernoulli(state, 2, 3, 0.5)
    assert torch.equal(state, before)


@pytest.mark.parametrize("size", [(0, 5), (4, 0), (3, 9)], ids=str)
def test_all_or_none_are_dropped_of_any_size(size):
    seed = torch.tensor([1, 2])
    for p in (0.0, 1.0):
        bits = torch.ops.lora_ext.draw_keep(seed, *size, p)
        assert torch.equal(bits, pack_bits(torch.full(size, p == 0)))


def test_one_row_of_all_is_expanded():
    mask = (torch.rand(1, 50) < 0.5).expand(9, 50)
    assert torch.equal(torch.ops.lora_ext.pack_keep(mask), pack_bits(mask))


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_bits_do_not_depend_on_the_threads(threads):
    seed, before = torch.tensor([3, 4]), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        drawn = torch.ops.lora_ext.draw_keep(seed, 333, 777, 0.1)
        assert torch.equal(drawn, pack_bits(keep_mask(seed, (333, 777), 0.1)))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("run", "message"),
    {
        "seed": (
            lambda ops: ops.draw_keep(torch.ones(3).long(), 2, 2, 0.5),
            r"seed must have shape",
        ),
        "dtype": (
            lambda ops: ops.draw_keep(torch.ones(2), 2, 2, 0.5),
            "and dtype Long, got .* Float",
        ),
        "rows": (
            lambda ops: ops.draw_keep(torch.ones(2).long(), -1, 2, 0.5),
            "not be negative, got",
        ),
        "p": (lambda ops: ops.draw_keep(torch.ones(2).long(), 1, 2, 1.5), "p must be from 0 to 1"),
        "nan": (
            lambda ops: ops.draw_keep(torch.ones(2).long(), 1, 2, float("nan")),
            "p must be fr",
        ),
        "state": (
            lambda ops: ops.draw_bernoulli(torch.zeros(9, dtype=torch.uint8), 1, 2, 0.5),
            "state must be a CPU generator's, 5016 bytes or more, got .9,.",
        ),
        "twister": (
            lambda ops: ops.draw_bernoulli(torch.zeros(5056, dtype=torch.uint8), 1, 2, 0.5),
            "state must be one of MT19937, got 0 words left",
        ),
        "state_p": (
            lambda ops: ops.draw_bernoulli(torch.get_rng_state(), 1, 2, -0.1),
            "p must be from 0 to 1, got -0.1",
        ),
        "state_rows": (
            lambda ops: ops.draw_bernoulli(torch.get_rng_state(), -1, 2, 0.5),
            "not be negative, got -1 and 2",
        ),
        "state_cols": (
            lambda ops: ops.draw_bernoulli(torch.get_rng_state(), 2, -1, 0.5),
            "not be negative, got 2 and -1",
        ),
        "mask": (lambda ops: ops.pack_keep(torch.ones(2).bool()), r"mask must have shape \(M, in"),
        "float": (lambda ops: ops.pack_keep(torch.ones(2, 2)), "mask must have dtype Bool or Byte"),
    }.values(),
)
def test_what_does_not_fit_is_named(run, message):
    with pytest.raises(RuntimeError, match=message):
        run(torch.ops.lora_ext)
