"""The block operations of csrc/cpu/blocks.h by their meaning, and wrong ones that this must refuse.

blocks/check_blocks.cpp compares each operation of one instruction set with plain loops. It runs for
what this CPU has, and for AVX-512 with BF16 lowered to AVX2: the same source, the compiler's
64-byte vectors split in two and the instruction for pairs written out, so that all but the
instructions is checked on a CPU without them. The wrong kernels are changes of one line of that,
each behind a switch (tests/tools/switched.py).
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.processes import shared_by_workers
from tests.tools.switched import HEADER, switch_all

ROOT = Path(__file__).parents[2]
SETS = ["baseline", "avx2", "avx512", "avx512_bf16"]
LOWERED = "lowered"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="needs AVX2"
    ),
    pytest.mark.skipif(shutil.which("ninja") is None, reason="needs ninja"),
]

# name: (file, the line, what it becomes)
MUTANTS = {
    "odd_element_of_the_left_factor_kept": (
        "load_pairs_impl.h",
        "if (cols % 2 != 0) to[cols].bits = 0;",
        "",
    ),
    "odd_row_of_the_right_factor_kept": (
        "load_pairs_impl.h",
        "2 * p + 1 < src.rows ? even + src.row_stride : nullptr",
        "even + src.row_stride",
    ),
    "even_and_odd_swapped_in_the_right_factor": (
        "load_pairs_impl.h",
        "write(dst + j, bits_of(even + j) | high);",
        "write(dst + j, bits_of(even + j) << 16 | high >> 16);",
    ),
    "pairs_of_a_second_vector_those_of_the_first": (
        "load_pairs_impl.h",
        "interleave<true, 4, kPairLanes>(first, second)",
        "interleave<false, 4, kPairLanes>(first, second)",
    ),
    "odd_row_of_two_vectors_that_of_the_even": (
        "load_pairs_impl.h",
        "odd != nullptr ? read<Elements>(odd) : Elements{}",
        "a",
    ),
    "odd_elements_not_multiplied": (
        "vectors.h",
        "acc += (FloatVector)(a & odd) * (FloatVector)(b & odd)",
        "acc += FloatVector{}",
    ),
    "first_panel_of_a_tile_twice": (
        "multiply_impl.h",
        "b.data + v / kVectors * b.panel_stride",
        "b.data",
    ),
    "second_panel_of_a_tile_lost": (
        "multiply_impl.h",
        "for (int v = 0; v < kPanels * kVectors; ++v) out.put",
        "for (int v = 0; v < kVectors; ++v) out.put",
    ),
    "last_odd_panel_as_two": (
        "multiply_impl.h",
        "left < kTilePanels * panel ? panel : kTilePanels * panel",
        "kTilePanels * panel",
    ),
    "product_along_lost": (
        "multiply_impl.h",
        "add_steps<kRows, kPanels, false>(along.a, along.b, Ahead{}, acc)",
        "(void)0",
    ),
    "product_along_of_the_first_rows": ("operands.h", "a.block(row, 0, rows, a.cols)", "a"),
    "rows_of_a_tile_past_the_fourth_twice": (
        "few_rows_impl.h",
        "const int64_t i = left.rows * tile / tiles, end",
        "const int64_t i = left.rows * tile / tiles / 4 * 4, end",
    ),
    "fourth_column_of_a_dot_tile_lost": (
        "few_rows_impl.h",
        "for (int j = 0; j < kRight; ++j) out.put(i, j, sums[i * kRight + j]);",
        "for (int j = 0; j < kRight - kRight / 4; ++j) out.put(i, j, sums[i * kRight + j]);",
    ),
    "dot_of_pairs_without_scale": ("pairs_impl.h", "{out, ld, scale, add}", "{out, ld, 1, add}"),
    "tail_of_pairs_summed_twice": (
        "pairs_impl.h",
        "kLastElements.kept + count",
        "kLastElements.kept + 2 * kPairLanes",
    ),
    "combined_pairs_in_the_order_of_the_interleave": (
        "pairs_impl.h",
        "interleave<false, 4, lanes>(first[i], second[i])",
        "first[i]",
    ),
    "last_row_of_combined_pairs_read_past_the_end": (
        "pairs_impl.h",
        "if (row >= matrix.rows) return UintVector{};",
        "",
    ),
    "rows_combined_last_alone": (
        "few_rows_impl.h",
        "add ? read<V>(to) + sum[i] : sum[i]",
        "sum[i]",
    ),
    "scale_dropped": ("multiply_impl.h", "sum *= scale;", ""),
    "scale_of_an_update_dropped": (
        "multiply_impl.h",
        "narrow(widen(to) + scale * sum, to);",
        "narrow(widen(to) + sum, to);",
    ),
    "edge_columns_of_an_update_not_added": (
        "multiply_impl.h",
        "narrow_one(widen_one(to) + scale * sum, to);",
        "narrow_one(scale * sum, to);",
    ),
    "exponential_of_half": ("act_impl.h", "p = p * r + 0.5f;", "p = p * r + 0.49f;"),
    "powers_of_two_halved_alike": ("act_impl.h", "power_of_two(n - half)", "power_of_two(half)"),
    "share_of_negative_numbers_mirrored": ("act_impl.h", "tail, 1 - tail", "1 - tail, tail"),
    "derivative_without_its_slope": ("act_impl.h", "x * slope * (s", "x * (s"),
    "up_forgotten_in_the_gates_gradient": (
        "act_impl.h",
        "dy * widen(u + j) * derivative",
        "dy * derivative",
    ),
    "up_forgotten_in_the_gates_last_gradient": ("act_impl.h", "dy * by * derivative", "dy * by"),
    "tail_of_the_product_lost": (
        "act_impl.h",
        "hidden.col_stride, hidden.col_stride, left);",
        "hidden.col_stride, hidden.col_stride, 0);",
    ),
    "combined_codes_last_alone": (
        "combine_codes_impl.h",
        "add ? read<FloatVector>(to) + ordered : ordered",
        "ordered",
    ),
    "combined_codes_of_first_rows": (
        "combine_codes_impl.h",
        "codes, p, col, cols,",
        "codes, 0, col, cols,",
    ),
    "combined_codes_of_first_columns": (
        "combine_codes_impl.h",
        "codes.width + col + k",
        "codes.width + k",
    ),
    "combined_codes_with_the_first_blocks_scale": (
        "combine_codes_impl.h",
        "element >> codes.block_bits : row + p",
        "(element - k) >> codes.block_bits : row",
    ),
    "rounded_towards_zero": (
        "vectors.h",
        "(bits + 0x7fff + ((bits >> 16) & 1)) >> 16",
        "bits >> 16",
    ),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Return the folder of the two programs, `check` and `lowered`."""
    with shared_by_workers(tmp_path_factory, "blocks") as folder:
        if not (folder / LOWERED).exists():
            build_programs(folder)
        return folder


def build_programs(folder: Path) -> None:
    """Build the kernels without optimisation: 12 s of compiling in place of 50."""
    csrc, program = ROOT / "csrc", Path(__file__).parent / "blocks/check_blocks.cpp"
    sources = lowered(folder / "sources")
    switch_all(sources / "cpu", MUTANTS.values())
    (folder / "fault.h").write_text(HEADER)
    rules = [
        "rule compile",
        "  command = c++ -std=c++20 -w -ffp-contract=fast $flags -I$csrc -c $in -o $out",
        "rule link",
        "  command = c++ $in -o $out",
    ]
    objects = {name: (csrc, csrc / f"cpu/blocks_{name}.cpp", "-O0") for name in SETS}
    objects["checks"] = (csrc, program, "-O2")
    objects["lowered_checks"] = (csrc, program, "-O2 -DLOWERED")
    objects[LOWERED] = (sources, sources / "cpu/blocks_avx512_bf16.cpp", "-O0 -include fault.h")
    for name, (include, source, flags) in objects.items():
        rules.append(f"build {name}.o: compile {source}")
        rules.extend([f"  csrc = {include}", f"  flags = {flags}"])
    shared = "baseline.o avx2.o avx512.o"
    rules.append(f"build check: link checks.o {shared} avx512_bf16.o")
    rules.append(f"build {LOWERED}: link lowered_checks.o {shared} {LOWERED}.o")
    (folder / "build.ninja").write_text("\n".join(rules) + "\n")
    ran = subprocess.run(["ninja", "-C", folder], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout


def lowered(target: Path) -> Path:
    """Copy csrc to where its kernels for AVX-512 with BF16 are compiled for AVX2."""
    shutil.copytree(ROOT / "csrc", target)
    pragma = r'target\("avx512f,[^"]*prefer-vector-width=512"\)'
    for name in ("avx512", "avx512_bf16"):
        file = target / f"cpu/blocks_{name}.cpp"
        change(file, pragma, 'target("avx2,fma,f16c")', times=1)
        change(file, "TILE_ROWS 8", "TILE_ROWS 3", times=1)  # a third of the time to compile
    change(target / "cpu/blocks_avx512_bf16.cpp", "#define LORA_EXT_DPBF16\n", "", times=1)
    change(target / "cpu/vectors.h", "#if LORA_EXT_VECTOR_BYTES == 64", "#if 0", times=3)
    change(target / "cpu/codes_impl.h", "#if LORA_EXT_VECTOR_BYTES == 64", "#if 0", times=6)
    return target


def change(file: Path, old: str, new: str, times: int) -> None:
    """Replace the pattern `old`, which must be in the file so many times."""
    text, found = re.subn(old, lambda _: new, file.read_text())
    assert found == times, f"{file.name} has {old!r} {found} times: fix the test"
    file.write_text(text)


def run(program: Path, instruction_set: str, fault: int = 0) -> subprocess.CompletedProcess:
    environment = os.environ | {"LORA_EXT_FAULT": str(fault)}
    command = [program, instruction_set, *(["first"] if fault else [])]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.parametrize("name", SETS)
def test_every_operation_is_right(built, name):
    ran = run(built / "check", name)
    if ran.returncode == 2:
        pytest.skip(f"this CPU has no {name}")
    assert ran.returncode == 0, ran.stdout


def test_every_operation_is_right_without_the_instructions(built):
    ran = run(built / LOWERED, "avx512_bf16")
    assert ran.returncode == 0, ran.stdout


@pytest.mark.parametrize("number", range(1, len(MUTANTS) + 1), ids=list(MUTANTS))
def test_wrong_operation_is_refused(built, number):
    assert run(built / LOWERED, "avx512_bf16", number).returncode not in (0, 2)  # it may crash


def test_no_instruction_set_leaks_into_another(built):
    """A function that two files share is linked once, perhaps for a CPU that does not have it.

    The files are built without optimisation, where nothing is inlined that need not be.
    """
    for name in SETS:
        symbols = subprocess.run(
            ["nm", "--defined-only", built / f"{name}.o"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        shared = [line for line in symbols if line.split()[-2] in "WVuT"]
        assert not shared, f"{name}: {shared}"
