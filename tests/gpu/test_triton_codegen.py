"""Every (kernel, configuration) the library can launch, compiled for every card and inspected.

`pytest -rP` shows the tables of what was compiled.
"""

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs the compiler, not the interpreter", allow_module_level=True)

from lora_ext.backends.triton import cards
from tests.gpu.configurations import (
    DTYPES,
    Inspected,
    configurations,
    distinct,
    distinct_of,
    faults_of,
    inspect,
    joint_ways,
)
from tests.gpu.passed import PASSED

# `make test` compiles for one family and dtype. Of cards that take the tiles of others with less
# memory `make test-all` compiles the hardest dtype, and `make test-long` the rest.
QUICK = ("sm_90", "bf16-R16")
LIKE_OTHERS = ("sm_86", "sm_89", "sm_120")


def marks(family: str, types: str) -> tuple:
    if family in LIKE_OTHERS and types != "fp16-R64":
        return (pytest.mark.slow, pytest.mark.long)
    return () if (family, types) == QUICK else (pytest.mark.slow,)


@pytest.mark.parametrize(
    ("family", "types"),
    [
        pytest.param(family, types, marks=marks(family, types))
        for family in cards.FAMILIES
        for types in DTYPES
    ],
)
def test_every_kernel_fits_its_card_and_uses_it(family, types, tmp_path, monkeypatch):
    """No spills, shared memory that is there, no atomic sums, matrix units fed by wide loads."""
    # Compiled again whatever the machine has compiled before, and only read here.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DISABLE_LINE_INFO", "1")  # the same machine code, a little sooner
    rows = inspect(family, types, distinct(family, types))
    assert_no_faults(rows, family)
    assert any(row.wide for row in rows) == DTYPES[types].loops


def assert_no_faults(rows: list[Inspected], family: str) -> None:
    """Print the table of what was compiled, and fail on what is wrong in it."""
    print(f"{'kernel':31} {'tile':22} {'types':17} card    regs  shared  in loops")
    for row in rows:
        print(f"{row} {family:7} {row.figures()}")
    faults = [f"{row} {fault}" for row in rows for fault in faults_of(row, family)]
    assert rows and not faults, "\n".join(faults)


# Two legs take as many registers as four, and half the time to compile, 15 s on one core.
JOINT = [("sm_90", "fp16-R64", 2)] + [
    (family, types, 3)
    for family in ("sm_80", "sm_90", "sm_100", "gfx942")
    for types in ("fp16-R64", "fp16-R64-fp32-AB", "fp16-R64-keep")
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "types", "layers"),
    [JOINT[0], *(pytest.param(*one, marks=pytest.mark.long) for one in JOINT[1:])],
)
def test_joint_kernels_fit_their_card_and_use_it(family, types, layers, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DISABLE_LINE_INFO", "1")
    launches = distinct_of(joint_ways(family, types, layers), DTYPES[types].kind)
    ours = [one for one in launches if "linears" in one[1][0].__name__]
    rows = inspect(family, types, ours)
    assert_no_faults(rows, family)
    names = {"lora_linears_shrink_kernel", "lora_linears_bwd_dx_kernel"}
    assert {row.kernel for row in rows} == names


@pytest.mark.parametrize("family", cards.FAMILIES)
def test_what_a_card_is_offered_has_passed_on_the_oldest_triton(family):
    """What is new is compiled by it first, and then put into PASSED: see tests/gpu/passed.py."""
    new = [
        (kernel, configuration)
        for kernel, configuration in sorted(configurations(family))
        if family not in PASSED.get(kernel, {}).get(configuration, "").split()
    ]
    assert not new
