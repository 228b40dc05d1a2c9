// The block operations on a weight of codes (Codes in blocks.h), decode and dot_codes. Part of
// blocks_impl.h.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/blocks.h"
#include "cpu/few_rows_impl.h"
#include "cpu/vectors.h"

namespace lora_ext::cpu {
namespace {

// What is stored as T of a vector, as float again.
template <typename T>
inline FloatVector rounded(FloatVector v) {
  if constexpr (std::is_same_v<T, BFloat16>) return (FloatVector)(round_to_bfloat16(v) << 16);
  if constexpr (std::is_same_v<T, Float16>) {
    T narrowed[kLanes<float>];
    narrow(v, narrowed);
    return widen(narrowed);
  }
  return v;
}

// ---- 4 bits ----

// The codes of a vector of elements, an even number of them, each in the lower 4 bits of its lane;
// what is above is anything.
inline UintVector codes_of(const uint8_t* from) {
#if LORA_EXT_VECTOR_BYTES == 64
  const __m512i shifts = _mm512_set_epi32(24, 28, 16, 20, 8, 12, 0, 4, 24, 28, 16, 20, 8, 12, 0, 4);
  const __m512i word = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
  const __m512i words = _mm512_castsi128_si512(_mm_cvtsi64_si128(read<int64_t>(from)));
  return (UintVector)_mm512_srlv_epi32(_mm512_permutexvar_epi32(word, words), shifts);
#elif LORA_EXT_VECTOR_BYTES == 32
  const __m256i shifts = _mm256_set_epi32(24, 28, 16, 20, 8, 12, 0, 4);
  return (UintVector)_mm256_srlv_epi32(_mm256_set1_epi32(read<int32_t>(from)), shifts);
#else
  UintVector codes;
  for (int64_t i = 0; i < kLanes<float>; ++i) codes[i] = from[i / 2] >> (i % 2 == 0 ? 4 : 0);
  return codes;
#endif
}

// What the 16 codes of a block stand for: scaled and rounded once a block, and then looked up.
template <typename T>
class Nibbles {
 public:
  static constexpr bool kHasBlocks = true;

  Nibbles() = default;
  Nibbles(const float* values, float scale) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < kCount; ++i) {
      table_[i] = rounded<T>(scale * read<FloatVector>(values + i * kLanes<float>));
    }
  }

  static const uint8_t* address(const Codes& codes, int64_t element) {
    return codes.data + element / 2;
  }
  static constexpr int64_t bytes_of(int64_t elements) { return elements / 2; }

  // Of a vector of codes.
  FloatVector at(const uint8_t* from) const { return of(codes_of(from)); }

  // The same in another order of the lanes, which costs an instruction less: a sum of products has
  // none, and the other factor is put in this order once.
  FloatVector reordered_at(const uint8_t* from) const {
#if LORA_EXT_VECTOR_BYTES == 64
    const __m512i shifts = _mm512_set_epi64(24, 28, 16, 20, 8, 12, 0, 4);
    return of((UintVector)_mm512_srlv_epi64(_mm512_set1_epi64(read<int64_t>(from)), shifts));
#else
    return at(from);
#endif
  }
  static FloatVector reordered(FloatVector v) {
#if LORA_EXT_VECTOR_BYTES == 64
    const __m512i order = _mm512_set_epi32(15, 7, 14, 6, 13, 5, 12, 4, 11, 3, 10, 2, 9, 1, 8, 0);
    return _mm512_permutexvar_ps(order, v);
#else
    return v;
#endif
  }
  // Back in order.
  static FloatVector restored(FloatVector v) {
#if LORA_EXT_VECTOR_BYTES == 64
    const __m512i order = _mm512_set_epi32(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0);
    return _mm512_permutexvar_ps(order, v);
#else
    return v;
#endif
  }

 private:
  FloatVector of(UintVector code) const {
#if LORA_EXT_VECTOR_BYTES == 64
    return _mm512_permutexvar_ps((__m512i)code, table_[0]);
#elif LORA_EXT_VECTOR_BYTES == 32
    const __m256 low = _mm256_permutevar8x32_ps(table_[0], (__m256i)code);
    const __m256 high = _mm256_permutevar8x32_ps(table_[1], (__m256i)code);
    return _mm256_blendv_ps(low, high, (__m256)(code << 28));
#else
    FloatVector v;
    for (int64_t i = 0; i < kLanes<float>; ++i) {
      const uint32_t c = code[i] & 15;
      v[i] = table_[c / kLanes<float>][c % kLanes<float>];
    }
    return v;
#endif
  }

  static constexpr int64_t kCount = 16 / kLanes<float>;
  FloatVector table_[kCount];
};

// Elements from `at` on, `count` of them, whatever block, byte or half of it they begin in.
template <typename T>
void decode_nibbles(const Codes& codes, int64_t at, int64_t count, float* dst) {
  constexpr int64_t lanes = kLanes<float>;
  for (const int64_t end = at + count; at < end;) {
    const int64_t block = at >> codes.block_bits, after = (block + 1) << codes.block_bits;
    const int64_t stop = after < end ? after : end;
    const float scale = codes.scale[block];
    const auto one = [&] {
      const uint32_t byte = codes.data[at / 2], code = at % 2 == 0 ? byte >> 4 : byte & 15;
      *dst++ = rounded<T>(FloatVector{} + scale * codes.values[code])[0];
      ++at;
    };
    if (at % 2 != 0) one();
    const Nibbles<T> nibbles(codes.values, scale);
    for (; at + lanes <= stop; at += lanes, dst += lanes)
      write(dst, nibbles.at(codes.data + at / 2));
    while (at < stop) one();
  }
}

// ---- bytes ----

inline FloatVector floats_of(const uint8_t* from) {
#if LORA_EXT_VECTOR_BYTES == 64
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(read<__m128i>(from)));
#elif LORA_EXT_VECTOR_BYTES == 32
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#else
  FloatVector v;
  for (int64_t i = 0; i < kLanes<float>; ++i) v[i] = static_cast<int8_t>(from[i]);
  return v;
#endif
}

template <typename T>
class Bytes {
 public:
  static constexpr bool kHasBlocks = false;

  Bytes() = default;
  Bytes(const float*, float scale) : scale_(scale) {}

  static const uint8_t* address(const Codes& codes, int64_t element) {
    return codes.data + element;
  }
  static constexpr int64_t bytes_of(int64_t elements) { return elements; }

  FloatVector at(const uint8_t* from) const { return rounded<T>(scale_ * floats_of(from)); }
  FloatVector reordered_at(const uint8_t* from) const { return at(from); }
  static FloatVector reordered(FloatVector v) { return v; }
  static FloatVector restored(FloatVector v) { return v; }

 private:
  float scale_;
};

template <typename T>
void decode_bytes(const uint8_t* from, float scale, int64_t count, float* dst) {
  constexpr int64_t lanes = kLanes<float>;
  const Bytes<T> bytes(nullptr, scale);
  int64_t at = 0;
  for (; at + lanes <= count; at += lanes) write(dst + at, bytes.at(from + at));
  for (; at < count; ++at) {
    dst[at] = rounded<T>(FloatVector{} + scale * static_cast<int8_t>(from[at]))[0];
  }
}

template <typename T>
void decode(const Codes& codes, Region region, float* dst, int64_t ld) {
  for (int64_t i = 0; i < region.rows; ++i, dst += ld) {
    const int64_t row = region.row + i, at = row * codes.width + region.col;
    if (codes.values != nullptr) {
      decode_nibbles<T>(codes, at, region.cols, dst);
    } else {
      decode_bytes<T>(codes.data + at, codes.scale[row], region.cols, dst);
    }
  }
}

// ---- dot products ----

// kLeft rows, reordered, against columns [from, to) of kRows rows of codes, which are whole blocks.
// The codes go from memory to the sums: what they stand for is in registers alone.
template <typename Code, int kLeft, int kRows>
void dot_codes_tile(View<const float> left, const Codes& codes, int64_t row, int64_t from,
                    int64_t to, DotsTo<float> out) {
  constexpr int64_t lanes = kLanes<float>;
  constexpr int count = kLeft * kRows, near = kNear<float>;
  const int64_t block = Code::kHasBlocks ? int64_t{1} << codes.block_bits : to - from;
  FloatVector acc[kLeft][kRows] = {};
  for (int64_t k = from; k < to; k += block) {
    Code values[kRows];
    const uint8_t* at[kRows];
#pragma GCC unroll 4
    for (int j = 0; j < kRows; ++j) {
      const int64_t element = (row + j) * codes.width + k;
      const int64_t scale = Code::kHasBlocks ? element >> codes.block_bits : row + j;
      values[j] = Code(codes.values, codes.scale[scale]);
      at[j] = Code::address(codes, element);
    }
    const float* x = left.data + (k - from);
    for (int64_t i = 0; i < block; i += lanes, x += lanes) {
      FloatVector v[kRows];
#pragma GCC unroll 4
      for (int j = 0; j < kRows; ++j) v[j] = values[j].reordered_at(at[j] + Code::bytes_of(i));
#pragma GCC unroll 8
      for (int r = 0; r < kLeft; ++r) {
        const FloatVector factor = read<FloatVector>(x + r * left.row_stride);
#pragma GCC unroll 4
        for (int j = 0; j < kRows; ++j) acc[r][j] += factor * v[j];
      }
    }
  }
  float sums[(count + near - 1) / near * near];
#pragma GCC unroll 8
  for (int begin = 0; begin < count; begin += near) {
    FloatVector some[near];
#pragma GCC unroll 4
    for (int i = 0; i < near; ++i) {
      const int at = begin + i;
      some[i] = at < count ? acc[at / kRows][at % kRows] : FloatVector{};
    }
    sum_lanes<float>(some, sums + begin);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kLeft; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kRows; ++j) out.put(i, j, sums[i * kRows + j]);
  }
}

// kLeft rows, some columns, against all the rows of codes asked for.
template <typename Code, int kLeft, int kRows>
void dot_codes_rows(View<const float> left, const Codes& codes, int64_t row, int64_t rows,
                    int64_t from, int64_t to, DotsTo<float> out) {
  int64_t j = 0;
  for (; j + kRows <= rows; j += kRows) {
    dot_codes_tile<Code, kLeft, kRows>(left, codes, row + j, from, to, out.at(0, j));
  }
  if constexpr (kRows > 1) {
    if (j < rows) {
      dot_codes_rows<Code, kLeft, 1>(left, codes, row + j, rows - j, from, to, out.at(0, j));
    }
  }
}

// The same for up to kLeft rows. The sums and what they are made of fill 16 registers, or 32.
template <typename Code, int kLeft>
void dot_codes_of(View<const float> left, const Codes& codes, int64_t row, int64_t rows,
                  int64_t from, int64_t to, DotsTo<float> out) {
  constexpr int kSums = kVectorBytes == 64 ? 16 : 4;
  constexpr int kRows = kSums / kLeft > 4 ? 4 : kSums / kLeft > 1 ? kSums / kLeft : 1;
  if (left.rows == kLeft) {
    dot_codes_rows<Code, kLeft, kRows>(left, codes, row, rows, from, to, out);
  } else if constexpr (kLeft > 1) {
    dot_codes_of<Code, kLeft - 1>(left, codes, row, rows, from, to, out);
  }
}

template <typename Code>
void dot_whole_blocks(View<const float> left, const Codes& codes, int64_t row, int64_t rows,
                      float* out, int64_t ld) {
  // So many elements of `left` at a time stay in a first-level cache; but each time costs the sums
  // over lanes again.
  constexpr int64_t most = kVectorBytes == 64 ? 8 : 6, held = 8192, lanes = kLanes<float>;
  alignas(64) float reordered[held];
  const int64_t block = Code::kHasBlocks ? int64_t{1} << codes.block_bits : lanes;
  const int64_t tiles = (left.rows + most - 1) / most;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t i = left.rows * tile / tiles, count = left.rows * (tile + 1) / tiles - i;
    const int64_t step = held / count / block * block;
    for (int64_t k = 0; k < left.cols; k += step) {
      const int64_t cols = left.cols - k < step ? left.cols - k : step;
      for (int64_t r = 0; r < count; ++r) {
        const float* x = left.data + (i + r) * left.row_stride + k;
        for (int64_t at = 0; at < cols; at += lanes) {
          write(reordered + r * cols + at, Code::reordered(read<FloatVector>(x + at)));
        }
      }
      dot_codes_of<Code, most>({reordered, count, cols, cols, 1}, codes, row, rows, k, k + cols,
                               {out + i * ld, ld, 1, k > 0});
    }
  }
}

// Rows that end within a block or a vector: decoded, some columns of a few at a time.
template <typename T>
void dot_decoded(View<const float> left, const Codes& codes, int64_t row, int64_t rows, float* out,
                 int64_t ld) {
  constexpr int64_t kRows = 4, kCols = 1024;
  float decoded[kRows * kCols];
  for (int64_t j = 0; j < rows; j += kRows) {
    const int64_t n = rows - j < kRows ? rows - j : kRows;
    for (int64_t k = 0; k == 0 || k < left.cols; k += kCols) {
      const int64_t cols = left.cols - k < kCols ? left.cols - k : kCols;
      decode<T>(codes, {row + j, k, n, cols}, decoded, kCols);
      dot<float>(left.block(0, k, left.rows, cols), {decoded, n, cols, kCols, 1}, out + j, ld,
                 k > 0);
    }
  }
}

template <typename T>
void dot_codes(View<const float> left, const Codes& codes, int64_t row, int64_t rows, float* out,
               int64_t ld) {
  const int64_t whole = codes.values != nullptr ? int64_t{1} << codes.block_bits : kLanes<float>;
  if (kVectorBytes == 16 || left.cols % whole != 0 || left.cols == 0 || whole > 512) {
    dot_decoded<T>(left, codes, row, rows, out, ld);
  } else if (codes.values != nullptr) {
    dot_whole_blocks<Nibbles<T>>(left, codes, row, rows, out, ld);
  } else {
    dot_whole_blocks<Bytes<T>>(left, codes, row, rows, out, ld);
  }
}

}  // namespace
}  // namespace lora_ext::cpu
