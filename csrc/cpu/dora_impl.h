// The block operations for DoRA: for a few elements of a matrix, those that dropout drops, each of
// which meets a row of the other factor; and the norm of an adapted row. Part of blocks_impl.h.
#pragma once

#include <cstdint>

#include "cpu/blocks.h"
#include "cpu/vectors.h"

namespace lora_ext::cpu {
namespace {

// Vectors of a row. They stay in registers from one element to the next, next to the kNear<A> sums
// of sample_few: of 32 registers on AVX-512, of 16 elsewhere. Its rate is that of the second-level
// cache: rows of 4, 8 and 16 vectors, 192 to 768 of them, take 7.0 to 9.2 ms at 960,768,3072.
constexpr int kFewVectors = kVectorBytes == 64 ? 16 : 8;
template <typename A>
constexpr int64_t kFewWidth = kFewVectors * kLanes<A>;

template <typename T, typename A = Acc<T>>
void combine_few(Few<A> few, const A* rows, A* sums) {
  Vector<A> acc[kFewVectors];
#pragma GCC unroll 16
  for (int j = 0; j < kFewVectors; ++j) acc[j] = read<Vector<A>>(sums + j * kLanes<A>);
  for (int64_t i = 0; i < few.count; ++i) {
    const A* row = rows + few.at[i];
#pragma GCC unroll 16
    for (int j = 0; j < kFewVectors; ++j) {
      acc[j] = multiply_add(acc[j], few.values + i, read<Vector<A>>(row + j * kLanes<A>));
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < kFewVectors; ++j) write(sums + j * kLanes<A>, acc[j]);
}

template <typename T, typename A = Acc<T>>
void sample_few(const T* left, int64_t cols, const A* factor, const A* rows, Few<A> few) {
  constexpr int64_t near = kNear<A>;
  Vector<A> of_left[kFewVectors];
#pragma GCC unroll 16
  for (int j = 0; j < kFewVectors; ++j) {
    const int64_t at = j * kLanes<A>;
    of_left[j] = widen_first(left + at, cols - at) * read<Vector<A>>(factor + at);
  }
  for (int64_t i = 0; i < few.count; i += near) {
    const int64_t left_over = few.count - i;
    Vector<A> acc[near];
#pragma GCC unroll 4
    for (int64_t k = 0; k < near; ++k) {
      const A* row = rows + few.at[k < left_over ? i + k : i];
      acc[k] = Vector<A>{};
#pragma GCC unroll 16
      for (int j = 0; j < kFewVectors; ++j) {
        acc[k] += of_left[j] * read<Vector<A>>(row + j * kLanes<A>);
      }
    }
    A sums[near];
    sum_lanes<A>(acc, sums);
    for (int64_t k = 0; k < near && k < left_over; ++k) few.values[i + k] += sums[k];
  }
}

template <typename A>
A squares(const A* row, const A* left, int64_t rank, const A* low, int64_t ld) {
  Vector<A> sums[kVectors] = {};
  for (int64_t k = 0; k < ld; k += kPanel<A>) {
    Vector<A> acc[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) acc[j] = read<Vector<A>>(row + k + j * kLanes<A>);
    for (int64_t r = 0; r < rank; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        acc[j] = multiply_add(acc[j], left + r, read<Vector<A>>(low + r * ld + k + j * kLanes<A>));
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) sums[j] += acc[j] * acc[j];
  }
  A total = 0;
  for (int j = 0; j < kVectors; ++j) {
    for (int64_t lane = 0; lane < kLanes<A>; ++lane) total += sums[j][lane];
  }
  return total;
}

template <typename T, typename A = Acc<T>>
void rescale(const A* sums, A scale, const A* factor, const A* bias, int64_t cols, T* y, T* z) {
  constexpr int64_t lanes = kLanes<A>;
  int64_t j = 0;
  for (; j + lanes <= cols; j += lanes) {
    const auto at = [&](const A* from) { return read<Vector<A>>(from + j); };
    const Vector<A> whole = widen(y + j), dropped = scale * (whole - at(sums));
    narrow(dropped, z + j);
    narrow(whole + at(factor) * dropped + at(bias), y + j);
  }
  for (; j < cols; ++j) {
    const A whole = widen_one(y + j), dropped = scale * (whole - sums[j]);
    narrow_one(dropped, z + j);
    narrow_one(whole + factor[j] * dropped + bias[j], y + j);
  }
}

}  // namespace
}  // namespace lora_ext::cpu
