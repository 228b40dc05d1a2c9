"""Every (kernel, configuration) the library can launch, compiled for every card and inspected.

No GPU is asked: see codegen.py. One table at the end.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from typing import Any

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
    "lora_linear_fwd_kernel",
    "lora_linear_fwd_in_loop_kernel",
    "lora_linear_h_first_kernel",
    "lora_linear_bwd_dx_kernel",
)
N = K = 4096
# dtype, that of A and B, rank: registers and shared memory grow with the rank, of which a kernel
# takes at most 64 at once, and with wider adapters; float16 has the longer epilogue.
DTYPES = {
    "bf16-R16": (torch.bfloat16, torch.bfloat16, 16),
    "fp16-R64-fp32-adapter": (torch.float16, torch.float32, 64),
    "tf32-R64": (torch.float32, torch.float32, 64),
    "fp32-R64": (torch.float32, torch.float32, 64),
}
Launch = tuple[Any, tuple, tuple, dict]


def problems(family: str, dtypes: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield a label and what runs it, for every regime and tile of a card."""
    card = next(card for card in cards.KNOWN.values() if card.family == family)
    dtype, adapter, R = DTYPES[dtypes]
    torch.backends.cuda.matmul.fp32_precision = "tf32" if "tf32" in dtypes else "ieee"

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

    for M in (16, 64, 512, 2048, 4096, 8192):
        call = forward_of(M)
        p = tuning.problem(call, call.x, call.A, bias=True)
        for name, run in regimes.FORWARD.items():
            for tile in choice.forward_tiles(name, p, card, True):
                yield tile_label(tile), partial(run, call, tile)
        call = backward_of(M)
        for name, run in gradients.BACKWARD.items():
            for tile in choice.backward_tiles(name, p, card, True):
                yield tile_label(tile), partial(run, call, tile)
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


def inspect(family: str, dtypes: str, index: int) -> tuple[str, str, codegen.Machine | str]:
    """Return kernel name, label and machine code's figures, or the compiler's complaint."""
    label, (kernel, grid, args, options) = launches(family, dtypes)[index]
    try:
        return (
            kernel.__name__,
            label,
            codegen.read(codegen.compile_launch(family, kernel, grid, args, options)),
        )
    except Exception as error:  # the table shows what any compiler stage says
        return kernel.__name__, label, f"{type(error).__name__}: {error}"


@pytest.fixture(scope="module")
def machines() -> dict[str, list[tuple[str, str, str, codegen.Machine | str]]]:
    """Per card: (kernel, label, dtypes, figures) of everything it can be given."""
    jobs = [(f, d, i) for f in cards.FAMILIES for d in DTYPES for i in range(len(launches(f, d)))]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        results = list(pool.map(inspect, *zip(*jobs, strict=True), chunksize=4))
    table: dict[str, list] = {family: [] for family in cards.FAMILIES}
    for (family, dtypes, _), (kernel, label, machine) in zip(jobs, results, strict=True):
        table[family].append((kernel, label, dtypes, machine))
    return table


@pytest.mark.parametrize("family", cards.FAMILIES)
def test_every_kernel_fits_its_card(machines, family):
    faults = []
    shared = next(c for c in cards.KNOWN.values() if c.family == family).shared_bytes
    for kernel, label, dtypes, machine in machines[family]:
        where = f"{kernel} {label} {dtypes}"
        if isinstance(machine, str):
            faults.append(f"{where}: {machine}")
            continue
        if machine.stack or machine.spills:
            faults.append(f"{where}: stack {machine.stack}, spills {machine.spills}")
        if machine.shared > shared:
            faults.append(f"{where}: {machine.shared} bytes of shared memory, {shared} there")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("family", cards.FAMILIES)
def test_base_products_run_on_matrix_units_with_wide_loads(machines, family):
    expected = {"sm_90": "HGMMA", "sm_100": "UTC", "gfx942": "v_mfma"}.get(family, "HMMA")
    faults = []
    for kernel, label, dtypes, machine in machines[family]:
        if kernel not in BASE_KERNELS or "fp32-R" in dtypes or isinstance(machine, str):
            continue
        if not machine.matrix.startswith(expected):
            faults.append(f"{kernel} {label} {dtypes}: {machine.matrix or 'none'} in its loop")
        if not machine.wide:
            faults.append(f"{kernel} {label} {dtypes}: no 128-bit load in its loop")
    assert not faults, "\n".join(faults)


def test_table(machines, capsys):
    lines = [f"{'kernel':31} {'tile':22} {'dtypes':22} card    regs  shared  in loops"]
    for family, rows in machines.items():
        for kernel, label, dtypes, m in rows:
            figures = (
                m
                if isinstance(m, str)
                else (
                    f"{m.registers:4} {m.shared / 1024:6.1f}K  {m.matrix} {m.wide} wide {m.narrow} narrow"
                )
            )
            lines.append(f"{kernel:31} {label:22} {dtypes:22} {family:7} {figures}")
    with capsys.disabled():
        print("\n" + "\n".join(lines))
    assert len(lines) > len(cards.FAMILIES)
