"""The C++ sources on aarch64: all compile with g++, and the block operations are right under qemu.

Needs Debian's g++-aarch64-linux-gnu and qemu-user; `.ci/run` and nightly.yml install them.
"""

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pybind11
import pytest
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"needs {COMPILER}"),
]
FLAGS = ["-std=c++20", "-ffp-contract=fast", "-fno-math-errno", "-fvisibility=hidden", f"-I{CSRC}"]


def compile_with(*arguments: str | Path) -> None:
    ran = subprocess.run([COMPILER, *FLAGS, *arguments], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(
    "source", sorted([*CSRC.glob("*.cpp"), *CSRC.glob("cpu/*.cpp")]), ids=lambda path: path.stem
)
def test_source_compiles(source):
    includes = [*include_paths(), pybind11.get_include(), sysconfig.get_path("include")]
    compile_with(
        *("-fsyntax-only", "-Wall", "-Werror", source),
        *("-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_EXTENSION_NAME=_C"),
        '-DLORA_EXT_BUILT_CUDA="none"',
        *(f"-isystem{folder}" for folder in includes),
    )


@pytest.mark.skipif(shutil.which(EMULATOR) is None, reason=f"needs {EMULATOR}")
def test_block_operations_are_right(tmp_path):
    program = tmp_path / "check"
    sources = [CSRC / "cpu/blocks_baseline.cpp", Path(__file__).parent / "blocks/check_blocks.cpp"]
    compile_with("-O1", "-static", *sources, "-o", program)
    ran = subprocess.run([EMULATOR, program, "baseline"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
