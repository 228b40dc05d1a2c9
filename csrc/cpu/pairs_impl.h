// The operations on bfloat16 by pairs (PairOps in blocks.h). Part of blocks_impl.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/blocks.h"
#include "cpu/few_rows_impl.h"
#include "cpu/multiply_impl.h"
#include "cpu/vectors.h"

namespace lora_ext::cpu {
namespace {

constexpr int64_t kPairLanes = kLanes<Pair>;  // pairs in a vector

// ---- load and pack ----

// The bits of some bfloat16 numbers, or of float ones rounded to it, in the lower half of each
// lane.
inline UintVector bits_of(const BFloat16* from) {
  return __builtin_convertvector(read<ShortVector>(from), UintVector);
}
inline UintVector bits_of(const float* from) { return round_to_bfloat16(read<FloatVector>(from)); }

inline uint32_t bits_of_one(const BFloat16* from) { return from->bits; }
inline uint32_t bits_of_one(const float* from) {
  return round_to_bfloat16(FloatVector{} + *from)[0];
}

// dst[j] = the pair (even[j], odd[j]) for `cols` columns; without `odd` 0 takes its place.
template <typename T>
inline void pair_up(const T* even, const T* odd, int64_t stride, int64_t cols, Pair* dst) {
  int64_t j = 0;
  if (stride == 1) {
    for (; j + kPairLanes <= cols; j += kPairLanes) {
      const UintVector high = odd != nullptr ? bits_of(odd + j) << 16 : UintVector{};
      write(dst + j, bits_of(even + j) | high);
    }
  }
  for (; j < cols; ++j) {
    const uint32_t high = odd != nullptr ? bits_of_one(odd + j * stride) << 16 : 0;
    write(dst + j, bits_of_one(even + j * stride) | high);
  }
}

// The pairs of a row whose elements are `stride` apart.
template <typename T>
inline void pair_row(const T* src, int64_t stride, int64_t cols, Pair* dst) {
  BFloat16* to = &dst->even;
  int64_t k = 0;
  if (stride == 1) {
    for (; k + kPairLanes <= cols; k += kPairLanes) {
      write(to + k, __builtin_convertvector(bits_of(src + k), ShortVector));
    }
  }
  for (; k < cols; ++k) to[k].bits = static_cast<uint16_t>(bits_of_one(src + k * stride));
  if (cols % 2 != 0) to[cols].bits = 0;
}

template <typename T>
void load_pairs(View<const T> src, Pair* dst, int64_t ld) {
  for (int64_t i = 0; i < src.rows; ++i) {
    pair_row(src.data + i * src.row_stride, src.col_stride, src.cols, dst + i * ld);
  }
}

// One row of pairs of some columns from row 2 * p of a matrix on.
template <typename T>
inline void pair_rows(View<const T> src, int64_t p, int64_t col, int64_t cols, Pair* dst) {
  const T* even = src.data + 2 * p * src.row_stride + col * src.col_stride;
  const T* odd = 2 * p + 1 < src.rows ? even + src.row_stride : nullptr;
  pair_up(even, odd, src.col_stride, cols, dst);
}

template <typename T>
void load_pairs_transposed(View<const T> src, Pair* dst, int64_t ld) {
  const View<const T> turned = src.transposed();
  for (int64_t p = 0; p < pairs_of(turned.rows); ++p) {
    pair_rows(turned, p, 0, turned.cols, dst + p * ld);
  }
}

// The pairs of some neighbours in memory.
inline FloatVector words_of(const BFloat16* from) { return read<FloatVector>(from); }
inline FloatVector words_of(const float* from) {
  BFloat16 rounded[2 * kPairLanes];
  narrow(read<FloatVector>(from), rounded);
  narrow(read<FloatVector>(from + kPairLanes), rounded + kPairLanes);
  return read<FloatVector>(rounded);
}

// One panel of a matrix whose columns are dense, of up to 16 columns: their pairs are words, which
// are transposed as floats are.
template <typename T>
void pack_pairs_transposed(View<const T> src, Pair* dst) {
  constexpr int64_t lanes = kPairLanes, panel = kPanel<Pair>;
  const int64_t whole = src.rows / (2 * panel) * panel;
  for (int64_t line = 0; line < whole; line += panel) {
    for (int64_t j = 0; j < panel; j += lanes) {
      for (int64_t p = line; p < line + panel; p += lanes) {
        FloatVector square[lanes];
#pragma GCC unroll 16
        for (int64_t i = 0; i < lanes; ++i) {
          const T* from = src.data + 2 * p + (j + i) * src.col_stride;
          square[i] = j + i < src.cols ? words_of(from) : FloatVector{};
        }
        transpose<float>(square);
#pragma GCC unroll 16
        for (int64_t i = 0; i < lanes; ++i) write(dst + (p + i) * panel + j, square[i]);
      }
    }
  }
  for (int64_t p = whole; p < pairs_of(src.rows); ++p) {
    pair_rows(src, p, 0, src.cols, dst + p * panel);
    for (int64_t j = src.cols; j < panel; ++j) dst[p * panel + j] = Pair{};
  }
}

template <typename T>
void pack_pairs(View<const T> src, Pair* dst) {
  constexpr int64_t panel = kPanel<Pair>;
  const int64_t pairs = pairs_of(src.rows), panel_size = pairs * panel;
  if (src.col_stride != 1 && src.row_stride == 1) {
    for (int64_t j = 0; j < src.cols; j += panel, dst += panel_size) {
      const int64_t cols = src.cols - j < panel ? src.cols - j : panel;
      pack_pairs_transposed(src.block(0, j, src.rows, cols), dst);
    }
    return;
  }
  for (int64_t p = 0; p < pairs; ++p) {
    Pair* to = dst + p * panel;
    for (int64_t j = 0; j < src.cols; j += panel, to += panel_size) {
      const int64_t cols = src.cols - j < panel ? src.cols - j : panel;
      pair_rows(src, p, j, cols, to);
      for (int64_t pad = cols; pad < panel; ++pad) to[pad] = Pair{};
    }
  }
}

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

template <typename T>
constexpr PairLoadOps<T> kPairLoadOps = {&load_pairs<T>, &load_pairs_transposed<T>, &pack_pairs<T>};

constexpr PairOps kPairOps = {
    kPairLoadOps<BFloat16>, kPairLoadOps<float>, {&multiply<Pair>, kTilePanels},
    &update_by_pairs,       &dot_pairs,          &combine_pairs};

}  // namespace
}  // namespace lora_ext::cpu
