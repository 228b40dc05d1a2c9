// The block operations of sparse.h. Part of blocks_impl.h.
#pragma once

#include <cstdint>

#include "cpu/blocks.h"
#include "cpu/vectors.h"

namespace lora_ext::cpu {
namespace {

// Vectors of a row. They stay in registers from one element to the next, next to the kNear<A> sums
// of `sample`: of 32 registers on AVX-512, of 16 elsewhere.
constexpr int kRowVectors = kVectorBytes == 64 ? 16 : 8;
template <typename A>
constexpr int64_t kRowWidth = kRowVectors * kLanes<A>;

template <typename A>
void combine_few(Few<A> few, const A* rows, A* sums) {
  Vector<A> acc[kRowVectors];
#pragma GCC unroll 16
  for (int j = 0; j < kRowVectors; ++j) acc[j] = read<Vector<A>>(sums + j * kLanes<A>);
  for (int64_t i = 0; i < few.count; ++i) {
    const A* row = rows + few.at[i];
#pragma GCC unroll 16
    for (int j = 0; j < kRowVectors; ++j) {
      acc[j] = multiply_add(acc[j], few.values + i, read<Vector<A>>(row + j * kLanes<A>));
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < kRowVectors; ++j) write(sums + j * kLanes<A>, acc[j]);
}

template <typename A>
void sample_few(const A* left, const A* rows, Few<A> few) {
  constexpr int64_t near = kNear<A>;
  Vector<A> of_left[kRowVectors];
#pragma GCC unroll 16
  for (int j = 0; j < kRowVectors; ++j) of_left[j] = read<Vector<A>>(left + j * kLanes<A>);
  for (int64_t i = 0; i < few.count; i += near) {
    const int64_t left_over = few.count - i;
    Vector<A> acc[near];
#pragma GCC unroll 4
    for (int64_t k = 0; k < near; ++k) {
      const A* row = rows + few.at[k < left_over ? i + k : i];
      acc[k] = Vector<A>{};
#pragma GCC unroll 16
      for (int j = 0; j < kRowVectors; ++j) {
        acc[k] += of_left[j] * read<Vector<A>>(row + j * kLanes<A>);
      }
    }
    A sums[near];
    sum_lanes<A>(acc, sums);
    for (int64_t k = 0; k < near && k < left_over; ++k) few.values[i + k] += sums[k];
  }
}

template <typename A>
void rescale(const A* sums, A scale, const A* factor, const A* bias, A* y, A* z) {
  for (int64_t j = 0; j < kRowWidth<A>; j += kLanes<A>) {
    const auto at = [&](const A* from) { return read<Vector<A>>(from + j); };
    const Vector<A> dropped = scale * (at(y) - at(sums));
    write(z + j, dropped);
    write(y + j, at(y) + at(factor) * dropped + at(bias));
  }
}

template <typename A>
constexpr SparseOps<A> sparse_ops() {
  return {kRowWidth<A>, &combine_few<A>, &sample_few<A>, &rescale<A>};
}

}  // namespace
}  // namespace lora_ext::cpu
