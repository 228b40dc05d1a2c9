"""Every (kernel, configuration) the library can launch, compiled for every card and inspected.

`pytest -rP` shows the tables of what was compiled.
"""

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs the compiler, not the interpreter", allow_module_level=True)

from lora_ext.backends.triton import cards
from tests.gpu.configurations import DTYPES, distinct, faults_of, inspect

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
    rows = [inspect(family, types, index) for index in range(len(distinct(family, types)))]
    print(f"{'kernel':31} {'tile':22} {'types':17} card    regs  shared  in loops")
    for row in rows:
        print(f"{row} {family:7} {row.figures()}")
    faults = [f"{row} {fault}" for row in rows for fault in faults_of(row, family)]
    assert rows and not faults, "\n".join(faults)
    assert any(row.wide for row in rows) == DTYPES[types].loops
