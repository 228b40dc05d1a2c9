// The compiler's vector types at the width LORA_EXT_VECTOR_BYTES, and the storage dtypes: a vector
// of float or double from memory of any of them, and back. For blocks_impl.h, which says how it is
// used.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "cpu/blocks.h"

namespace lora_ext::cpu {
namespace {

constexpr int64_t kVectorBytes = LORA_EXT_VECTOR_BYTES;
constexpr int kVectors = 64 / kVectorBytes;  // vectors in a row of a panel

typedef float FloatVector __attribute__((vector_size(kVectorBytes)));
typedef double DoubleVector __attribute__((vector_size(kVectorBytes)));
typedef uint32_t UintVector __attribute__((vector_size(kVectorBytes)));
typedef uint64_t UlongVector __attribute__((vector_size(kVectorBytes)));
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
template <>
struct VectorOf<Pair> {
  using type = UintVector;
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

// acc + a * b, what a product sums; a word of the left factor meets every lane.
inline FloatVector multiply_add(FloatVector acc, const float* a, FloatVector b) {
  return acc + *a * b;
}
inline DoubleVector multiply_add(DoubleVector acc, const double* a, DoubleVector b) {
  return acc + *a * b;
}

// The same for pairs, lane by lane: both elements' products. The instruction takes subnormal
// numbers for 0.
inline FloatVector multiply_add_pairs(FloatVector acc, UintVector a, UintVector b) {
#if defined(LORA_EXT_DPBF16)
  return (FloatVector)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else  // what the instruction does, so that products over pairs can run on any CPU
  const UintVector odd = UintVector{} + 0xffff0000;
  acc += (FloatVector)(a & odd) * (FloatVector)(b & odd);
  return acc + (FloatVector)(a << 16) * (FloatVector)(b << 16);
#endif
}
inline FloatVector multiply_add(FloatVector acc, const Pair* a, UintVector b) {
  return multiply_add_pairs(acc, UintVector{} + read<uint32_t>(a), b);
}

// ---- shuffles ----

template <bool kSecond, int64_t kUnit, int64_t kScope, typename V, size_t... kAt>
inline V interleave_at(V a, V b, std::index_sequence<kAt...>) {
  constexpr size_t lanes = sizeof...(kAt), unit = kUnit, scope = kScope;
  return __builtin_shufflevector(
      a, b,
      (kAt / unit % 2 * lanes + kAt / scope * scope + kSecond * (scope / 2) +
       kAt % scope / unit / 2 * unit + kAt % unit)...);
}

// In each kScope elements: the first half of a's and b's, or the second, in turn by units of kUnit.
// a0 a1 a2 a3 and b0 b1 b2 b3 by units of 1: a0 b0 a1 b1, or a2 b2 a3 b3.
template <bool kSecond, int64_t kUnit, int64_t kScope, typename V>
inline V interleave(V a, V b) {
  constexpr size_t lanes = sizeof(V) / sizeof(a[0]);
  return interleave_at<kSecond, kUnit, kScope>(a, b, std::make_index_sequence<lanes>());
}

// kRows vectors, `step` apart, are in each kScope elements a square matrix of units of kUnit: it is
// transposed. Each round interleaves the first half of the rows with the second: the bits of a
// unit's place (row, column) turn by one, so that log2(kRows) rounds swap the two.
template <int64_t kRows, int64_t kUnit, int64_t kScope, typename V>
inline void transpose_units(V* rows, int64_t step) {
#pragma GCC unroll 4
  for (int64_t round = 1; round < kRows; round *= 2) {
    V turned[kRows];
#pragma GCC unroll 16
    for (int64_t i = 0; i < kRows / 2; ++i) {
      const V a = rows[i * step], b = rows[(i + kRows / 2) * step];
      turned[2 * i] = interleave<false, kUnit, kScope>(a, b);
      turned[2 * i + 1] = interleave<true, kUnit, kScope>(a, b);
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < kRows; ++i) rows[i * step] = turned[i];
  }
}

// Elements in 16 bytes, within which a shuffle of two vectors is one instruction.
template <typename A>
constexpr int64_t kNear = 16 / sizeof(A);

// rows[i][j] becomes rows[j][i]: elements within each 16 bytes, then those as units. 20 cycles for
// 8 x 8 floats on Zen 3, where rounds over whole vectors took 27.
template <typename A>
inline void transpose(Vector<A> (&rows)[kLanes<A>]) {
  constexpr int64_t lanes = kLanes<A>, near = kNear<A>;
#pragma GCC unroll 4
  for (int64_t i = 0; i < lanes; i += near) transpose_units<near, 1, near>(rows + i, 1);
#pragma GCC unroll 4
  for (int64_t i = 0; i < near; ++i) transpose_units<lanes / near, near, lanes>(rows + i, near);
}

// out[i] = the sum of the lanes of v[i]. Each round adds the halves of two vectors' 16 bytes side
// by side, until these hold one element of every sum; the vector's 16-byte parts are then added up.
template <typename A>
inline void sum_lanes(Vector<A> (&v)[kNear<A>], A* out) {
  constexpr int64_t near = kNear<A>;
#pragma GCC unroll 2
  for (int64_t i = 0; i < near; i += 2) {
    v[i / 2] =
        interleave<false, 1, near>(v[i], v[i + 1]) + interleave<true, 1, near>(v[i], v[i + 1]);
  }
  if constexpr (near == 4) {
    v[0] = interleave<false, 2, near>(v[0], v[1]) + interleave<true, 2, near>(v[0], v[1]);
  }
  typedef A Part __attribute__((vector_size(16)));
  Part parts[kVectorBytes / 16];
  std::memcpy(parts, &v[0], kVectorBytes);
#pragma GCC unroll 2
  for (int64_t width = kVectorBytes / 32; width > 0; width /= 2) {
#pragma GCC unroll 2
    for (int64_t i = 0; i < width; ++i) parts[i] += parts[i + width];
  }
  write(out, parts[0]);
}

// The last `count` lanes of a vector, and zeros.
template <typename A>
inline Vector<A> last_lanes(Vector<A> v, int64_t count) {
  Vector<A> lane;
#pragma GCC unroll 16
  for (int64_t i = 0; i < kLanes<A>; ++i) lane[i] = static_cast<A>(i);
  const auto kept = lane >= static_cast<A>(kLanes<A> - count);
  return (Vector<A>)((decltype(kept))v & kept);
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

// Rounded to bfloat16, whose bits are the lower half of each lane.
inline UintVector round_to_bfloat16(FloatVector v) {
  const UintVector bits = (UintVector)v;
  const UintVector rounded =
      (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  const UintVector nan = (bits >> 16) | 0x40;      // rounding could make it inf
  const UintVector is_nan = (UintVector)(v != v);
  return (rounded & ~is_nan) | (nan & is_nan);
}

inline void narrow(FloatVector v, BFloat16* to) {
  write(to, __builtin_convertvector(round_to_bfloat16(v), ShortVector));
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
#elif defined(__aarch64__)
inline FloatVector widen(const Float16* from) {
  return (FloatVector)vcvt_f32_f16(read<float16x4_t>(from));
}
inline void narrow(FloatVector v, Float16* to) { write(to, vcvt_f16_f32((float32x4_t)v)); }
#else
// The compiler's run-time library converts _Float16.
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
  if constexpr (std::is_same_v<T, BFloat16>) {
    const uint32_t bits = static_cast<uint32_t>(from->bits) << 16;
    return read<float>(&bits);
  } else if constexpr (std::is_same_v<T, Float16>) {
#if LORA_EXT_VECTOR_BYTES > 16
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(from->bits)));
#else
    const Float16 padded[kLanes<float>] = {*from};
    return widen(padded)[0];
#endif
  } else {
    return *from;
  }
}

// The first `count` elements, and zeros; what follows them is not read.
template <typename T>
inline Vector<Acc<T>> widen_first(const T* from, int64_t count) {
  constexpr int64_t lanes = kLanes<Acc<T>>;
  if (count >= lanes) return widen(from);
  if (count <= 0) return Vector<Acc<T>>{};
  // h of a row of 768, R = 8, packs A: 9.7 -> 7.8 us; float16 56 -> 9
#if LORA_EXT_VECTOR_BYTES == 64
  const auto kept = static_cast<uint16_t>((1 << count) - 1);
  if constexpr (std::is_same_v<T, float>) {
    return (FloatVector)_mm512_maskz_loadu_ps(kept, from);
  } else if constexpr (std::is_same_v<T, double>) {
    return (DoubleVector)_mm512_maskz_loadu_pd(static_cast<uint8_t>(kept), from);
  } else {
    T padded[lanes];
    write(padded, _mm256_maskz_loadu_epi16(kept, from));
    return widen(padded);
  }
#else
  Vector<Acc<T>> v{};
  for (int64_t i = 0; i < count; ++i) v[i] = widen_one(from + i);
  return v;
#endif
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
