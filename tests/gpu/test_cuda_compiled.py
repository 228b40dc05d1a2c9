"""The machine code in lora_ext._cuda, for every architecture that it was built for.

Read with cuobjdump, without a GPU: registers, spills, and the instructions that the tiles need. A
tile's dynamic shared memory is not in the code: the emulator refuses a launch of more than 99 KiB,
what sm_86, sm_89 and sm_120 have.
"""

import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from lora_ext.backends import cpp
from tests.conftest import small_call

SPEC = find_spec("lora_ext._cuda")
TRITON = find_spec("triton")
TOOL = shutil.which("cuobjdump")
if TOOL is None and TRITON is not None:
    TOOL = shutil.which(Path(TRITON.origin).parent / "backends/nvidia/bin/cuobjdump")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        SPEC is None, reason="lora_ext._cuda is not built: no nvcc or no CUDA torch"
    ),
    pytest.mark.skipif(TOOL is None, reason="needs cuobjdump, of the toolkit or of triton"),
]
KERNELS = {"fwd", "bwd_dx", "product", "sum_parts", "mask"}


@dataclass(frozen=True)
class Machine:
    """One kernel for one architecture: its mangled name, and what a thread of it takes."""

    architecture: str
    name: str
    registers: int
    stack: int

    @property
    def kernel(self) -> str:
        return re.search(r"lora_linear_(\w+?)_kernel", self.name)[1]


def cuobjdump(*arguments: str) -> str:
    command = [TOOL, *arguments, SPEC.origin]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def machines() -> list[Machine]:
    found, architecture, name = [], "", ""
    for line in cuobjdump("-res-usage").splitlines():
        if m := re.search(r"arch = (sm_\d+)", line):
            architecture = m[1]
        elif m := re.search(r"Function (\S+):", line):
            name = m[1]
        elif m := re.search(r"REG:(\d+) STACK:(\d+)", line):
            found.append(Machine(architecture, name, int(m[1]), int(m[2])))
    return found


def test_every_architecture_asked_for_has_every_kernel(machines):
    from lora_ext import _C

    asked = re.findall(r"\b(\d+)\.(\d)\b", _C.build_info()["cuda"].partition(" for ")[2])
    assert asked
    each = [
        {(m.kernel, m.name) for m in machines if m.architecture == f"sm_{a}{b}"} for a, b in asked
    ]
    assert all({kernel for kernel, _ in kernels} == KERNELS for kernels in each)
    assert len({frozenset(name for _, name in kernels) for kernels in each}) == 1


def test_no_kernel_spills(machines):
    assert not [m for m in machines if m.stack]


def test_three_blocks_of_narrow_tiles_fit_a_multiprocessor(machines):
    """Of 128 threads each; all architectures have 65536 registers there."""
    narrow = [m for m in machines if "Li64ELi32ELi32ELi16E" in m.name]
    assert {m.kernel for m in narrow} == {"fwd", "bwd_dx", "product"}
    assert not [m for m in narrow if 3 * 128 * m.registers > 65536]


def test_tiles_use_matrix_instructions_asynchronous_copies_and_16_byte_results():
    """On the oldest architecture; the PTX is the same for all."""
    functions = re.split(r"\n\s+Function : ", cuobjdump("-arch", "sm_80", "-sass"))[1:]
    tiles = [code for code in functions if "MatrixTile" in code.split("\n", 1)[0]]
    assert tiles
    for code in tiles:
        dtype = (
            "HMMA.16816.F32.BF16 " if "nv_bfloat16" in code.split("\n", 1)[0] else "HMMA.16816.F32 "
        )
        needed = [dtype, "LDSM.16.", "LDGSTS.E.BYPASS.128.ZFILL ", " STG.E.128 "]
        if "product" not in code.split("\n", 1)[0]:  # which adds to nothing
            needed.append(" LDG.E.128 ")
        for instruction in needed:
            assert instruction in code, (code.split("\n", 1)[0], instruction)


def test_library_loads_where_torch_is_a_cuda_build():
    """Its symbols resolve; no device is asked for."""
    import torch

    if torch.version.cuda is None:
        pytest.skip("this torch is not built for CUDA")
    torch.ops.load_library(SPEC.origin)
    for name in ("fwd", "bwd"):
        registered = torch._C._dispatch_has_kernel_for_dispatch_key
        assert registered(f"lora_ext::linear_{name}", "CUDA")
    assert cpp.unsupported(small_call("meta")).startswith("runs on cpu and cuda")
