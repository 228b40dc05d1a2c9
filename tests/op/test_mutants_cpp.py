"""Wrong C++ kernels that the checks must refuse: csrc built with one line of it changed.

All are in one library, each behind a switch (tests/tools/switched.py), built without optimisation
and run on AVX2, where every way is taken. It is loaded in place of lora_ext._C by a process of its
own for each kernel.

With every switch off it is right. One more is right: the AVX-512 kernels with the compiler's
64-byte vectors lowered to AVX2, so that all of them but their instructions runs on a CPU without
AVX-512.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import types
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from lora_ext.backends import cpp
from lora_ext.testing import LAYOUTS, OF_CODES, SHAPES, TAILS, Case, expected
from tests.conftest import linear_of
from tests.op.acts import refused_acts
from tests.op.cpp_mutants import MUTANTS
from tests.op.dora import refused_dora
from tests.op.groups import every_case_of_a_group, refused_group
from tests.op.test_mutants import CASES, refused
from tests.processes import shared_by_workers
from tests.tools.library import Library, build
from tests.tools.switched import switch_all

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="needs AVX2"
    ),
]
ROOT = Path(__file__).parents[2]
# Past one block of each kind: 384 of a summed dimension, 256 columns and 192 rows of a strip.
LONG = Case((400,), 404, 264, 8)
FEW_ROWS = Case((3,), 93, 70, 5)
CPP_CASES = [*CASES, FEW_ROWS, LONG, LONG.but(lead=(5,)), LONG.but(dtype=torch.bfloat16)]
CPP_CASES += [LONG.but(dropout=0.3), LONG.but(dropout=0.3, dtype=torch.bfloat16, R=24)]
OF_A_FORMAT = len(OF_CODES) // 3
CPP_CASES += OF_CODES[:OF_A_FORMAT]
CPP_CASES += [case.but(dtype=torch.bfloat16) for case in OF_CODES[-OF_A_FORMAT:]]
CPP_CASES += [Case((33,), 1000, 800, 8)]  # a weight over 3 MiB, which is far
# By more threads than pack a weight each, which are a part of the operands' order.
MANY_THREADS, CASES_OF_MANY = 6, [LONG, LONG.but(dropout=0.3), FEW_ROWS.but(K=800)]
CASES_OF_MANY += [case for case in OF_CODES[:OF_A_FORMAT] if case.K >= 512]
LOWERED = "avx512_lowered_to_avx2"
AVX512_CASES = [c.but(dtype=d) for c in SHAPES for d in (torch.float64, torch.float16)] + SHAPES
AVX512_CASES += [TAILS.but(layout=name) for name in LAYOUTS]
AVX512_CASES += [LONG.but(dtype=torch.float16)]


def build_libraries(folder: Path) -> None:
    """Build folder/switched.so, with a switch for each mutant, and the lowered kernels'."""
    sources = folder / "switched/csrc"
    shutil.copytree(ROOT / "csrc", sources)
    switch_all(sources, MUTANTS.values())
    lowered = lowered_avx512(folder / LOWERED)
    changed = {source: lowered for source in ("cpu/isa", "cpu/route", "cpu/blocks_avx512")}
    libraries = {"switched": Library(sources, "avx2"), LOWERED: Library(sources, "avx512", changed)}
    build(folder, libraries)


def lowered_avx512(target: Path) -> Path:
    """Copy csrc to where it takes AVX-512 for there and compiles its kernels for AVX2."""
    shutil.copytree(ROOT / "csrc", target)
    has = r'__builtin_cpu_supports\("avx512(f|bw|dq|vl)"\)'
    change(target / "cpu/isa.cpp", has, "true", times=4)
    # Each dtype through products of our own, where PyTorch's are the faster ones on AVX-512.
    table = target / "cpu/route.cpp"
    line = r'(\{"avx512", "[\w-]*", "\w+"), (true|false), 0?\d(, \d+){3}, (true|false), .*\},'
    table.write_text(
        re.sub(line, r"\1, false, 0, 2, 20, 4, false, kNever, kNever, kNever},", table.read_text())
    )
    pragma = r'target\("avx512f,[^"]*prefer-vector-width=512"\)'
    change(target / "cpu/blocks_avx512.cpp", pragma, 'target("avx2,fma,f16c")', times=1)
    change(target / "cpu/vectors.h", "#if LORA_EXT_VECTOR_BYTES == 64", "#if 0", times=3)
    change(target / "cpu/codes_impl.h", "#if LORA_EXT_VECTOR_BYTES == 64", "#if 0", times=6)
    return target


def change(file: Path, old: str, new: str, times: int) -> None:
    text, found = re.subn(old, lambda _: new, file.read_text())
    assert found == times, f"{file.name} has {old!r} {found} times: fix the test"
    file.write_text(text)


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    """Return what the checks say of each library. One of pytest's workers asks them for all."""
    with shared_by_workers(tmp_path_factory, "mutants") as folder:
        said = folder / "verdicts.json"
        if not said.exists():
            build_libraries(folder)
            said.write_text(json.dumps(ask_each(folder, ["none", LOWERED, *MUTANTS])))
        return json.loads(said.read_text())


def ask_each(folder: Path, names: list[str]) -> dict[str, str]:
    ran = subprocess.run(
        [sys.executable, "-m", __name__, str(folder), *names],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return dict(zip(names, ran.stdout.splitlines(), strict=True))


@pytest.mark.parametrize("name", ["none", LOWERED])
def test_right_kernels_are_accepted(verdicts, name):
    assert verdicts[name] == "accepted"


@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_kernel_is_refused(verdicts, name):
    assert verdicts[name].startswith("refused: ")


# The check that comes first for a wrong kernel, by its file or name: up to 2 s sooner.
FIRST = {
    **{"codes": "codes", "forgotten_in_dx_of_few_rows": "codes"},
    **{"/act": "acts", "/dora": "dora"},
    **dict.fromkeys(("group_panels", "shared_panels", "first_row_of_tiles"), "threads"),
    "group_": "group",
}


def print_verdict(folder: str, name: str) -> None:
    lowered = name == LOWERED
    os.environ["LORA_EXT_CPU_ISA"] = "avx512" if lowered else "avx2"
    os.environ["LORA_EXT_FAULT"] = str(["", *MUTANTS].index(name) if name in MUTANTS else 0)
    torch.ops.load_library(f"{folder}/{LOWERED if lowered else 'switched'}.so")
    cases = [*CPP_CASES, *AVX512_CASES] if lowered else CPP_CASES
    known_by = f"{MUTANTS[name][0]} {name}" if name in MUTANTS else ""
    why = why_refused(cases, next((FIRST[part] for part in FIRST if part in known_by), ""))
    print("accepted" if why is None else f"refused: {' '.join(why.split())}", flush=True)


def why_refused(cases: list[Case] = CPP_CASES, first: str = "") -> str | None:
    """Return why the checks refuse the C++ kernels that are loaded; None if they do not."""
    checks = {
        "cases": lambda: refused(linear_of("cpp"), [c for c in cases if c.format == "plain"]),
        "codes": lambda: refused(linear_of("cpp"), [c for c in cases if c.format != "plain"]),
        "group": lambda: refused_group("cpp"),
        "acts": lambda: refused_acts(cpp),
        "dora": lambda: refused_dora(dtypes=["float32"]),
        "threads": refused_by_many_threads,
    }
    order = sorted(checks, key=lambda name: name != first)
    return next((why for name in order if (why := checks[name]()) is not None), None)


def refused_by_many_threads() -> str | None:
    threads = torch.get_num_threads()
    torch.set_num_threads(MANY_THREADS)
    why = refused(linear_of("cpp"), CASES_OF_MANY)
    why = why or refused_group("cpp", names=["panels_for_all_threads"])
    torch.set_num_threads(threads)
    return why


if __name__ == "__main__":
    # An operator takes one kernel a process: each name gets a fork of this one, with what PyTorch
    # would import at the first gradient, 2 s, and the results to compare with already there.
    import torch.fx.experimental.symbolic_shapes

    sys.modules["lora_ext._C"] = types.ModuleType("lora_ext._C")
    for case in (*CPP_CASES, *CASES_OF_MANY, *every_case_of_a_group()):
        expected(case)
    for name in sys.argv[2:]:
        process = get_context("fork").Process(target=print_verdict, args=[sys.argv[1], name])
        process.start()
        process.join()
        if process.exitcode != 0:
            print(f"ended by {process.exitcode}", flush=True)
