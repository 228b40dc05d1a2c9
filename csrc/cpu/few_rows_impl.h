// The block operations for few rows, dot and combine_rows: each reads a factor where it lies. Part
// of blocks_impl.h.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/blocks.h"
#include "cpu/vectors.h"

namespace lora_ext::cpu {
namespace {

// ---- dot ----

// acc += kLeft rows of one factor times kRight of the other, a vector of each; with `kept` only its
// last lanes.
template <int kLeft, int kRight, typename T>
inline void dot_step(const Acc<T>* left, int64_t left_stride, const T* right, int64_t right_stride,
                     Vector<Acc<T>> (&acc)[kLeft][kRight], int64_t kept = kLanes<Acc<T>>) {
  using A = Acc<T>;
  const bool all = kept == kLanes<A>;
  Vector<A> row[kRight];
#pragma GCC unroll 8
  for (int j = 0; j < kRight; ++j) {
    row[j] = widen(right + j * right_stride);
    if (!all) row[j] = last_lanes<A>(row[j], kept);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kLeft; ++i) {
    Vector<A> value = read<Vector<A>>(left + i * left_stride);
    if (!all) value = last_lanes<A>(value, kept);
#pragma GCC unroll 8
    for (int j = 0; j < kRight; ++j) acc[i][j] += value * row[j];
  }
}

// kLeft rows of one factor against kRight of the other, the sums in registers.
template <int kLeft, int kRight, typename T>
inline void dot_tile(const Acc<T>* left, int64_t left_stride, const T* right, int64_t right_stride,
                     int64_t depth, Acc<T>* out, int64_t ld, bool add) {
  using A = Acc<T>;
  constexpr int64_t lanes = kLanes<A>;
  constexpr int count = kLeft * kRight, near = kNear<A>;
  Vector<A> acc[kLeft][kRight] = {};
  int64_t p = 0;
  for (; p + lanes <= depth; p += lanes) {
    dot_step(left + p, left_stride, right + p, right_stride, acc);
  }
  if (p > 0 && p < depth) {  // the last vector, without what it shares with the one before
    dot_step(left + depth - lanes, left_stride, right + depth - lanes, right_stride, acc,
             depth - p);
  }
  A sums[(count + near - 1) / near * near];
#pragma GCC unroll 8
  for (int from = 0; from < count; from += near) {
    Vector<A> some[near];
#pragma GCC unroll 4
    for (int i = 0; i < near; ++i) {
      const int at = from + i;
      some[i] = at < count ? acc[at / kRight][at % kRight] : Vector<A>{};
    }
    sum_lanes<A>(some, sums + from);
  }
  if (p == 0) {  // not one vector
    for (int at = 0; at < count; ++at) {
      const A* a = left + at / kRight * left_stride;
      const T* b = right + at % kRight * right_stride;
      for (int64_t k = 0; k < depth; ++k) sums[at] += a[k] * widen_one(b + k);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kLeft; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kRight; ++j) {
      A& to = out[i * ld + j];
      to = add ? to + sums[i * kRight + j] : sums[i * kRight + j];
    }
  }
}

// The same for a left factor of up to kLeft rows.
template <int kLeft, int kRight, typename T>
inline void dot_tile_of(View<const Acc<T>> left, const T* right, int64_t right_stride, Acc<T>* out,
                        int64_t ld, bool add) {
  if (left.rows == kLeft) {
    dot_tile<kLeft, kRight>(left.data, left.row_stride, right, right_stride, left.cols, out, ld,
                            add);
  } else if constexpr (kLeft > 1) {
    dot_tile_of<kLeft - 1, kRight>(left, right, right_stride, out, ld, add);
  }
}

// kRight rows of the right factor against all of the left one's, at most kLeft at a time and
// evenly: 9 rows as 3, 3 and 3, since a tile of few sums waits for each.
template <int kLeft, int kRight, typename T>
inline void dot_rows(View<const Acc<T>> left, const T* right, int64_t right_stride, Acc<T>* out,
                     int64_t ld, bool add) {
  const int64_t tiles = (left.rows + kLeft - 1) / kLeft;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t i = left.rows * tile / tiles, end = left.rows * (tile + 1) / tiles;
    dot_tile_of<kLeft, kRight>(left.block(i, 0, end - i, left.cols), right, right_stride,
                               out + i * ld, ld, add);
  }
}

template <typename T>
void dot(View<const Acc<T>> left, View<const T> right, Acc<T>* out, int64_t ld, bool add) {
  // 4 x 3 sums, 3 vectors of one side and 1 of the other fill 16 registers, and 7 loads feed 12
  // multiplications (339 us -> 277 for 16 rows at 768 x 768 beside 2 x 4). Fewer rows only stream
  // the right factor, and take more of its rows at once.
  int64_t j = 0;
  const auto rows = [&] { return right.data + j * right.row_stride; };
  if (left.rows >= 3) {
    for (; j + 3 <= right.rows; j += 3) {
      dot_rows<4, 3>(left, rows(), right.row_stride, out + j, ld, add);
    }
  }
  if constexpr (std::is_same_v<T, Acc<T>>) {
    // One row waits for memory: 8 streams of it (0.34 ms for 0.38 at 2048 x 2048). 16-bit dtypes
    // are held up by their conversion, and slower so.
    for (; left.rows == 1 && j + 8 <= right.rows; j += 8) {
      dot_rows<1, 8>(left, rows(), right.row_stride, out + j, ld, add);
    }
  }
  for (; j + 4 <= right.rows; j += 4) {
    dot_rows<2, 4>(left, rows(), right.row_stride, out + j, ld, add);
  }
  for (; j < right.rows; ++j) dot_rows<2, 1>(left, rows(), right.row_stride, out + j, ld, add);
}

// ---- combine_rows ----

// out (kLeft rows) = or += left (kLeft, kDepth) @ kDepth rows of the right factor.
template <int kLeft, int kDepth, typename T>
inline void combine_tile(View<const Acc<T>> left, View<const T> right, Acc<T>* out, int64_t ld,
                         bool add) {
  using A = Acc<T>;
  using V = Vector<A>;
  constexpr int64_t lanes = kLanes<A>;
  V factor[kLeft][kDepth];
#pragma GCC unroll 8
  for (int i = 0; i < kLeft; ++i) {
#pragma GCC unroll 8
    for (int p = 0; p < kDepth; ++p) {
      factor[i][p] = V{} + left.data[i * left.row_stride + p * left.col_stride];
    }
  }
  int64_t j = 0;
  for (; j + lanes <= right.cols; j += lanes) {
    V sum[kLeft];
#pragma GCC unroll 8
    for (int i = 0; i < kLeft; ++i) sum[i] = V{};  // what there is comes in last, see multiply_tile
#pragma GCC unroll 8
    for (int p = 0; p < kDepth; ++p) {
      const V row = widen(right.data + p * right.row_stride + j);
#pragma GCC unroll 8
      for (int i = 0; i < kLeft; ++i) sum[i] += factor[i][p] * row;
    }
#pragma GCC unroll 8
    for (int i = 0; i < kLeft; ++i) {
      A* to = out + i * ld + j;
      write(to, add ? read<V>(to) + sum[i] : sum[i]);
    }
  }
  for (; j < right.cols; ++j) {
    for (int i = 0; i < kLeft; ++i) {
      A sum = 0;
      for (int p = 0; p < kDepth; ++p) {
        sum += factor[i][p][0] * widen_one(right.data + p * right.row_stride + j);
      }
      A& to = out[i * ld + j];
      to = add ? to + sum : sum;
    }
  }
}

template <int kLeft, int kDepth, typename T>
void combine_for(View<const Acc<T>> left, View<const T> right, Acc<T>* out, int64_t ld) {
  if (right.rows == 0) {
    for (int64_t i = 0; i < kLeft; ++i) {
      for (int64_t j = 0; j < right.cols; ++j) out[i * ld + j] = 0;
    }
  }
  int64_t p = 0;
  const auto tile = [&]<int kRows>() {
    combine_tile<kLeft, kRows>(left.block(0, p, kLeft, kRows), right.block(p, 0, kRows, right.cols),
                               out, ld, p > 0);
    p += kRows;
  };
  while (p + kDepth <= right.rows) tile.template operator()<kDepth>();
  while (p < right.rows) tile.template operator()<1>();
}

template <typename T>
void combine_rows(View<const Acc<T>> left, View<const T> right, Acc<T>* out, int64_t ld) {
  // Each row is a stream for the hardware's prefetcher; the factors of a tile and its sums fill 16
  // registers. 1 row, float: 0.036 ms at 768 x 768 where a tile of `multiply` takes 0.070 and MKL
  // 0.080; 4 rows at 2048 x 2048: 1.3 for 2.1 and 2.5.
  for (int64_t i = 0; i < left.rows; i += 4) {
    const int64_t rows = left.rows - i < 4 ? left.rows - i : 4;
    const View<const Acc<T>> some = left.block(i, 0, rows, left.cols);
    Acc<T>* to = out + i * ld;
    if (rows == 1) combine_for<1, 8>(some, right, to, ld);
    if (rows == 2) combine_for<2, 6>(some, right, to, ld);
    if (rows == 3) combine_for<3, 4>(some, right, to, ld);
    if (rows == 4) combine_for<4, 3>(some, right, to, ld);
  }
}

}  // namespace
}  // namespace lora_ext::cpu
