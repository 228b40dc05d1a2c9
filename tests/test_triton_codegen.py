"""Every (kernel, configuration) the library can launch, compiled for every card and inspected.

No GPU is asked: see codegen.py. One table at the end.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs the compiler, not the interpreter", allow_module_level=True)

from lora_ext.backends.triton_kernels import (
    cards,
    choice,
    gradients,
    launch,
    regimes,
    tuning,
)

from . import codegen

BASE_KERNELS = (
    "lora_linear_decode_kernel",
    "lora_linear_fwd_kernel",
    "lora_linear_fwd_in_loop_kernel",
    "lora_linear_h_first_kernel",
    "lora_linear_bwd_dx_kernel",
)
N = K = 4096


class Types(NamedTuple):
    """What a set of launches has in common, and over which numbers of rows it is drawn."""

    dtype: torch.dtype
    adapter: torch.dtype
    R: int
    kind: str = "half"
    loops: bool = True  # whether to read them: 0.3 s a kernel
    rows: tuple[int, ...] = (16, 64, 512, 2048, 4096, 8192)


# Registers and shared memory grow with the rank, of which a kernel takes at most 64 at once, and
# float16 has the longer epilogue: the second is the hardest of the halves. The first is drawn where
# it alone takes other kernels (dB in parts), and float32 A and B where most is in flight; both have
# the second's loops over x and weight.
DTYPES = {
    "bf16-R16": Types(torch.bfloat16, torch.bfloat16, 16, loops=False, rows=(8192,)),
    "fp16-R64": Types(torch.float16, torch.float16, 64),
    "fp16-R64-fp32-AB": Types(torch.float16, torch.float32, 64, loops=False, rows=(64, 8192)),
    "tf32-R64": Types(torch.float32, torch.float32, 64, "tf32", rows=(16, 8192)),
    "fp32-R64": Types(torch.float32, torch.float32, 64, "fp32", rows=(16, 8192)),
}
Launch = tuple[Any, tuple, tuple, dict]


class Inspected(NamedTuple):
    """One kernel of one card: what was compiled, and what came of it."""

    kernel: str
    tile: str
    types: str
    rows: int  # of a tile
    wide: int  # 128-bit loads that one step of a base product takes; 0 where none is read
    machine: codegen.Machine | str  # or the compiler's complaint

    def __str__(self) -> str:
        return f"{self.kernel:31} {self.tile:22} {self.types:17}"


def problems(family: str, dtypes: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield a label and what runs it, for every regime and tile of a card."""
    card = next(card for card in cards.KNOWN.values() if card.family == family)
    dtype, adapter, R, kind, _, rows = DTYPES[dtypes]
    torch.backends.cuda.matmul.fp32_precision = "tf32" if kind == "tf32" else "ieee"

    def forward_of(M: int) -> regimes.Forward:
        tensors = [(M, K), (N, K), (N,), (K, R), (R, N)]
        x, w, bias = (torch.empty(s, dtype=dtype, device="meta") for s in tensors[:3])
        A, B = (torch.empty(s, dtype=adapter, device="meta") for s in tensors[3:])
        return regimes.Forward(x, w, bias, A, B, 0.5, card)

    def backward_of(M: int, *, need_dx: bool = True) -> gradients.Backward:
        f = forward_of(M)
        dy, h = f.x.new_empty(M, N), f.x.new_empty(M, R)
        needs = (need_dx, False, False, True, True)
        return gradients.Backward(dy, f.x, f.weight, f.A, f.B, h, 0.5, needs, card)

    for M in rows:
        call = forward_of(M)
        p = tuning.problem(call, call.x, call.A, bias=True)
        for name in choice.FORWARD:
            for tile in choice.forward_tiles(name, p, card, True):
                yield tile_label(tile), partial(regimes.FORWARD[name], call, tile)
        call = backward_of(M)
        for name in choice.BACKWARD:
            for tile in choice.backward_tiles(name, p, card, True):
                yield tile_label(tile), partial(gradients.BACKWARD[name], call, tile)
        call = backward_of(M, need_dx=False)
        tile = tuning.choose_backward(call, None, None)[1]
        yield tile_label(tile), partial(gradients.two_launches, call, tile)


def tile_label(tile) -> str:
    loads = " tma" if tile.descriptors else ""
    return f"{tile.block_m}x{tile.block_n}x{tile.block_k} {tile.warps}w {tile.stages}s{loads}"


@cache
def launches(family: str, dtypes: str) -> list[tuple[str, Launch]]:
    """Return a label and the launch for each different kernel that the problems end in."""
    found: dict[str, tuple[str, Launch]] = {}
    with pytest.MonkeyPatch.context() as patch:
        for label, run in problems(family, dtypes):

            def record(kernel, grid, *args, label=label, **options):
                pairs = zip(args, kernel.params, strict=False)
                kinds = [type(a) if p.do_not_specialize else specialised(a) for a, p in pairs]
                key = repr((kernel.__name__, kinds, sorted(options.items())))
                found.setdefault(key, (label, (kernel, grid, args, options)))

            for module in (launch, regimes, gradients):
                patch.setattr(module, "launch", record)
            run()
    return list(found.values())


def specialised(argument: object) -> object:
    """Return what of an argument makes Triton compile anew."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype
    if hasattr(argument, "block_shape"):
        return argument.base.dtype, tuple(argument.block_shape)
    return (argument == 1, argument % 16 == 0) if isinstance(argument, int) else type(argument)


def inspect(family: str, types: str, index: int) -> Inspected:
    """Compile one launch and read it."""
    tile, (kernel, grid, args, options) = launches(family, types)[index]
    rows = options["BLOCK_M"]
    wide = 0
    if DTYPES[types].loops:
        wide = wide_loads(kernel.__name__, options, family, DTYPES[types].dtype.itemsize)
    machine: codegen.Machine | str
    try:
        compiled = codegen.compile_launch(family, kernel, grid, args, options)
        machine = codegen.read(compiled, loops=wide > 0)
    except Exception as error:  # the table shows what any compiler stage says
        machine = f"{type(error).__name__}: {error}"
    return Inspected(kernel.__name__, tile, types, rows, wide, machine)


def wide_loads(kernel: str, options: dict, family: str, size: int) -> int:
    """Return how many 128-bit loads a thread needs for one step's tiles of x and weight.

    Two where the copy engine loads a tile at once; none where no base product is ours.
    """
    if kernel not in BASE_KERNELS or options.get("BASE_DONE") or not options.get("WANT_DX", True):
        return 0
    if options.get("DESCRIPTORS"):
        return 2
    m, n, k = (options[f"BLOCK_{name}"] for name in "MNK")
    if "WANT_DX" in options:
        n, k = k, n
    threads = options["num_warps"] * (64 if family == "gfx942" else 32)
    return max(1, m * k * size // (threads * 16)) + max(1, n * k * size // (threads * 16))


@pytest.fixture(scope="module")
def inspected() -> dict[str, list[Inspected]]:
    """Everything that each card can be given."""
    jobs = [(f, t, i) for f in cards.FAMILIES for t in DTYPES for i in range(len(launches(f, t)))]
    # Compiled anew whatever the machine has compiled before, and only read here.
    with (
        tempfile.TemporaryDirectory() as cache,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("TRITON_CACHE_DIR", cache)
        with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
            results = list(pool.map(inspect, *zip(*jobs, strict=True), chunksize=4))
    table: dict[str, list[Inspected]] = {family: [] for family in cards.FAMILIES}
    for (family, *_), result in zip(jobs, results, strict=True):
        table[family].append(result)
    return table


@pytest.mark.parametrize("family", cards.FAMILIES)
def test_every_kernel_fits_its_card(inspected, family):
    faults = []
    shared = next(c for c in cards.KNOWN.values() if c.family == family).shared_bytes
    for row in inspected[family]:
        if isinstance(row.machine, str):
            faults.append(f"{row} {row.machine}")
            continue
        if row.machine.stack:
            faults.append(f"{row} stack of {row.machine.stack} bytes, so registers spill")
        if row.machine.shared > shared:
            faults.append(f"{row} {row.machine.shared} bytes of shared memory, {shared} there")
    assert inspected[family] and not faults, "\n".join(faults)


@pytest.mark.parametrize("family", cards.FAMILIES)
def test_base_products_run_on_matrix_units_with_wide_loads(inspected, family):
    expected = {"sm_90": "HGMMA", "sm_100": "UTC", "gfx942": "v_mfma"}.get(family, "HMMA")
    rows = [
        row for row in inspected[family] if row.wide and isinstance(row.machine, codegen.Machine)
    ]
    amd, faults = family == "gfx942", []
    for row in rows:
        # wgmma and tcgen05 take 64 rows at least.
        if not row.machine.matrix.startswith(expected if row.rows >= 64 or amd else "HMMA"):
            faults.append(f"{row} {row.machine.matrix or 'no matrix instruction'} in its loop")
        if row.machine.wide < row.wide:
            faults.append(f"{row} {row.machine.wide} 128-bit loads in its loop, not {row.wide}")
    assert rows and not faults, "\n".join(faults)


@pytest.mark.parametrize("family", cards.FAMILIES)
def test_no_result_is_summed_by_atomics(inspected, family):
    """Their order changes from run to run. h_first raises flags by one, may read them so."""
    counts = {row.kernel: set() for row in inspected[family]}
    for row in inspected[family]:
        if isinstance(row.machine, codegen.Machine):
            counts[row.kernel].add(row.machine.atomics)
    assert counts.pop("lora_linear_h_first_kernel") in ({1}, {2})
    assert all(found == {0} for found in counts.values()), counts


def test_table(inspected, capsys):
    lines = [f"{'kernel':31} {'tile':22} {'types':17} card    regs  shared  in loops"]
    for family, rows in inspected.items():
        for row in rows:
            figures = m = row.machine
            if not isinstance(m, str):
                figures = f"{m.registers:4} {m.shared / 1024:6.1f}K"
                figures += f"  {m.matrix}, {m.wide} wide loads, {m.narrow} others" * (row.wide > 0)
            lines.append(f"{row} {family:7} {figures}")
    with capsys.disabled():
        print("\n" + "\n".join(lines))
    assert len(lines) == 1 + sum(map(len, inspected.values()))
