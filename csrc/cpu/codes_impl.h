// What the codes of a weight stand for (Codes in operands.h): by vectors in registers, and
// `decode`. Part of blocks_impl.h.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/blocks.h"
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

}  // namespace
}  // namespace lora_ext::cpu
