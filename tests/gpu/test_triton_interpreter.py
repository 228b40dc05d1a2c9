"""The backend tests over the Triton kernels, every regime forced by name, in Triton's interpreter.

An environment variable chooses the interpreter before Triton is imported, so the tests run in
processes of their own, one a regime.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import VARIANTS

TESTS = Path(__file__).parents[1]
FILES = ["test_backends.py", "test_backward.py", "test_extremes.py"]


NAMES = ["triton", *map(str, VARIANTS["triton"])]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="starts the interpreter")
@pytest.mark.parametrize("backend_name", NAMES)
def test_every_regime_passes_the_backend_tests_in_the_interpreter(backend_name):
    files = [str(TESTS / "op" / name) for name in FILES]
    command = [sys.executable, "-m", "pytest", *files, "--backends", backend_name]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=TESTS.parent, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
