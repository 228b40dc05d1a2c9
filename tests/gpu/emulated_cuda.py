"""The CUDA kernels of csrc/cuda for the CPU: built over tests/gpu/emulator, and a pytest plugin.

`python -m tests.gpu.emulated_cuda FOLDER` builds the library, with `--sanitized` for ASan and
UBSan, whose runtime then has to be in LD_PRELOAD. `python -m pytest -p tests.gpu.emulated_cuda
--backends cpp ...` with LORA_EXT_EMULATED naming it has it in the place of `lora_ext._C`: backend
"cpp" then runs the emulated kernels; variant "cpp-own_base" makes the base product by kernels too.
`make test-all` does both.
"""

import contextlib
import os
import platform
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.utils.cpp_extension import include_paths

NEEDS_X86 = "the emulator switches stacks by x86-64 instructions"
ROOT = Path(__file__).parents[2]
EMULATOR = ROOT / "tests/gpu/emulator"
KERNELS = ["csrc/cuda/kernels.cu"]
EMULATION = ["tests/gpu/emulator/emulator.cpp"]
OPERATORS = [
    "csrc/call.cpp",
    "csrc/checks.cpp",
    "csrc/cuda/linear.cpp",
    "csrc/cuda/low_rank.cpp",
    "tests/gpu/emulator/register.cpp",
]
FLAGS = "-std=c++20 -march=native -fPIC -Wall -Werror -Wno-unknown-pragmas"
FLAGS += " -fvisibility=hidden -DTORCH_TARGET_VERSION=0x020b000000000000"
SANITIZE = "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all"


def build(
    folder: Path, targets: dict[str, tuple[list[str], str]], changed: dict[str, Path] | None = None
) -> dict[str, Path]:
    """Build {target: (sources, flags)} in `folder` by one ninja run; return {target: path}.

    A target that ends in ".so" is linked with torch, another is a program. The targets in `changed`
    take csrc/cuda from the csrc given there.
    """
    torch_flags = " ".join(f"-isystem {path}" for path in include_paths())
    libraries = f"-L{Path(torch.__file__).parent / 'lib'} -ltorch -ltorch_cpu -lc10"
    rules = [
        "rule compile",
        f"  command = c++ -x c++ {FLAGS} $flags -I{EMULATOR} -I$csrc {torch_flags} -MMD -MF $out.d "
        "-c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule program",
        "  command = c++ $flags $in -o $out",
        "rule library",
        f"  command = c++ -shared $flags $in -o $out {libraries}",
    ]
    objects = {}
    for target, (sources, flags) in targets.items():
        parts = []
        for source in sources:
            csrc = (
                (changed or {}).get(target, ROOT / "csrc") if source in KERNELS else ROOT / "csrc"
            )
            path = csrc.parent / source if source.startswith("csrc/") else ROOT / source
            # What has no part in the kernels: instrumented, the checks alone take 10 s.
            own_flags = flags if source in (*KERNELS, *EMULATION) else "-O1"
            key = path, own_flags
            if key not in objects:
                objects[key] = f"{len(objects)}-{path.stem}.o"
                rules.append(
                    f"build {objects[key]}: compile {path}\n  flags = {own_flags}\n  csrc = {csrc}"
                )
            parts.append(objects[key])
        rule = "library" if target.endswith(".so") else "program"
        rules.append(f"build {target}: {rule} {' '.join(parts)}\n  flags = {flags}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join(rules) + "\n")
    ran = subprocess.run(["ninja", "-C", str(folder)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return {target: folder / target for target in targets}


@contextlib.contextmanager
def own_base() -> Iterator[None]:
    with mock.patch.dict(os.environ, LORA_EXT_CUDA_BASE="own"):
        yield


def pytest_configure() -> None:
    """Once conftest.py is there, add the variant to what the tests run over."""
    if platform.machine() != "x86_64":
        pytest.exit(NEEDS_X86, 0)
    from lora_ext.backends import cpp
    from tests.conftest import VARIANTS, Backend

    on_cpu = cpp.unsupported
    cpp.unsupported = lambda call: on_cpu(call) or cpp.why_no_cuda_kernel(call)
    VARIANTS["cpp"] = [Backend("cpp", "own_base", own_base)]


if __name__ == "__main__":
    if platform.machine() == "x86_64":
        sources = [*KERNELS, *EMULATION, *OPERATORS]
        flags = SANITIZE if "--sanitized" in sys.argv else "-O2"
        build(Path(sys.argv[1]), {"emulated.so": (sources, flags)})
elif library := os.environ.get("LORA_EXT_EMULATED"):
    assert "lora_ext" not in sys.modules, "too late: lora_ext has loaded its own kernels"
    sys.modules["lora_ext._C"] = types.ModuleType("lora_ext._C")
    torch.ops.load_library(library)
