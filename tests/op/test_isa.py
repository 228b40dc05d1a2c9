"""The C++ kernels under the instruction sets below this machine's own, one process each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_ext.backends import BACKENDS
from tests.conftest import small_call

ROOT = Path(__file__).parents[2]
WITHOUT_CPP = BACKENDS["cpp"].unsupported(small_call())
SCRIPT = """
import sys
import torch
from lora_ext import _C
from lora_ext.testing import DTYPES, LAYOUTS, TAILS, check, every_case
from tests.conftest import linear_of, poisoned_memory  # that import poisons malloc
from lora_ext.backends import cpp
from tests.op.acts import refused_acts
from tests.op.dora import refused_dora
from tests.op.pairs import forced_pairs, the_other_kind
from tests.op.test_backends import CROSSES_EVERY_BLOCK, LARGE_WEIGHT
from tests.op.test_extremes import rules_broken_at_rank_one

if _C.build_info()["cpu_isa"] != sys.argv[1]:
    print("this CPU has no", sys.argv[1])
    sys.exit()
large = [CROSSES_EVERY_BLOCK, LARGE_WEIGHT, *(TAILS.but(layout=name) for name in LAYOUTS)]
large = [c.but(dtype=dtype, adapter_dtype=ab) for c in large for dtype, ab in DTYPES]
cases = {*every_case(), *large}
assert sys.argv[1] == "avx512_bf16" or not _C.route("bfloat16")["pairs"]
with poisoned_memory():
    for case in cases:
        check(linear_of("cpp"), case)
    for case in (c for c in cases if c.dtype == torch.bfloat16):
        with forced_pairs(the_other_kind()):
            check(linear_of("cpp"), case)
    for seed in range(10):
        assert rules_broken_at_rank_one(linear_of("cpp"), seed) == [], seed
    assert (why := refused_acts(cpp) or refused_dora()) is None, why
print("ran")
"""


@pytest.mark.skipif(WITHOUT_CPP is not None, reason=str(WITHOUT_CPP))
@pytest.mark.slow  # `make test` runs the best one this CPU has, in every other test
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
