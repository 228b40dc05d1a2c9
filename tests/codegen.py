"""Compile the library's own launches for a card that is not there, and read the machine code.

A stand-in for Triton's driver names the card; the launchers get meta tensors and every launch
becomes `warmup`, Triton's compilation without a run. So what is inspected is what would be launched:
the same specialisation, constants and options.
"""

import re
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class StandInDriver:
    """What Triton asks of a driver to compile: the target, and one device number for each."""

    def __init__(self, family: str):
        self.family = family

    def get_current_target(self):
        return TARGETS[self.family]

    def get_current_device(self):
        return list(TARGETS).index(self.family)

    def get_current_stream(self, device):
        return 0


@dataclass(frozen=True)
class Machine:
    """What the machine code of one kernel says."""

    registers: int
    stack: int
    spills: int
    shared: int
    instructions: tuple[str, ...]  # the matrix instructions in it, most frequent first
    wide_loads: int  # of 128 bits from global memory, or by the copy engine
    narrow_loads: int  # of fewer, from global memory


def compile_launch(family: str, kernel, grid, args, options):
    """Return Triton's compiled kernel for a launch on a card of `family`."""
    driver.set_active(StandInDriver(family))
    return kernel.warmup(*args, grid=grid, **options)


def read(compiled) -> Machine:
    """Read a compiled kernel: ptxas's figures and the disassembly, or AMD's assembly."""
    if compiled.metadata.target.backend == "hip":
        return _read_amd(compiled)
    return _read_nvidia(compiled)


MATRIX = re.compile(r"\b(HGMMA|QGMMA|UTC\w*MMA|HMMA|IMMA|OMMA|QMMA|FFMA2?|v_mfma_\w+)\b[.\w]*")
NVIDIA_LOAD = re.compile(r"\b(UTMALDG|LDGSTS|LDG)([.\w]*)")


def _read_nvidia(compiled) -> Machine:
    cubin = Path(next(p for name, p in compiled.metadata_group.items() if name.endswith(".cubin")))
    usage = _tool("cuobjdump", "-res-usage", cubin)
    figures = {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    sass = _tool("cuobjdump", "-sass", cubin)
    loads = NVIDIA_LOAD.findall(sass)
    wide = sum(name == "UTMALDG" or ".128" in kind for name, kind in loads)
    return Machine(
        figures["REG"],
        figures["STACK"],
        len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        compiled.metadata.shared,
        _matrix_instructions(sass),
        wide,
        len(loads) - wide,
    )


def _read_amd(compiled) -> Machine:
    text = compiled.asm["amdgcn"]

    def figure(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    loads = re.findall(r"\b(?:global|buffer)_load_(\w+)", text)
    wide = sum(kind.startswith("dwordx4") for kind in loads)
    return Machine(
        figure("vgpr_count"),
        figure("private_segment_fixed_size"),
        figure("vgpr_spill_count") + figure("sgpr_spill_count"),
        compiled.metadata.shared,
        _matrix_instructions(text),
        wide,
        len(loads) - wide,
    )


def _matrix_instructions(text: str) -> tuple[str, ...]:
    found = MATRIX.findall(text)
    return tuple(sorted(set(found), key=lambda name: -found.count(name)))


def _tool(name: str, *args) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([tool, *map(str, args)], check=True, text=True, capture_output=True).stdout
