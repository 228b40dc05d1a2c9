"""The C++ kernels under the sanitizers: addresses and undefined behaviour, and data races.

Built with little or no optimisation and loaded in place of lora_ext._C, with AVX2. PyTorch is not
instrumented, but it takes its memory from the sanitizer, so that reading or writing past a tensor
on either side shows. For ThreadSanitizer the kernels' threads are not OpenMP's but those of
threads.cpp, which it sees. A library has two faults in it behind switches: what finds nothing in
the kernels has to find them.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.processes import shared_by_workers
from tests.tools.library import Library, build
from tests.tools.switched import switch_all

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="needs AVX2"
    ),
    pytest.mark.skipif(shutil.which("ninja") is None, reason="needs ninja"),
]
FAULTS = [  # file, the line, what it becomes; numbered from 1
    ("cpu/parallel.h", "std::min(part, size - i * part)", "part"),  # past the end
    ("cpu/product.h", "tile / across * tiling.rows, col", "0 * tiling.rows, col"),  # two in one
]
OPTIONS = {
    "address": {
        "ASAN_OPTIONS": "detect_leaks=0:exitcode=66",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    },
    # What is not instrumented has locks that ThreadSanitizer can't see. One race is enough.
    "thread": {"TSAN_OPTIONS": "exitcode=66:halt_on_error=1:ignore_noninstrumented_modules=1"},
}
# With TSan -O1 compiles for 8 s more and runs for 7 s in place of 34.
SANITIZERS = {"address": "-fsanitize=address,undefined", "thread": "-O1 -fsanitize=thread"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Build both libraries. One of pytest's workers does it for all."""
    with shared_by_workers(tmp_path_factory, "sanitized") as folder:
        sources = folder / "csrc"
        if not sources.exists():
            shutil.copytree(ROOT / "csrc", sources)
            switch_all(sources, FAULTS)
            threads = ROOT / "tests/op/sanitized/threads.cpp"
            for kind, names in SANITIZERS.items():
                flags = f"-g1 {names} -fno-sanitize-recover=undefined"
                (folder / kind).mkdir()
                more = threads if kind == "thread" else None
                libraries = {"switched": Library(sources, "avx2")}
                build(folder / kind, libraries, flags, more, folder / "bindings.o")
        yield folder


def run(folder: Path, kind: str, what: str, fault: int = 0) -> subprocess.CompletedProcess[str]:
    name = {"address": "libasan.so", "thread": "libtsan.so"}[kind]
    asked = ["c++", f"-print-file-name={name}"]
    runtime = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip(f"the compiler has no {name}")
    command = [sys.executable, "-W", "ignore", "-m", "tests.op.sanitized"]
    fixed = ["setarch", platform.machine(), "-R"]  # TSan's shadow memory has a place of its own
    if kind == "thread" and subprocess.run([*fixed, "true"], capture_output=True).returncode == 0:
        command = [*fixed, *command]
    environment = OPTIONS[kind] | {"LD_PRELOAD": runtime, "LORA_EXT_FAULT": str(fault)}
    environment |= {"LORA_EXT_CPU_ISA": "avx2", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [*command, str(folder / kind / "switched.so"), what],
        env=os.environ | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if "ThreadSanitizer: unexpected memory mapping" in ran.stderr:
        pytest.skip("this container does not let TSan fix the addresses")
    return ran


@pytest.mark.parametrize(
    ("kind", "what"), [("address", "cases"), ("thread", "threads")], ids=["address", "thread"]
)
def test_kernels_are_clean(folder, kind, what):
    result = run(folder, kind, what)
    assert result.returncode == 0 and result.stdout == "ran\n", result.stderr[-8000:]


@pytest.mark.parametrize(
    ("kind", "fault", "message"),
    [
        ("address", 1, "AddressSanitizer: heap-buffer-overflow"),
        ("thread", 2, "ThreadSanitizer: data race"),
    ],
    ids=["address", "thread"],
)
def test_a_fault_is_found(folder, kind, fault, message):
    result = run(folder, kind, "threads", fault)
    assert result.returncode != 0 and message in result.stderr, result.stderr[-8000:]
