// The block operation combine_codes (see blocks.h): sums of a weight's rows of codes, each read
// in place. Part of blocks_impl.h.
#pragma once

#include <cstdint>

#include "cpu/blocks.h"
#include "cpu/codes_impl.h"

namespace lora_ext::cpu {
namespace {

// out (kLeft rows) = or += left (kLeft, kDepth) @ kDepth rows of codes from `row` on, some columns
// that are whole blocks.
template <typename Code, int kLeft, int kDepth>
void combine_codes_tile(View<const float> left, const Codes& codes, int64_t row, int64_t col,
                        int64_t cols, float* out, int64_t ld, bool add) {
  constexpr int64_t lanes = kLanes<float>;
  const int64_t block = Code::kHasBlocks ? int64_t{1} << codes.block_bits : cols;
  FloatVector factor[kLeft][kDepth];
#pragma GCC unroll 8
  for (int i = 0; i < kLeft; ++i) {
#pragma GCC unroll 8
    for (int p = 0; p < kDepth; ++p) {
      factor[i][p] = FloatVector{} + left.data[i * left.row_stride + p * left.col_stride];
    }
  }
  for (int64_t k = 0; k < cols; k += block) {
    Code values[kDepth];
    const uint8_t* at[kDepth];
#pragma GCC unroll 8
    for (int p = 0; p < kDepth; ++p) {
      const int64_t element = (row + p) * codes.width + col + k;
      const int64_t scale = Code::kHasBlocks ? element >> codes.block_bits : row + p;
      values[p] = Code(codes.values, codes.scale[scale]);
      at[p] = Code::address(codes, element);
    }
    for (int64_t j = 0; j < block; j += lanes) {
      FloatVector sum[kLeft] = {};
#pragma GCC unroll 8
      for (int p = 0; p < kDepth; ++p) {
        const FloatVector v = values[p].reordered_at(at[p] + Code::bytes_of(j));
#pragma GCC unroll 8
        for (int i = 0; i < kLeft; ++i) sum[i] += factor[i][p] * v;
      }
#pragma GCC unroll 8
      for (int i = 0; i < kLeft; ++i) {
        float* to = out + i * ld + k + j;
        const FloatVector ordered = Code::restored(sum[i]);
        write(to, add ? read<FloatVector>(to) + ordered : ordered);
      }
    }
  }
}

template <typename Code, int kLeft, int kDepth>
void combine_codes_from(int64_t p, View<const float> left, const Codes& codes, int64_t col,
                        int64_t cols, float* out, int64_t ld) {
  for (; p + kDepth <= left.cols; p += kDepth) {
    combine_codes_tile<Code, kLeft, kDepth>(left.block(0, p, kLeft, kDepth), codes, p, col, cols,
                                            out, ld, p > 0);
  }
  if constexpr (kDepth > 1) {
    combine_codes_from<Code, kLeft, kDepth / 2>(p, left, codes, col, cols, out, ld);
  }
}

// Up to kLeft rows. The tables of a tile's codes, its factors and its sums fill 32 registers, or
// of AVX2, where a table takes two, 16.
template <typename Code, int kLeft>
void combine_codes_of(View<const float> left, const Codes& codes, int64_t col, int64_t cols,
                      float* out, int64_t ld) {
  constexpr int kWide = kLeft == 1 ? 8 : kLeft <= 4 ? 4 : 2, kNarrow = kLeft <= 2 ? 2 : 1;
  constexpr int kDepth = kVectorBytes == 64 ? kWide : kNarrow;
  if (left.rows == kLeft) {
    combine_codes_from<Code, kLeft, kDepth>(0, left, codes, col, cols, out, ld);
  } else if constexpr (kLeft > 1) {
    combine_codes_of<Code, kLeft - 1>(left, codes, col, cols, out, ld);
  }
}

template <typename T>
void combine_codes(View<const float> left, const Codes& codes, int64_t col, int64_t cols,
                   float* out, int64_t ld) {
  constexpr int64_t most = kVectorBytes == 64 ? 8 : 4;
  const int64_t tiles = (left.rows + most - 1) / most;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t i = left.rows * tile / tiles, rows = left.rows * (tile + 1) / tiles - i;
    const View<const float> some = left.block(i, 0, rows, left.cols);
    for (int64_t row = i; left.cols == 0 && row < i + rows; ++row) {
      for (int64_t j = 0; j < cols; ++j) out[row * ld + j] = 0;
    }
    if (codes.values != nullptr) {
      combine_codes_of<Nibbles<T>, most>(some, codes, col, cols, out + i * ld, ld);
    } else {
      combine_codes_of<Bytes<T>, most>(some, codes, col, cols, out + i * ld, ld);
    }
  }
}

}  // namespace
}  // namespace lora_ext::cpu
