"""The C++ kernels under the instruction sets below this machine's own, one process each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_ext.backends import BACKENDS
from tests.conftest import small_call
from tests.processes import shared_by_workers

ROOT = Path(__file__).parents[2]
WITHOUT_CPP = BACKENDS["cpp"].unsupported(small_call())
# One process computes what results are compared with, and each instruction set gets a fork of it,
# which is the first to ask for the variable: 4 s each in place of 11.
SCRIPT = """
import os
import sys
import traceback
import torch
from lora_ext import _C
from lora_ext.testing import DTYPES, LAYOUTS, TAILS, check, every_case, expected
from tests.conftest import linear_of, poisoned_memory  # that import poisons malloc
from lora_ext.backends import cpp
from tests.op.acts import refused_acts
from tests.op.dora import refused_dora
from tests.op.pairs import forced_pairs, the_other_kind
from tests.op.test_backends import CROSSES_EVERY_BLOCK, LARGE_WEIGHT
from tests.op.test_extremes import rules_broken_at_rank_one

large = [CROSSES_EVERY_BLOCK, LARGE_WEIGHT, *(TAILS.but(layout=name) for name in LAYOUTS)]
large = [c.but(dtype=dtype, adapter_dtype=ab) for c in large for dtype, ab in DTYPES]
cases = {*every_case(), *large}


def run(isa):
    os.environ["LORA_EXT_CPU_ISA"] = isa
    torch.set_num_threads(threads)
    if _C.build_info()["cpu_isa"] != isa:
        return "this CPU has no"
    assert isa == "avx512_bf16" or not _C.route("bfloat16")["pairs"]
    with poisoned_memory():
        for case in cases:
            check(linear_of("cpp"), case)
        for case in (c for c in cases if c.dtype == torch.bfloat16):
            with forced_pairs(the_other_kind()):
                check(linear_of("cpp"), case)
        for seed in range(10):
            assert rules_broken_at_rank_one(linear_of("cpp"), seed) == [], seed
        assert (why := refused_acts(cpp) or refused_dora()) is None, why
    return "ran"


threads = torch.get_num_threads()
torch.set_num_threads(1)  # a fork would wait for others
for case in cases:
    expected(case)
assert len(cases) <= expected.cache_info().maxsize
for isa in sys.argv[1:]:
    if (child := os.fork()) == 0:
        try:
            print(isa, run(isa), flush=True)
        except BaseException:
            print(isa, "failed", flush=True)
            traceback.print_exc()
        os._exit(0)
    if status := os.waitpid(child, 0)[1]:
        print(isa, "ended by", os.waitstatus_to_exitcode(status), flush=True)
"""
SETS = ["baseline", "avx2", "avx512", "avx512_bf16"]


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """Return what came of each instruction set but this machine's own, and the errors of all."""
    from lora_ext import _C

    others = [isa for isa in SETS if isa != _C.build_info()["cpu_isa"]]
    with shared_by_workers(tmp_path_factory, "isa") as folder:
        file = folder / "said.json"
        if not file.exists():
            ran = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", SCRIPT, *others],
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
                timeout=600,
            )
            lines = dict(line.split(" ", 1) for line in ran.stdout.splitlines())
            file.write_text(json.dumps([lines, ran.stderr]))
        return json.loads(file.read_text())


@pytest.mark.skipif(WITHOUT_CPP is not None, reason=str(WITHOUT_CPP))
@pytest.mark.slow  # `make test` runs the best one this CPU has, in every other test
@pytest.mark.parametrize("isa", SETS)
def test_every_instruction_set_keeps_the_error_rule(said, isa):
    """The variable is read once a process."""
    from lora_ext import _C

    if isa == _C.build_info()["cpu_isa"]:
        pytest.skip("what all other tests run on")
    lines, errors = said
    if lines.get(isa) == "this CPU has no":
        pytest.skip(f"this CPU has no {isa}")
    assert lines.get(isa) == "ran", f"{lines}\n{errors}"


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
