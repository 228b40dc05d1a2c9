// Pairs made of a matrix (PairLoadOps in blocks.h). Part of blocks_impl.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/blocks.h"
#include "cpu/vectors.h"

namespace lora_ext::cpu {
namespace {

constexpr int64_t kPairLanes = kLanes<Pair>;  // pairs in a vector

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
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (stride == 1) {
      std::memcpy(to, src, static_cast<size_t>(cols) * sizeof(BFloat16));
      k = cols;
    }
  } else if (stride == 1) {
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

// Row 2 * p + 1 of a matrix, or null past its last.
template <typename T>
inline const T* odd_row(View<const T> src, int64_t p) {
  const T* even = src.data + 2 * p * src.row_stride;
  return 2 * p + 1 < src.rows ? even + src.row_stride : nullptr;
}

// One row of pairs of some columns from row 2 * p of a matrix on.
template <typename T>
inline void pair_rows(View<const T> src, int64_t p, int64_t col, int64_t cols, Pair* dst) {
  const int64_t at = col * src.col_stride;
  const T* odd = odd_row(src, p);
  pair_up(src.data + 2 * p * src.row_stride + at, odd != nullptr ? odd + at : odd, src.col_stride,
          cols, dst);
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

// Whole vectors of two rows of bfloat16 as pairs, the words of two vectors:
// to[0] and to[1]. Without `odd` 0 takes its place.
inline void pair_vectors(const BFloat16* even, const BFloat16* odd, Pair* const (&to)[2]) {
  typedef uint16_t Elements __attribute__((vector_size(kVectorBytes)));
  const Elements a = read<Elements>(even), b = odd != nullptr ? read<Elements>(odd) : Elements{};
  // Interleaved within each 16 bytes: the words of its first 4 columns, of its last 4.
  const UintVector first = (UintVector)interleave<false, 1, 8>(a, b);
  const UintVector second = (UintVector)interleave<true, 1, 8>(a, b);
  if constexpr (kPairLanes > 4) {
    write(to[0], interleave<false, 4, kPairLanes>(first, second));
    write(to[1], interleave<true, 4, kPairLanes>(first, second));
  } else {
    write(to[0], first);
    write(to[1], second);
  }
}

template <typename T>
void pack_pairs(View<const T> src, Pair* dst) {
  constexpr int64_t panel = kPanel<Pair>, step = 2 * kPairLanes;
  const int64_t pairs = pairs_of(src.rows), panel_size = pairs * panel;
  if (src.col_stride != 1 && src.row_stride == 1) {
    for (int64_t j = 0; j < src.cols; j += panel, dst += panel_size) {
      const int64_t cols = src.cols - j < panel ? src.cols - j : panel;
      pack_pairs_transposed(src.block(0, j, src.rows, cols), dst);
    }
    return;
  }
  // The word of a row's column j.
  const auto word = [&](int64_t p, int64_t j) {
    return dst + j / panel * panel_size + p * panel + j % panel;
  };
  for (int64_t p = 0; p < pairs; ++p) {
    int64_t j = 0;
    if constexpr (std::is_same_v<T, BFloat16>) {
      const T *even = src.data + 2 * p * src.row_stride, *odd = odd_row(src, p);
      for (; src.col_stride == 1 && j + step <= src.cols; j += step) {
        pair_vectors(even + j, odd != nullptr ? odd + j : odd,
                     {word(p, j), word(p, j + kPairLanes)});
      }
      j = j / panel * panel;
    }
    for (; j < src.cols; j += panel) {
      const int64_t cols = src.cols - j < panel ? src.cols - j : panel;
      pair_rows(src, p, j, cols, word(p, j));
      for (int64_t pad = cols; pad < panel; ++pad) *word(p, j + pad) = Pair{};
    }
  }
}

template <typename T>
constexpr PairLoadOps<T> kPairLoadOps = {&load_pairs<T>, &load_pairs_transposed<T>, &pack_pairs<T>};

}  // namespace
}  // namespace lora_ext::cpu
