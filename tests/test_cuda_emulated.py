"""The CUDA C++ kernels without a GPU: csrc/cuda compiled by the C++ compiler over tests/emulator.

It holds that the arithmetic, the masks, the indices and the order between threads are right, not
that a GPU runs it so: that is test_cuda.py's.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from .emulated_cuda import EMULATION, KERNELS, OPERATORS, ROOT, build

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the emulator switches stacks by x86-64 instructions"
)
PRIMITIVES = [*EMULATION, "tests/emulator/check_primitives.cpp"]
PRODUCTS = [*KERNELS, *EMULATION, "tests/emulator/check_kernels.cpp"]
SANITIZE = "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all"
# Each thing that keeps threads apart, and one that keeps them inside the tensors, taken away.
CHANGES = {
    "no_wait": ("    wait_for_copies<kAhead - 1>();\n", ""),
    "no_barrier_in_the_loop": ("    barrier();  // all see", "    // all see"),
    "no_barrier_between_products": ("  barrier();  // the next", "  // the next"),
    "no_mask": ("row < factor.rows", "true"),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """Build everything at once: {name: path}; a changed kernel under the name of its change."""
    folder = tmp_path_factory.mktemp("emulated")
    targets = {
        "emulated.so": ([*KERNELS, *EMULATION, *OPERATORS], "-O2"),
        "check_primitives": (PRIMITIVES, "-O1"),
        "check_kernels": (PRODUCTS, SANITIZE),
    }
    csrc = {}
    for name, (old, new) in CHANGES.items():
        csrc[name] = folder / "changed" / name / "csrc"
        shutil.copytree(ROOT / "csrc/cuda", csrc[name] / "cuda")
        tile = csrc[name] / "cuda/tile.h"
        text = tile.read_text()
        assert text.count(old) == 1, f"tile.h has {old!r} {text.count(old)} times: mend the test"
        tile.write_text(text.replace(old, new))
        targets[name] = (PRODUCTS, SANITIZE if name == "no_mask" else "-O1")
    return build(folder, targets, csrc)


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *arguments], capture_output=True, text=True)


def test_each_primitive_does_what_was_worked_out_by_hand(built):
    result = run(built["check_primitives"])
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("misuse", "message"),
    {
        "divergent_warp": "a warp-wide instruction that not all lanes of the warp reach",
        "divergent_barrier": "a barrier that not all threads of the block reach",
        "misaligned_copy": "a misaligned address",
        "misaligned_row": "a misaligned address",
    }.items(),
)
def test_misuse_of_a_primitive_ends_the_run(built, misuse, message):
    result = run(built["check_primitives"], misuse)
    assert result.returncode != 0 and f"emulator: {message}" in result.stderr


def test_kernels_are_right_under_the_sanitizers_and_every_order_of_threads(built):
    result = run(built["check_kernels"], "3")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", [name for name in CHANGES if name != "no_mask"])
def test_kernels_that_do_not_wait_are_refused(built, name):
    assert run(built[name], "4").returncode == 1


def test_reading_past_a_tensor_is_refused(built):
    assert "AddressSanitizer: heap-buffer-overflow" in run(built["no_mask"], "1").stderr


def test_no_other_barrier_is_in_the_kernels():
    """Each of those there are has its change above."""
    text = "".join(p.read_text() for p in (ROOT / "csrc/cuda").glob("[tk]*"))
    calls = re.findall(r"\b(?:barrier|wait_for_copies<[^>]*>)\(\);", text)
    assert len(calls) == 3, calls


def test_emulated_kernels_pass_the_backend_tests(built):
    """The way of every card, and the base product by PyTorch, as on Hopper; side by side."""
    runs = {"80": ["test_backends.py", "test_backward.py", "test_extremes.py"]}
    runs["90"] = ["test_backends.py", "-k", "many_blocks or tile or threads"]

    def suite(capability: str) -> subprocess.CompletedProcess[str]:
        first, *rest = runs[capability]
        command = [sys.executable, "-m", "pytest", "-p", "tests.emulated_cuda"]
        command += ["--backends", "cpp", f"tests/{first}"]
        command += [f"tests/{a}" if a.endswith(".py") else a for a in rest]
        env = os.environ | {
            "LORA_EXT_EMULATED": str(built["emulated.so"]),
            "LORA_EXT_EMULATED_CAPABILITY": capability,
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)

    with ThreadPoolExecutor(2) as pool:
        for result in pool.map(suite, runs):
            assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
