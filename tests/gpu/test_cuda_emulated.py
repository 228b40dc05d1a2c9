"""The CUDA C++ kernels without a GPU: csrc/cuda compiled by the C++ compiler over the emulator.

It holds that the masks, the indices and the order between threads are right; that the arithmetic
is, the tests over backends hold, run over these kernels by `make test`. That a GPU runs it so is
test_cuda.py's.
"""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.gpu.emulated_cuda import EMULATION, KERNELS, NEEDS_X86, ROOT, SANITIZE, build

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() != "x86_64", reason=NEEDS_X86),
]
PRIMITIVES = [*EMULATION, "tests/gpu/emulator/check_primitives.cpp"]
PRODUCTS = [*KERNELS, *EMULATION, "tests/gpu/emulator/check_kernels.cpp"]
# The lines that keep the threads apart: the emulator leaves one out where it is told to.
WAITS = [
    f"{path.name}:{number}"
    for path in sorted((ROOT / "csrc/cuda").iterdir())
    for number, line in enumerate(path.read_text().splitlines(), 1)
    if re.match(r"\s*(barrier|warp_barrier|wait_for_copies<.*>)\(\);", line)
]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """Build everything at once: {name: path}."""
    folder = tmp_path_factory.mktemp("emulated")
    changed = folder / "changed/csrc"
    shutil.copytree(ROOT / "csrc/cuda", changed / "cuda")
    text = (changed / "cuda/tile.h").read_text()
    assert text.count("row < factor.rows") == 1, "fix the test: tile.h has another mask"
    (changed / "cuda/tile.h").write_text(text.replace("row < factor.rows", "true"))
    targets = {
        "check_primitives": (PRIMITIVES, "-O1"),
        "check_kernels": (PRODUCTS, SANITIZE),
        "no_mask": (PRODUCTS, SANITIZE),
    }
    return build(folder, targets, {"no_mask": changed})


def run(program: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [program, *arguments]
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True)


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


@pytest.mark.parametrize("line", WAITS)
def test_kernels_that_do_not_wait_are_refused(built, line):
    assert run(built["check_kernels"], "4", LORA_EXT_EMULATOR_WITHOUT=line).returncode == 1


def test_the_kernels_wait_by_these_primitives_alone():
    """So that no barrier escapes the test above."""
    assert len(WAITS) == 5, WAITS
    kernels = [p for p in (ROOT / "csrc/cuda").iterdir() if p.name != "primitives.h"]
    assert not [p.name for p in kernels if re.search(r"__sync|\basm\b|bar\.sync", p.read_text())]


def test_reading_past_a_tensor_is_refused(built):
    assert "AddressSanitizer: heap-buffer-overflow" in run(built["no_mask"], "1").stderr
