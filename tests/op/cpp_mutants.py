"""Wrong C++ kernels: csrc with one line changed, for test_mutants_cpp.py to refuse."""

# file: {name: (a piece that it has once, what that becomes)}
BY_FILE = {
    "cpu/forward.cpp": {
        "scale_dropped_in_y": ("B.right(), call_.low.scale}", "B.right(), 1}"),
        "mask_forgotten_in_h": ("bits_of(call.low.keep), call.low.A", "Bits{}, call.low.A"),
        "group_h_of_the_first_for_all": ("hidden->columns(col, R)", "hidden->columns(0, R)"),
        "group_h_split_by_the_first_rank": ("col += R;", "col += calls[0].R;"),
        "group_A_over_one_another": ("to += columns ? call.R * K : call.R;", ""),
    },
    "cpu/layer_backward.h": {
        "scale_dropped_in_few_rows_dx": ("static_cast<A>(call_.low.scale)", "A(1)"),
        "scale_dropped_in_dx": (
            "A_t_->right(), call_.low.scale, keep_}",
            "A_t_->right(), 1, keep_}",
        ),
        "scale_dropped_in_dA": (
            "keep_, call_.low.scale, view.transposed()",
            "keep_, 1, view.transposed()",
        ),
        "one_percent_in_dB": ("{}, call_.low.scale, view", "{}, 1.01 * call_.low.scale, view"),
        "dx_without_low_rank_part": (
            "wide_product<T, P>(legs, Out<T>{to, nullptr, add})",
            "wide_product<T, P>({&legs.back(), 1}, Out<T>{to, nullptr, add})",
        ),
        "mask_forgotten_in_dA": ("matrix<T>(call_.x), keep_,", "matrix<T>(call_.x), {},"),
        "mask_forgotten_in_dx": ("call_.low.scale, keep_}", "call_.low.scale}"),
        "dx_of_few_rows_without_low_rank_part": ("cols, !masked);", "cols, false);"),
        "mask_forgotten_in_dx_of_few_rows": (
            "blocks().storage<A>().keep(keep_.from(0, col), {apart.get(), M, cols, cols, 1});",
            "",
        ),
        "masked_low_rank_part_forgotten_in_dx_of_few_rows": (
            "if (masked) {  // by itself",
            "if (false) {  // by itself",
        ),
    },
    "cpu/low_rank.h": {
        "h_scaled": (
            "made.data, made.row_stride, 1, nullptr",
            "made.data, made.row_stride, 1.5, nullptr",
        ),
        "mask_of_first_rows_in_h": ("Left<P>(left, keep_.from(row, 0))", "Left<P>(left, keep_)"),
    },
    "cpu/product.h": {
        "bias_of_first_columns": ("bias == nullptr ? bias : bias + col", "bias"),
        "last_block_of_the_sums_alone": (
            "ahead = {};\n        }\n      }\n      addend = {sum, ld};",
            "ahead = {};\n        }\n      }\n      addend = {};",
        ),
        "last_leg_alone": (
            "      addend = {sum, ld};\n    }\n    if (!in_place)",
            "      addend = {};\n    }\n    if (!in_place)",
        ),
        "second_block_forgotten": (
            "k == 0 || k < depth; k += step_",
            "k == 0 || k < depth; k += step_ + (k > 0 ? 0 : step_)",
        ),
        "bias_lost_after_the_first_block": (
            "if (out.bias != nullptr) addend = {out.bias, 0};",
            "if (out.bias != nullptr && row > 0) addend = {out.bias, 0};",
        ),
        "base_product_forgotten_where_it_is_added_to": ("if (out.add) addend = {sum, ld};", ""),
        "first_block_of_the_weight_for_all": ("if (k >= rows_packed_)", "if (rows_packed_ == 0)"),
        "first_tile_of_rows_for_all": (
            "cursors[i]->add_to(row, rows, sum",
            "cursors[i]->add_to(0, rows, sum",
        ),
        "first_columns_of_a_large_weight_for_all": (
            "right_.fill(k, steps, col, cols, packed)",
            "right_.fill(k, steps, 0, cols, packed)",
        ),
        "first_row_of_tiles_for_all": ("tile / across * tiling.rows, col", "0 * tiling.rows, col"),
        "mask_of_dx_on_the_base_too": (
            "if (keep.data != nullptr) blocks().storage<A>().keep(keep, {sum, rows, cols, ld, 1});",
            "if (legs[0].keep.data != nullptr)\n        blocks().storage<A>().keep("
            "legs[0].keep.from(row, 0), {sum, rows, cols, ld, 1});",
        ),
        "mask_of_first_rows_in_dx": ("keep = legs[i].keep.from(row, 0);", "keep = legs[i].keep;"),
        "group_dx_without_the_mask_of_the_second": (
            "blocks().storage<A>().keep(keep, {apart.get(), rows, cols, cols, 1});",
            "",
        ),
        "group_panels_all_in_the_first_ones_place": (
            "packed += words * round_up_to_panel<P>(width);",
            "",
        ),
        "carried_part_without_scale": (
            "sums_.get(), words_, scale, nullptr, false",
            "sums_.get(), words_, 1, nullptr, false",
        ),
        "carried_part_at_every_block": ("k + step_ < depth ? Along<P>{} : along", "along"),
        "carried_part_of_the_first_rows": (
            "low_.left.block(row, 0, rows",
            "low_.left.block(0, 0, rows",
        ),
    },
    "cpu/right_factor.h": {
        "B_of_first_columns": ("if (is_ready_) part.ready_ = ready_.from(0, col);", ""),
        "first_columns_for_all_threads": ("part.data_ += col * col_stride_ * element_;", ""),
        "shared_panels_all_in_the_first_ones_place": (
            "panels + col * words_of<P>(right.depth())",
            "panels",
        ),
        "mask_off_by_a_row_in_dA": (
            "keep_.from(k, col), panels",
            "keep_.from(k > 0 ? k - 1 : k, col), panels",
        ),
        "mask_of_first_panel_in_dA": ("keep.from(0, col), {panels", "keep, {panels"),
        "codes_of_first_columns": ("part.first_col_ += col;", ""),
        "codes_of_first_steps": (
            "{part.col + j, part.row, n, part.rows}",
            "{part.col + j, 0, n, part.rows}",
        ),
    },
    "cpu/left_factor.h": {
        "first_rows_for_all_threads": ("part.data_ += row * row_stride_ * element_;", ""),
        "mask_of_first_steps_in_h": (
            "col_stride_}, keep_.from(row, k), scratch",
            "col_stride_}, keep_.from(row, 0), scratch",
        ),
    },
    "cpu/parallel.h": {
        "a_threads_last_part_left_out": ("i < end; ++i", "i + 1 < end || i == begin; ++i"),
    },
    "cpu/blocks_impl.h": {
        "mask_with_its_bits_reversed": ("Lane{1} << i", "Lane{1} << (lanes - 1 - i)"),
        "mask_of_a_tail_with_its_bits_reversed": (">> j % 8 & 1", ">> (7 - j % 8) & 1"),
    },
    "cpu/backward.cpp": {
        "group_dx_of_the_first_weight_alone": (
            "for (const Backward<T, P>& layer : layers) layer.add_base_leg(&legs);",
            "layers[0].add_base_leg(&legs);",
        ),
        "group_dx_of_the_last_layer_alone": ("layers[i].dx(dx, i > 0)", "layers[i].dx(dx, false)"),
    },
    "cpu/few_rows_impl.h": {
        "tail_of_dots_forgotten": ("if (p > 0 && p < depth)", "if (false)"),
        "dots_of_less_than_a_vector_forgotten": ("if (p == 0)", "if (false)"),
        "rows_combined_last_alone": ("add ? read<V>(to) + sum[i] : sum[i]", "sum[i]"),
    },
    "cpu/vectors.h": {
        "tail_of_dots_summed_twice": ("kLanes<A> - count", "0"),
        "sum_of_half_the_lanes": ("width = kVectorBytes / 32; width > 0", "width = 0; width > 0"),
        "transposed_by_one_round_less": ("round = 1; round < kRows", "round = 2; round < kRows"),
    },
    "cpu/multiply_impl.h": {
        "edge_columns_not_summed": ("scale * sum + start;", "scale * sum;"),
    },
    "cpu/codes_impl.h": {
        "halves_of_a_byte_swapped": (
            "_mm256_set_epi32(24, 28, 16, 20, 8, 12, 0, 4)",
            "_mm256_set_epi32(28, 24, 20, 16, 12, 8, 4, 0)",
        ),
        "halves_of_a_last_byte_swapped": ("code = at % 2 == 0 ?", "code = at % 2 != 0 ?"),
        "upper_eight_values_lost": ("(__m256)(code << 28)", "__m256{}"),
        "block_off_by_one": (
            "after = (block + 1) << codes.block_bits;",
            "after = ((block + 1) << codes.block_bits) + 1;",
        ),
        "scale_of_the_neighbour_block": (
            "scale = codes.scale[block];",
            "scale = codes.scale[block > 0 ? block - 1 : block];",
        ),
        "blocks_of_each_row_its_own": (
            "decode_nibbles<T>(codes, at, region.cols, dst);",
            "decode_nibbles<T>(codes, region.col + row * (codes.width / 2 * 2), region.cols, dst);",
        ),
    },
    "cpu/dot_codes_impl.h": {
        "scale_of_the_neighbour_block_in_dots": (
            "codes.scale[scale]",
            "codes.scale[scale > 0 ? scale - 1 : scale]",
        ),
        "last_columns_of_dots_alone": (
            "{out + i * ld, ld, 1, k > 0}",
            "{out + i * ld, ld, 1, false}",
        ),
    },
    "cpu/codes.cpp": {
        "codes_of_fp4_for_nf4": ("Format::kNf4 ? kNf4Values", "Format::kInt8 ? kNf4Values"),
    },
    "cpu/combine_codes_impl.h": {
        "combined_codes_of_first_columns": ("codes.width + col + k", "codes.width + k"),
        "combined_codes_of_first_rows": ("codes, p, col, cols,", "codes, 0, col, cols,"),
    },
    "cpu/act.cpp": {
        "activation_of_another_name": ("static_cast<Act>(i)", "static_cast<Act>(i / 2 * 2)"),
        "activations_rows_of_the_first_thread_for_all": (
            "cpu::matrix<T>(operand).block(row, 0",
            "cpu::matrix<T>(operand).block(0, 0",
        ),
    },
    "cpu/act_impl.h": {
        "up_forgotten_in_the_gates_gradient": ("dy * widen(u + j) * derivative", "dy * derivative"),
    },
    "cpu/dora_dropped.cpp": {
        "dora_rows_of_another_block": ("x.block(row + i, 0, 1, K)", "x.block(i, 0, 1, K)"),
        "dora_low_rank_part_whole": ("static_cast<A>(p * scale)", "static_cast<A>(scale)"),
        "dora_kept_for_dropped": ("uint64_t dropped = ~kept", "uint64_t dropped = kept"),
        "dora_bias_of_first_columns": ("bias.block(0, n,", "bias.block(0, 0,"),
    },
    "cpu/dora_impl.h": {
        "dora_dx_of_the_last_columns_alone": (
            "few.values[i + k] += sums[k]",
            "few.values[i + k] = sums[k]",
        ),
    },
}
# name: (file, the piece, what it becomes)
MUTANTS = {
    name: (file, *change) for file, changes in BY_FILE.items() for name, change in changes.items()
}
