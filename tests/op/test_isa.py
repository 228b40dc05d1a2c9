"""The C++ kernels under the instruction sets below this machine's own, one process each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_ext.backends import BACKENDS

ROOT = Path(__file__).parents[2]
WITHOUT_CPP = BACKENDS["cpp"].unsupported(*[torch.ones(1, 1)] * 3)
SCRIPT = """
import sys
from functools import partial
import torch
from lora_ext import _C, lora_linear
from tests.numerics import LAYOUTS, broken_rules, expected, gradients
from tests.op.test_backends import CROSSES_EVERY_BLOCK, DTYPES, LARGE_WEIGHT, SHAPES, TAILS

if _C.build_info()["cpu_isa"] != sys.argv[1]:
    print("this CPU has no", sys.argv[1])
    sys.exit()
import tests.conftest  # poisons malloc
torch.use_deterministic_algorithms(True, warn_only=True)  # and at::empty, with NaN
cases = [*SHAPES, CROSSES_EVERY_BLOCK, LARGE_WEIGHT, *(TAILS.but(layout=name) for name in LAYOUTS)]
for case in cases:
    for dtype, adapter in DTYPES:
        case = case.but(dtype=dtype, adapter_dtype=adapter)
        want = expected(case)
        got = gradients(partial(lora_linear, backend="cpp"), want.inputs, case.alpha)
        assert not (broken := broken_rules(got, want)), f"{case}: {broken}"
print("ran")
"""


@pytest.mark.skipif(WITHOUT_CPP is not None, reason=str(WITHOUT_CPP))
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16"])
def test_every_instruction_set_keeps_the_error_rule(isa):
    """The variable is read once a process."""
    from lora_ext import _C

    if isa == _C.build_info()["cpu_isa"]:
        pytest.skip("what all other tests run on")
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, isa],
        cwd=ROOT,
        env=os.environ | {"LORA_EXT_CPU_ISA": isa, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    if result.stdout.startswith("this CPU has no"):
        pytest.skip(result.stdout.strip())
    assert result.stdout.strip() == "ran"


@pytest.mark.skipif(WITHOUT_CPP is not None, reason=str(WITHOUT_CPP))
def test_unknown_instruction_set_is_named():
    script = (
        "import torch, lora_ext\n"
        "one = torch.ones(1, 1)\n"
        "lora_ext.lora_linear(one, one, None, one, one, 1.0, backend='cpp')"
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        cwd=ROOT,
        env=os.environ | {"LORA_EXT_CPU_ISA": "sse9"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode != 0
    assert (
        "LORA_EXT_CPU_ISA must be baseline, avx2, avx512 or avx512_bf16, got sse9" in result.stderr
    )
