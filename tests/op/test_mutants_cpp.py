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
from lora_ext.testing import LAYOUTS, OF_CODES, SHAPES, TAILS, Case
from tests.conftest import linear_of
from tests.op.acts import refused_acts
from tests.op.groups import refused_group
from tests.op.test_mutants import CASES, refused
from tests.processes import shared_by_workers
from tests.tools.switched import build, switch_all

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

# name: (file, the line, what it becomes)
MUTANTS = {
    "scale_dropped_in_y": (
        "cpu/forward.cpp",
        "B.right(), call_.low.scale}",
        "B.right(), 1}",
    ),
    "scale_dropped_in_few_rows_dx": (
        "cpu/layer_backward.h",
        "static_cast<A>(call_.low.scale)",
        "A(1)",
    ),
    "scale_dropped_in_dx": (
        "cpu/layer_backward.h",
        "A_t_->right(), call_.low.scale, keep_}",
        "A_t_->right(), 1, keep_}",
    ),
    "scale_dropped_in_dA": (
        "cpu/layer_backward.h",
        "keep_, call_.low.scale, view.transposed()",
        "keep_, 1, view.transposed()",
    ),
    "one_percent_in_dB": (
        "cpu/layer_backward.h",
        "{}, call_.low.scale, view",
        "{}, 1.01 * call_.low.scale, view",
    ),
    "h_scaled": (
        "cpu/low_rank.h",
        "made.data, made.row_stride, 1, nullptr",
        "made.data, made.row_stride, 1.5, nullptr",
    ),
    "bias_of_first_columns": (
        "cpu/product.h",
        "bias == nullptr ? bias : bias + col",
        "bias",
    ),
    "B_of_first_columns": (
        "cpu/right_factor.h",
        "if (is_ready_) part.ready_ = ready_.from(0, col);",
        "",
    ),
    "dx_without_low_rank_part": (
        "cpu/layer_backward.h",
        "wide_product<T, P>(legs, Out<T>{to, nullptr, add})",
        "wide_product<T, P>({&legs.back(), 1}, Out<T>{to, nullptr, add})",
    ),
    "last_block_of_the_sums_alone": (
        "cpu/product.h",
        "after(k, col), with.from(0, rows, col));\n      }\n      addend = {sum, ld};",
        "after(k, col), with.from(0, rows, col));\n      }\n      addend = {};",
    ),
    "last_leg_alone": (
        "cpu/product.h",
        "      addend = {sum, ld};\n    }\n    if (!in_place)",
        "      addend = {};\n    }\n    if (!in_place)",
    ),
    "second_block_forgotten": (
        "cpu/product.h",
        "k == 0 || k < depth; k += leg_.step",
        "k == 0 || k < depth; k += leg_.step + (k > 0 ? 0 : leg_.step)",
    ),
    "bias_lost_after_the_first_block": (
        "cpu/product.h",
        "if (out.bias != nullptr) addend = {out.bias, 0};",
        "if (out.bias != nullptr && row > 0) addend = {out.bias, 0};",
    ),
    "base_product_forgotten_where_it_is_added_to": (
        "cpu/product.h",
        "if (out.add) addend = {sum, ld};",
        "",
    ),
    "first_block_of_the_weight_for_all": (
        "cpu/product.h",
        "if (k >= rows_packed_)",
        "if (rows_packed_ == 0)",
    ),
    "first_tile_of_rows_for_all": (
        "cpu/product.h",
        "cursors[i]->add_to(row, rows, sum",
        "cursors[i]->add_to(0, rows, sum",
    ),
    "first_rows_for_all_threads": (
        "cpu/left_factor.h",
        "part.data_ += row * row_stride_ * element_;",
        "",
    ),
    "first_columns_for_all_threads": (
        "cpu/right_factor.h",
        "part.data_ += col * col_stride_ * element_;",
        "",
    ),
    "first_columns_of_a_large_weight_for_all": (
        "cpu/product.h",
        "right_.fill(k, steps, col, cols, packed)",
        "right_.fill(k, steps, 0, cols, packed)",
    ),
    "shared_panels_all_in_the_first_ones_place": (
        "cpu/right_factor.h",
        "panels + col * words_of<P>(right.depth())",
        "panels",
    ),
    "a_threads_last_part_left_out": (
        "cpu/parallel.h",
        "i < end; ++i",
        "i + 1 < end || i == begin; ++i",
    ),
    "first_row_of_tiles_for_all": (
        "cpu/product.h",
        "tile / across * tiling.rows, col",
        "0 * tiling.rows, col",
    ),
    "mask_forgotten_in_h": (
        "cpu/forward.cpp",
        "bits_of(call.low.keep), call.low.A",
        "Bits{}, call.low.A",
    ),
    "mask_forgotten_in_dA": (
        "cpu/layer_backward.h",
        "matrix<T>(call_.x), keep_,",
        "matrix<T>(call_.x), {},",
    ),
    "mask_forgotten_in_dx": (
        "cpu/layer_backward.h",
        "call_.low.scale, keep_}",
        "call_.low.scale}",
    ),
    "mask_of_dx_on_the_base_too": (
        "cpu/product.h",
        "if (keep.data != nullptr) blocks().storage<A>().keep(keep, {sum, rows, cols, ld, 1});",
        "if (legs[0].keep.data != nullptr)\n        blocks().storage<A>().keep("
        "legs[0].keep.from(row, 0), {sum, rows, cols, ld, 1});",
    ),
    "mask_with_its_bits_reversed": (
        "cpu/blocks_impl.h",
        "Lane{1} << i",
        "Lane{1} << (lanes - 1 - i)",
    ),
    "mask_of_a_tail_with_its_bits_reversed": (
        "cpu/blocks_impl.h",
        ">> j % 8 & 1",
        ">> (7 - j % 8) & 1",
    ),
    "mask_of_first_rows_in_h": (
        "cpu/low_rank.h",
        "Left<P>(left, keep_.from(row, 0))",
        "Left<P>(left, keep_)",
    ),
    "mask_of_first_steps_in_h": (
        "cpu/left_factor.h",
        "col_stride_}, keep_.from(row, k), scratch",
        "col_stride_}, keep_.from(row, 0), scratch",
    ),
    "mask_off_by_a_row_in_dA": (
        "cpu/right_factor.h",
        "keep_.from(k, col), panels",
        "keep_.from(k > 0 ? k - 1 : k, col), panels",
    ),
    "mask_of_first_panel_in_dA": (
        "cpu/right_factor.h",
        "keep.from(0, col), {panels",
        "keep, {panels",
    ),
    "mask_of_first_rows_in_dx": (
        "cpu/product.h",
        "keep = legs[i].keep.from(row, 0);",
        "keep = legs[i].keep;",
    ),
    "group_dx_of_the_first_weight_alone": (
        "cpu/backward.cpp",
        "for (const Backward<T, P>& layer : layers) layer.add_base_leg(&legs);",
        "layers[0].add_base_leg(&legs);",
    ),
    "group_dx_of_the_last_layer_alone": (
        "cpu/backward.cpp",
        "layers[i].dx(dx, i > 0)",
        "layers[i].dx(dx, false)",
    ),
    "group_dx_without_the_mask_of_the_second": (
        "cpu/product.h",
        "blocks().storage<A>().keep(keep, {apart.get(), rows, cols, cols, 1});",
        "",
    ),
    "group_panels_all_in_the_first_ones_place": (
        "cpu/product.h",
        "packed += words * round_up_to_panel<P>(width);",
        "",
    ),
    "group_h_of_the_first_for_all": (
        "cpu/forward.cpp",
        "hidden->columns(col, R)",
        "hidden->columns(0, R)",
    ),
    "group_h_split_by_the_first_rank": (
        "cpu/forward.cpp",
        "col += R;",
        "col += calls[0].R;",
    ),
    "group_A_over_one_another": (
        "cpu/forward.cpp",
        "to += columns ? call.R * K : call.R;",
        "",
    ),
    "tail_of_dots_forgotten": (
        "cpu/few_rows_impl.h",
        "if (p > 0 && p < depth)",
        "if (false)",
    ),
    "tail_of_dots_summed_twice": (
        "cpu/vectors.h",
        "kLanes<A> - count",
        "0",
    ),
    "dots_of_less_than_a_vector_forgotten": (
        "cpu/few_rows_impl.h",
        "if (p == 0)",
        "if (false)",
    ),
    "sum_of_half_the_lanes": (
        "cpu/vectors.h",
        "width = kVectorBytes / 32; width > 0",
        "width = 0; width > 0",
    ),
    "rows_combined_last_alone": (
        "cpu/few_rows_impl.h",
        "add ? read<V>(to) + sum[i] : sum[i]",
        "sum[i]",
    ),
    "dx_of_few_rows_without_low_rank_part": (
        "cpu/layer_backward.h",
        "cols, !masked);",
        "cols, false);",
    ),
    "carried_part_without_scale": (
        "cpu/product.h",
        "sums_.get(), words_, scale, nullptr, false",
        "sums_.get(), words_, 1, nullptr, false",
    ),
    "carried_part_at_every_block": (
        "cpu/product.h",
        "k + leg_.step < depth ? Along<P>{} : along",
        "along",
    ),
    "carried_part_of_the_first_rows": (
        "cpu/product.h",
        "low_.left.block(row, 0, rows",
        "low_.left.block(0, 0, rows",
    ),
    "edge_columns_not_summed": (
        "cpu/multiply_impl.h",
        "scale * sum + start;",
        "scale * sum;",
    ),
    "halves_of_a_byte_swapped": (
        "cpu/codes_impl.h",
        "_mm256_set_epi32(24, 28, 16, 20, 8, 12, 0, 4)",
        "_mm256_set_epi32(28, 24, 20, 16, 12, 8, 4, 0)",
    ),
    "halves_of_a_last_byte_swapped": (
        "cpu/codes_impl.h",
        "code = at % 2 == 0 ?",
        "code = at % 2 != 0 ?",
    ),
    "upper_eight_values_lost": (
        "cpu/codes_impl.h",
        "(__m256)(code << 28)",
        "__m256{}",
    ),
    "block_off_by_one": (
        "cpu/codes_impl.h",
        "after = (block + 1) << codes.block_bits;",
        "after = ((block + 1) << codes.block_bits) + 1;",
    ),
    "scale_of_the_neighbour_block": (
        "cpu/codes_impl.h",
        "scale = codes.scale[block];",
        "scale = codes.scale[block > 0 ? block - 1 : block];",
    ),
    "scale_of_the_neighbour_block_in_dots": (
        "cpu/dot_codes_impl.h",
        "codes.scale[scale]",
        "codes.scale[scale > 0 ? scale - 1 : scale]",
    ),
    "blocks_of_each_row_its_own": (
        "cpu/codes_impl.h",
        "decode_nibbles<T>(codes, at, region.cols, dst);",
        "decode_nibbles<T>(codes, region.col + row * (codes.width / 2 * 2), region.cols, dst);",
    ),
    "codes_of_first_columns": (
        "cpu/right_factor.h",
        "part.first_col_ += col;",
        "",
    ),
    "codes_of_first_steps": (
        "cpu/right_factor.h",
        "{part.col + j, part.row, n, part.rows}",
        "{part.col + j, 0, n, part.rows}",
    ),
    "last_columns_of_dots_alone": (
        "cpu/dot_codes_impl.h",
        "{out + i * ld, ld, 1, k > 0}",
        "{out + i * ld, ld, 1, false}",
    ),
    "codes_of_fp4_for_nf4": (
        "cpu/codes.cpp",
        "Format::kNf4 ? kNf4Values",
        "Format::kInt8 ? kNf4Values",
    ),
    "mask_forgotten_in_dx_of_few_rows": (
        "cpu/layer_backward.h",
        "blocks().storage<A>().keep(keep_.from(0, col), {apart.get(), M, cols, cols, 1});",
        "",
    ),
    "masked_low_rank_part_forgotten_in_dx_of_few_rows": (
        "cpu/layer_backward.h",
        "if (masked) {  // by itself",
        "if (false) {  // by itself",
    ),
    "combined_codes_of_first_columns": (
        "cpu/combine_codes_impl.h",
        "codes.width + col + k",
        "codes.width + k",
    ),
    "combined_codes_of_first_rows": (
        "cpu/combine_codes_impl.h",
        "codes, p, col, cols,",
        "codes, 0, col, cols,",
    ),
    "activation_of_another_name": (
        "cpu/act.cpp",
        "static_cast<Act>(i)",
        "static_cast<Act>(i / 2 * 2)",
    ),
    "activations_rows_of_the_first_thread_for_all": (
        "cpu/act.cpp",
        "cpu::matrix<T>(operand).block(row, 0",
        "cpu::matrix<T>(operand).block(0, 0",
    ),
    "up_forgotten_in_the_gates_gradient": (
        "cpu/act_impl.h",
        "dy * widen(u + j) * derivative",
        "dy * derivative",
    ),
    "transposed_by_one_round_less": (
        "cpu/vectors.h",
        "round = 1; round < kRows",
        "round = 2; round < kRows",
    ),
}


def build_libraries(folder: Path) -> None:
    """Build folder/switched.so, with a switch for each mutant, and the lowered kernels'."""
    sources = folder / "switched/csrc"
    shutil.copytree(ROOT / "csrc", sources)
    switch_all(sources, MUTANTS.values())
    lowered = lowered_avx512(folder / LOWERED)
    others = {source: lowered for source in ("cpu/isa", "cpu/route", "cpu/blocks_avx512")}
    build(folder, sources, LOWERED, others)


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


def print_verdict(folder: str, name: str) -> None:
    lowered = name == LOWERED
    os.environ["LORA_EXT_CPU_ISA"] = "avx512" if lowered else "avx2"
    os.environ["LORA_EXT_FAULT"] = str(["", *MUTANTS].index(name) if name in MUTANTS else 0)
    torch.ops.load_library(f"{folder}/{LOWERED if lowered else 'switched'}.so")
    cases = [*CPP_CASES, *AVX512_CASES] if lowered else CPP_CASES
    why = why_refused(cases)
    print("accepted" if why is None else f"refused: {' '.join(why.split())}", flush=True)


def why_refused(cases: list[Case] = CPP_CASES) -> str | None:
    """Return why the checks refuse the C++ kernels that are loaded; None if they do not."""
    linear = linear_of("cpp")
    why = refused(linear, cases) or refused_group("cpp") or refused_acts(cpp)
    torch.set_num_threads(MANY_THREADS)
    return (
        why
        or refused(linear, CASES_OF_MANY)
        or refused_group("cpp", names=["panels_for_all_threads"])
    )


if __name__ == "__main__":
    # An operator takes one kernel a process: each name gets a fork of this one, with what PyTorch
    # would import at the first gradient, 2 s, already there.
    import torch.fx.experimental.symbolic_shapes

    sys.modules["lora_ext._C"] = types.ModuleType("lora_ext._C")
    for name in sys.argv[2:]:
        process = get_context("fork").Process(target=print_verdict, args=[sys.argv[1], name])
        process.start()
        process.join()
        if process.exitcode != 0:
            print(f"ended by {process.exitcode}", flush=True)
