"""Compile the library's own launches for a card that is not there, and read the machine code.

A stand-in for Triton's driver names the card; the launchers get meta tensors and every launch
becomes `warmup`, Triton's compilation without a run. So what is inspected is what would be launched:
the same specialisation, constants and options.
"""

import re
import subprocess
from dataclasses import dataclass
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
    matrix: str  # the matrix instruction in its loops, if any
    wide: int  # loads in its loops of 128 bits from global memory, or by the copy engine
    narrow: int  # loads in its loops of fewer bits


def compile_launch(family: str, kernel, grid, args, options):
    """Return Triton's compiled kernel for a launch on a card of `family`."""
    driver.set_active(StandInDriver(family))
    return kernel.warmup(*args, grid=grid, **options)


def specialisation(family: str, kernel, args, options) -> str:
    """Return what Triton would compile a launch for: equal ones share a kernel."""
    driver.set_active(StandInDriver(family))
    device = driver.active.get_current_device()
    binder = kernel.device_caches[device][4]
    options = {"debug": False, **options}
    _, specialised, rest = binder(*args, **options)
    return repr((specialised, rest))


def read(compiled) -> Machine:
    """Read a compiled kernel: ptxas's figures and the disassembly, or AMD's assembly."""
    if compiled.metadata.target.backend == "hip":
        return _read_amd(compiled)
    return _read_nvidia(compiled)


def _read_nvidia(compiled) -> Machine:
    cubin = Path(next(p for name, p in compiled.metadata_group.items() if name.endswith(".cubin")))
    usage = _tool("cuobjdump", "-res-usage", cubin)
    figures = {k: int(v) for k, v in re.findall(r"(REG|STACK):(\d+)", usage)}
    sass = _tool("cuobjdump", "-sass", cubin)
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/ +(.*?);", sass)
    code = {int(at, 16): text for at, text in lines}
    jumps = ((at, re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)) for at, text in code.items())
    loops = [(int(m[1], 16), at) for at, m in jumps if m and int(m[1], 16) < at]
    looped = [text for at, text in code.items() if any(a <= at <= b for a, b in loops)]
    loads = re.findall(r"\b(UTMALDG|LDGSTS|LDG)\b([.\w]*)", "\n".join(looped))
    wide = sum(name == "UTMALDG" or ".128" in kind for name, kind in loads)
    return Machine(
        figures["REG"],
        figures["STACK"],
        len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        compiled.metadata.shared,
        _most(r"\b(HGMMA|UTC\w*MMA|HMMA)\b", looped) or _most(r"\b(FFMA2?)\b", looped),
        wide,
        len(loads) - wide,
    )


def _read_amd(compiled) -> Machine:
    text = compiled.asm["amdgcn"]

    def figure(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    lines, labels, looped = text.splitlines(), {}, set()
    for at, line in enumerate(lines):
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = at
        elif (jump := re.search(r"s_c?branch\w* (\.LBB\w+)", line)) and jump[1] in labels:
            looped |= set(range(labels[jump[1]], at))
    code = [lines[at] for at in sorted(looped)]
    loads = re.findall(r"\b(?:global|buffer)_load_(\w+)", "\n".join(code))
    wide = sum(kind.startswith("dwordx4") for kind in loads)
    return Machine(
        figure("vgpr_count"),
        figure("private_segment_fixed_size"),
        figure("vgpr_spill_count") + figure("sgpr_spill_count"),
        compiled.metadata.shared,
        _most(r"\b(v_mfma)_\w+", code) or _most(r"\b(v_(?:pk_)?fma)\w*", code),
        wide,
        len(loads) - wide,
    )


def _most(pattern: str, code: list[str]) -> str:
    found = re.findall(pattern, "\n".join(code))
    return max(sorted(set(found)), key=found.count, default="")


def _tool(name: str, *args) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run(
        [tool, *map(str, args)], check=True, text=True, capture_output=True
    ).stdout
