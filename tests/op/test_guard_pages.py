"""The installed kernels on tensors between two pages that nobody may touch, freed ones included.

The sanitizers see what they have compiled, AVX2 and without optimisation; this is the build that
users have, on the best instruction set here. A tensor whose size is no multiple of 64 bytes has up
to 63 of its own after it.
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lora_ext.backends import BACKENDS
from tests.conftest import small_call
from tests.processes import shared_by_workers

ROOT = Path(__file__).parents[2]
WITHOUT_CPP = BACKENDS["cpp"].unsupported(small_call())
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(WITHOUT_CPP is not None, reason=str(WITHOUT_CPP)),
    pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Compile what is preloaded."""
    with shared_by_workers(tmp_path_factory, "guard") as folder:
        library = folder / "guard.so"
        if not library.exists():
            source = ROOT / "tests/op/sanitized/guard.cpp"
            flags = ["-std=c++20", "-O1", "-Wall", "-Werror", "-fPIC", "-shared"]
            subprocess.run(["c++", *flags, source, "-o", library, "-ldl"], check=True)
        return library


def run(library: Path, side: str, what: str) -> subprocess.CompletedProcess[str]:
    environment = {"LD_PRELOAD": str(library), "LORA_EXT_GUARD": side, "OMP_NUM_THREADS": "2"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.op.sanitized", "installed", what],
        env=os.environ | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_nothing_beside_a_tensor_is_touched(library, side):
    result = run(library, side, "cases")
    assert result.returncode == 0 and result.stdout == "ran\n", result.stderr[-4000:]


@pytest.mark.parametrize(("side", "what"), [("left", "before"), ("right", "past")])
def test_a_byte_beside_a_tensor_ends_the_process(library, side, what):
    assert run(library, side, what).returncode == -signal.SIGSEGV
