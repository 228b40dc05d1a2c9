"""Compile the library's own launches for a card that is not there, and read the machine code.

A stand-in for Triton's driver names the card; the launchers get meta tensors and every launch
becomes `warmup`, Triton's compilation without a run. What is inspected is what would be launched:
the same specialisation, constants and options.
"""

import re
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

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
NVIDIA_LOAD, AMD_LOAD = r"\b(?:UTMALDG|LDGSTS|LDG)\b[.\w]*", r"\b(?:global|buffer)_load_\w+"
NVIDIA_MATRIX, AMD_MATRIX = r"\b(?:HGMMA|UTC\w*MMA|HMMA)\b", r"\bv_mfma(?=_)"
NVIDIA_ASYNC = r"\b(?:UTMALDG|LDGSTS)\b"
ATOMIC = r"\b(?:atom|red)\.[.\w]*|\b(?:global|flat|buffer)_atomic\w*"
# Of a counter, an integer's: their order makes no difference. LLVM reads one by "or 0".
COUNT = r"\.add\.[su]32$|_atomic_(?:add|or)$"
NVIDIA_PLAIN, AMD_PLAIN = r"\bFFMA2?\b", r"\bv_(?:pk_)?fma\w*"


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
    """What the machine code of one kernel says.

    Attributes:
        registers: a thread.
        stack: bytes of a thread's stack, where a spilled register goes.
        shared: bytes of shared memory.
        atomics: atomic reads and writes of memory, other than of a counter.
        counts: those of a counter.
        matrix: the matrix instruction in its loops, or else the multiply-add; "" if not asked for.
        wide: loads in its loops of 128 bits from global memory, or by the copy engine.
        narrow: loads in its loops of fewer bits.
        waiting: loops with a matrix instruction of their own and no asynchronous copy (NVIDIA).

    """

    registers: int
    stack: int
    shared: int
    atomics: int
    counts: int
    matrix: str = ""
    wide: int = 0
    narrow: int = 0
    waiting: int = 0


def compile_launch(family: str, kernel, grid, arguments):
    """Return Triton's compiled kernel for a launch on a card of `family`."""
    with mock.patch.object(driver, "_active", StandInDriver(family)):
        return kernel.warmup(grid=grid, **arguments)


def specialisation(family: str, kernel, arguments) -> str:
    """Return what Triton would compile a launch for: equal ones share a kernel."""
    with mock.patch.object(driver, "_active", StandInDriver(family)):
        binder = kernel.device_caches[driver.active.get_current_device()][4]
    _, specialised, rest = binder(**{"debug": False, **arguments})
    return repr((specialised, rest))


def read(compiled, *, loops: bool) -> Machine:
    """Read a compiled kernel's figures and, with `loops`, the instructions in its loops."""
    amd = compiled.metadata.target.backend == "hip"
    figures, code, waiting = _amd(compiled) if amd else _nvidia(compiled, loops)
    atomics = re.findall(ATOMIC, compiled.asm["amdgcn" if amd else "ptx"])
    counts = sum(bool(re.search(COUNT, atomic)) for atomic in atomics)
    figures = (*figures, compiled.metadata.shared, len(atomics) - counts, counts)
    if not loops:
        return Machine(*figures)
    loads = re.findall(AMD_LOAD if amd else NVIDIA_LOAD, code)
    wide = sum(bool(re.search(r"UTMALDG|\.128|dwordx4", load)) for load in loads)
    matrix, plain = (AMD_MATRIX, AMD_PLAIN) if amd else (NVIDIA_MATRIX, NVIDIA_PLAIN)
    return Machine(
        *figures,
        _most(matrix, code) or _most(plain, code),
        wide,
        len(loads) - wide,
        waiting,
    )


def _nvidia(compiled, read_loops: bool) -> tuple[tuple[int, int], str, int]:
    """Return (registers, stack), the machine code of all loops, and how many of them wait."""
    usage = _tool("cuobjdump", "-res-usage", _cubin(compiled))
    figures = {k: int(v) for k, v in re.findall(r"(REG|STACK):(\d+)", usage)}
    code, at_address, bodies, ends = [], {}, [], []
    for address, text in machine_code([compiled])[0] if read_loops else ():
        at_address[address] = len(code)
        code.append(text)
        jump = re.search(r"\bBRA\b.* 0x([0-9a-f]+)", text)
        if jump and (target := int(jump[1], 16)) in at_address:  # one ahead is not there yet
            bodies.append(range(at_address[target], len(code)))
            # A jump back without a condition leaves what waits out of line, and ends no loop.
            ends.append("@" in text or "UP" in text)
    looped = sorted({at for body in bodies for at in body})
    loops = [body for body, end in zip(bodies, ends, strict=True) if end]
    waiting = sum(_waits(code, loop, loops) for loop in loops)
    return (figures["REG"], figures["STACK"]), "\n".join(code[at] for at in looped), waiting


def _cubin(compiled) -> Path:
    return Path(next(p for name, p in compiled.metadata_group.items() if name.endswith(".cubin")))


_disassembled: dict[Path, list[tuple[int, str]]] = {}


def machine_code(kernels: list) -> list[list[tuple[int, str]]]:
    """Return (address, instruction) for all of each of some NVIDIA card's kernels.

    nvdisasm takes 0.2 s to start and 0.02 s for a kernel: the code of all is read at once, as if it
    was one, and kept.
    """
    cubins = [_cubin(kernel) for kernel in kernels]
    new = [cubin for cubin in dict.fromkeys(cubins) if cubin not in _disassembled]
    if new:
        codes = [_text_of(cubin.read_bytes()) for cubin in new]
        arch = kernels[0].metadata.target.arch
        with tempfile.NamedTemporaryFile() as file:
            file.write(b"".join(codes))
            file.flush()
            sass = _tool("nvdisasm", "-ndf", "-b", f"SM{arch}{'a' * (arch >= 90)}", file.name)
        lines = [(int(a, 16), t) for a, t in re.findall(r"/\*([0-9a-f]{4,})\*/ +(.*?);", sass)]
        assert len(lines) * 16 == sum(map(len, codes)), "an instruction of these cards has 16 bytes"
        start = 0
        for cubin, code in zip(new, codes, strict=True):
            _disassembled[cubin] = lines[start : start + len(code) // 16]
            start += len(code) // 16
    return [_disassembled[cubin] for cubin in cubins]


def _text_of(elf: bytes) -> bytes:
    """Return the sections of instructions in a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names_at = struct.unpack_from("<HHH", elf, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", elf, table + size * i) for i in range(count)]
    names = sections[names_at][4]
    return b"".join(
        elf[at : at + length]
        for name, _, _, _, at, length in sections
        if elf.startswith(b".text.", names + name)
    )


def _waits(code: list[str], loop: range, loops: list[range]) -> bool:
    """Whether a loop multiplies outside of the loops in it, and nothing in it loads ahead."""
    inner = {at for other in loops if other != loop and other[0] in loop for at in other}
    multiplies = any(re.search(NVIDIA_MATRIX, code[at]) for at in loop if at not in inner)
    return multiplies and not any(re.search(NVIDIA_ASYNC, code[at]) for at in loop)


def _amd(compiled) -> tuple[tuple[int, int], str, int]:
    """Return (registers, stack), the assembly of all loops, and 0."""
    text = compiled.asm["amdgcn"]

    def figure(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    lines, labels, looped = text.splitlines(), {}, set()
    for at, line in enumerate(lines):
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = at
        elif (jump := re.search(r"s_c?branch\w* (\.LBB\w+)", line)) and jump[1] in labels:
            looped |= set(range(labels[jump[1]], at))
    code = "\n".join(lines[at] for at in sorted(looped))
    return (figure("vgpr_count"), figure("private_segment_fixed_size")), code, 0


def _most(pattern: str, code: str) -> str:
    found = re.findall(pattern, code)
    return max(sorted(set(found)), key=found.count, default="")


def _tool(name: str, *args) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run(
        [tool, *map(str, args)], check=True, text=True, capture_output=True
    ).stdout
