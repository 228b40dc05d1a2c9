"""The backend tests over the Triton kernels, every regime forced by name, in Triton's interpreter.

An environment variable chooses the interpreter before Triton is imported, so the tests run in
processes of their own: two side by side, a share of the regimes each.
"""

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from .conftest import VARIANTS

TESTS = Path(__file__).parent
FILES = ["test_backends.py", "test_backward.py", "test_extremes.py"]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="starts the interpreter")
def test_every_regime_passes_the_backend_tests_in_the_interpreter():
    names = ["triton", *map(str, VARIANTS["triton"])]
    with ThreadPoolExecutor(2) as pool:
        for run in pool.map(interpret, (names[::2], names[1::2])):
            assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]


def interpret(backends: list[str]) -> subprocess.CompletedProcess[str]:
    """Run the files' tests over some backends with the interpreter on."""
    files = [str(TESTS / name) for name in FILES]
    command = [sys.executable, "-m", "pytest", *files, "--backends", ",".join(backends)]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=TESTS.parent, env=env, capture_output=True, text=True)
