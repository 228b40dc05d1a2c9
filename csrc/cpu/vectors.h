// The compiler's vector types at the width LORA_EXT_VECTOR_BYTES, and the storage dtypes: a vector
// of float or double from memory of any of them, and back. For blocks_impl.h, which says how it is
// used.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/blocks.h"

namespace lora_ext::cpu {
namespace {

constexpr int64_t kVectorBytes = LORA_EXT_VECTOR_BYTES;
constexpr int kVectors = 64 / kVectorBytes;  // vectors in a row of a panel

typedef float FloatVector __attribute__((vector_size(kVectorBytes)));
typedef double DoubleVector __attribute__((vector_size(kVectorBytes)));
typedef uint32_t UintVector __attribute__((vector_size(kVectorBytes)));
typedef uint16_t ShortVector __attribute__((vector_size(kVectorBytes / 2)));

template <typename A>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = FloatVector;
};
template <>
struct VectorOf<double> {
  using type = DoubleVector;
};
template <typename A>
using Vector = typename VectorOf<A>::type;
template <typename A>
constexpr int64_t kLanes = kVectorBytes / static_cast<int64_t>(sizeof(A));

template <typename V>
inline V read(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}
template <typename V>
inline void write(void* to, V v) {
  std::memcpy(to, &v, sizeof(V));
}

// ---- a square of vectors, transposed ----

template <size_t... kAt, typename V>
inline void interleave(V& low, V& high, std::index_sequence<kAt...>) {
  constexpr size_t lanes = sizeof...(kAt);
  const V a = low, b = high;
  low = __builtin_shufflevector(a, b, (kAt / 2 + kAt % 2 * lanes)...);
  high = __builtin_shufflevector(a, b, (lanes / 2 + kAt / 2 + kAt % 2 * lanes)...);
}

// rows[i][j] becomes rows[j][i]. Each round interleaves the first half of the rows with the second:
// the bits of an element's place (row, lane) turn by one, so that log2(lanes) rounds swap the two.
template <typename A>
inline void transpose(Vector<A> (&rows)[kLanes<A>]) {
  constexpr int64_t lanes = kLanes<A>;
#pragma GCC unroll 4
  for (int64_t round = 1; round < lanes; round *= 2) {
    Vector<A> turned[lanes];
#pragma GCC unroll 16
    for (int64_t i = 0; i < lanes / 2; ++i) {
      turned[2 * i] = rows[i];
      turned[2 * i + 1] = rows[i + lanes / 2];
      interleave(turned[2 * i], turned[2 * i + 1], std::make_index_sequence<lanes>());
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < lanes; ++i) rows[i] = turned[i];
  }
}

// ---- storage dtypes: a vector of A from memory of T, and back ----

inline FloatVector widen(const float* from) { return read<FloatVector>(from); }
inline DoubleVector widen(const double* from) { return read<DoubleVector>(from); }
inline void narrow(FloatVector v, float* to) { write(to, v); }
inline void narrow(DoubleVector v, double* to) { write(to, v); }

inline FloatVector widen(const BFloat16* from) {
#if LORA_EXT_VECTOR_BYTES == 64
  const UintVector wide = (UintVector)_mm512_cvtepu16_epi32(read<__m256i>(from));
#elif LORA_EXT_VECTOR_BYTES == 32  // GCC 12 takes four instructions for what is one
  const UintVector wide = (UintVector)_mm256_cvtepu16_epi32(read<__m128i>(from));
#else
  const UintVector wide = __builtin_convertvector(read<ShortVector>(from), UintVector);
#endif
  return (FloatVector)(wide << 16);
}

inline void narrow(FloatVector v, BFloat16* to) {
  const UintVector bits = (UintVector)v;
  const UintVector rounded =
      (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  const UintVector nan = (bits >> 16) | 0x40;      // rounding could make it inf
  const UintVector is_nan = (UintVector)(v != v);
  write(to, __builtin_convertvector((rounded & ~is_nan) | (nan & is_nan), ShortVector));
}

#if LORA_EXT_VECTOR_BYTES == 64
inline FloatVector widen(const Float16* from) { return _mm512_cvtph_ps(read<__m256i>(from)); }
inline void narrow(FloatVector v, Float16* to) {
  write(to, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif LORA_EXT_VECTOR_BYTES == 32
inline FloatVector widen(const Float16* from) { return _mm256_cvtph_ps(read<__m128i>(from)); }
inline void narrow(FloatVector v, Float16* to) {
  write(to, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
// _Float16 is converted by the compiler: in hardware on aarch64, by its run-time library on x86-64.
inline FloatVector widen(const Float16* from) {
  FloatVector v;
  for (int64_t i = 0; i < kLanes<float>; ++i) v[i] = read<_Float16>(from + i);
  return v;
}
inline void narrow(FloatVector v, Float16* to) {
  for (int64_t i = 0; i < kLanes<float>; ++i) write(to + i, static_cast<_Float16>(v[i]));
}
#endif

template <typename T>
inline Acc<T> widen_one(const T* from) {
  if constexpr (sizeof(T) == 2) {
    T padded[kLanes<float>] = {*from};
    return widen(padded)[0];
  } else {
    return *from;
  }
}

template <typename T>
inline void narrow_one(Acc<T> value, T* to) {
  if constexpr (sizeof(T) == 2) {
    T padded[kLanes<float>];
    narrow(FloatVector{value}, padded);
    *to = padded[0];
  } else {
    *to = value;
  }
}

}  // namespace
}  // namespace lora_ext::cpu
