// The operations on bfloat16 by pairs (PairOps in blocks.h). Part of blocks_impl.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/blocks.h"
#include "cpu/few_rows_impl.h"
#include "cpu/load_pairs_impl.h"
#include "cpu/multiply_impl.h"
#include "cpu/vectors.h"

namespace lora_ext::cpu {
namespace {

// ---- products ----

void update_by_pairs(View<const Pair> a, Panels<const Pair> b, float scale, View<BFloat16> y) {
  multiply_to(a, b, y.cols, Along<Pair>{}, Ahead{},
              ToStorage<BFloat16>{y.data, y.row_stride, scale});
}

// ---- few rows ----

// The last elements of a vector of pairs and zeros before them: reading from `count` on.
struct LastElements {
  uint16_t kept[4 * kPairLanes] = {};
  constexpr LastElements() {
    for (int64_t i = 2 * kPairLanes; i < 4 * kPairLanes; ++i) kept[i] = 0xffff;
  }
};
constexpr LastElements kLastElements;

// Both factors of a dot product in place, as pairs.
struct Paired {
  using Left = BFloat16;
  using Right = BFloat16;
  using Sum = float;
  using V = UintVector;
  static constexpr int64_t kStep = 2 * kPairLanes;

  static V left(const BFloat16* from) { return read<V>(from); }
  static V right(const BFloat16* from) { return read<V>(from); }
  static V last(V v, int64_t count) { return v & read<V>(kLastElements.kept + count); }
  static FloatVector multiply_add(FloatVector acc, V a, V b) {
    return multiply_add_pairs(acc, a, b);
  }
  static float multiply_one(const BFloat16* a, const BFloat16* b) {
    return widen_one(a) * widen_one(b);
  }
};

void dot_pairs(View<const BFloat16> left, View<const BFloat16> right, float* out, int64_t ld,
               float scale, bool add) {
  dots<Paired>(left, right, {out, ld, scale, add});
}

// Columns `col` to `col` + 32 (with 64-byte vectors) of row `row`, and zeros past the last of both.
inline UintVector elements_of(View<const BFloat16> matrix, int64_t row, int64_t col) {
  constexpr int64_t step = 2 * kPairLanes;
  if (row >= matrix.rows) return UintVector{};
  const BFloat16* from = matrix.data + row * matrix.row_stride + col;
  if (col + step <= matrix.cols) return read<UintVector>(from);
  BFloat16 padded[step] = {};
  std::memcpy(padded, from, static_cast<size_t>(matrix.cols - col) * sizeof(BFloat16));
  return read<UintVector>(padded);
}

// out (kLeft rows) = or += left (kLeft, kDepth) @ kDepth pairs of the right factor's rows.
template <int kLeft, int kDepth>
inline void combine_pairs_tile(View<const Pair> left, View<const BFloat16> right, float* out,
                               int64_t ld, bool add) {
  typedef uint16_t Elements __attribute__((vector_size(kVectorBytes)));
  constexpr int64_t lanes = kLanes<float>, step = 2 * lanes;
  UintVector factor[kLeft][kDepth];
#pragma GCC unroll 8
  for (int i = 0; i < kLeft; ++i) {
#pragma GCC unroll 16
    for (int p = 0; p < kDepth; ++p) {
      factor[i][p] =
          UintVector{} + read<uint32_t>(left.data + i * left.row_stride + p * left.col_stride);
    }
  }
  for (int64_t j = 0; j < right.cols; j += step) {
    // Two rows interleaved within each 16 bytes: the pairs of its first 4 columns, of its last 4.
    FloatVector first[kLeft] = {}, second[kLeft] = {};
#pragma GCC unroll 16
    for (int p = 0; p < kDepth; ++p) {
      const Elements even = (Elements)elements_of(right, 2 * p, j);
      const Elements odd = (Elements)elements_of(right, 2 * p + 1, j);
      const UintVector low = (UintVector)interleave<false, 1, 8>(even, odd);
      const UintVector high = (UintVector)interleave<true, 1, 8>(even, odd);
#pragma GCC unroll 8
      for (int i = 0; i < kLeft; ++i) {
        first[i] = multiply_add_pairs(first[i], factor[i][p], low);
        second[i] = multiply_add_pairs(second[i], factor[i][p], high);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kLeft; ++i) {
      FloatVector sums[2] = {first[i], second[i]};
      if constexpr (lanes > 4) {
        sums[0] = interleave<false, 4, lanes>(first[i], second[i]);
        sums[1] = interleave<true, 4, lanes>(first[i], second[i]);
      }
      float* to = out + i * ld + j;
      if (j + step <= right.cols) {
        write(to, add ? read<FloatVector>(to) + sums[0] : sums[0]);
        write(to + lanes, add ? read<FloatVector>(to + lanes) + sums[1] : sums[1]);
      } else {
        for (int64_t at = 0; at < right.cols - j; ++at) {
          const float sum = sums[at / lanes][at % lanes];
          to[at] = add ? to[at] + sum : sum;
        }
      }
    }
  }
}

template <int kLeft, int kDepth>
void combine_pairs_from(int64_t p, View<const Pair> left, View<const BFloat16> right, float* out,
                        int64_t ld) {
  for (; p + kDepth <= left.cols; p += kDepth) {
    const int64_t rows = right.rows - 2 * p < 2 * kDepth ? right.rows - 2 * p : 2 * kDepth;
    combine_pairs_tile<kLeft, kDepth>(left.block(0, p, kLeft, kDepth),
                                      right.block(2 * p, 0, rows, right.cols), out, ld, p > 0);
  }
  if constexpr (kDepth > 1) combine_pairs_from<kLeft, kDepth / 2>(p, left, right, out, ld);
}

void combine_pairs(View<const Pair> left, View<const BFloat16> right, float* out, int64_t ld) {
  for (int64_t i = 0; i < left.rows; i += 4) {
    const int64_t rows = left.rows - i < 4 ? left.rows - i : 4;
    const View<const Pair> some = left.block(i, 0, rows, left.cols);
    float* to = out + i * ld;
    if (right.rows == 0) {
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t j = 0; j < right.cols; ++j) to[row * ld + j] = 0;
      }
    }
    if (rows == 1) combine_pairs_from<1, 8>(0, some, right, to, ld);
    if (rows == 2) combine_pairs_from<2, 6>(0, some, right, to, ld);
    if (rows == 3) combine_pairs_from<3, 4>(0, some, right, to, ld);
    if (rows == 4) combine_pairs_from<4, 3>(0, some, right, to, ld);
  }
}

constexpr PairOps kPairOps = {
    kPairLoadOps<BFloat16>, kPairLoadOps<float>, {&multiply<Pair>, kTilePanels},
    &update_by_pairs,       &dot_pairs,          &combine_pairs};

}  // namespace
}  // namespace lora_ext::cpu
