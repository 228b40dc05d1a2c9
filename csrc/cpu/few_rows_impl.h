// The block operations for few rows, dot and combine_rows: each reads a factor in place. Part
// of blocks_impl.h.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/blocks.h"
#include "cpu/vectors.h"

namespace lora_ext::cpu {
namespace {

// ---- dot ----

// The factors of a dot product whose right one is stored as T and widened to what the left one is.
template <typename T>
struct Widened {
  using Left = Acc<T>;
  using Right = T;
  using Sum = Acc<T>;
  using V = Vector<Sum>;
  static constexpr int64_t kStep = kLanes<Sum>;  // elements of a vector

  static V left(const Left* from) { return read<V>(from); }
  static V right(const Right* from) { return widen(from); }
  static V last(V v, int64_t count) { return last_lanes<Sum>(v, count); }
  static Vector<Sum> multiply_add(Vector<Sum> acc, V a, V b) { return acc + a * b; }
  static Sum multiply_one(const Left* a, const Right* b) { return *a * widen_one(b); }
};

// acc += kLeft rows of one factor times kRight of the other, a vector of each; with `kept` only its
// last elements.
template <typename Factors, int kLeft, int kRight>
inline void dot_step(const typename Factors::Left* left, int64_t left_stride,
                     const typename Factors::Right* right, int64_t right_stride,
                     Vector<typename Factors::Sum> (&acc)[kLeft][kRight],
                     int64_t kept = Factors::kStep) {
  const bool all = kept == Factors::kStep;
  typename Factors::V row[kRight];
#pragma GCC unroll 8
  for (int j = 0; j < kRight; ++j) {
    row[j] = Factors::right(right + j * right_stride);
    if (!all) row[j] = Factors::last(row[j], kept);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kLeft; ++i) {
    typename Factors::V value = Factors::left(left + i * left_stride);
    if (!all) value = Factors::last(value, kept);
#pragma GCC unroll 8
    for (int j = 0; j < kRight; ++j) {
      acc[i][j] = Factors::multiply_add(acc[i][j], value, row[j]);
    }
  }
}

// Where the results of dots go: out (dense rows of `ld`) = scale * sums, or += with `add`.
template <typename A>
struct DotsTo {
  A* out;
  int64_t ld;
  A scale;
  bool add;

  DotsTo at(int64_t row, int64_t col) const { return {out + row * ld + col, ld, scale, add}; }
  void put(int64_t row, int64_t col, A sum) const {
    A& to = out[row * ld + col];
    to = add ? to + scale * sum : scale * sum;
  }
};

// Rows that will be read next, of which a step asks for one vector each.
template <typename T>
struct NextRows {
  const T* data = nullptr;
  int64_t row_stride = 0, rows = 0;

  void ask(int64_t p) const {
    for (int64_t i = 0; i < rows; ++i) __builtin_prefetch(data + i * row_stride + p, 0, 2);
  }
};

// kLeft rows of one factor against kRight of the other, the sums in registers.
template <typename Factors, int kLeft, int kRight>
inline void dot_tile(View<const typename Factors::Left> left, const typename Factors::Right* right,
                     int64_t right_stride, NextRows<typename Factors::Right> next,
                     DotsTo<typename Factors::Sum> out) {
  using A = typename Factors::Sum;
  constexpr int64_t step = Factors::kStep;
  constexpr int count = kLeft * kRight, near = kNear<A>;
  const int64_t depth = left.cols, left_stride = left.row_stride;
  Vector<A> acc[kLeft][kRight] = {};
  int64_t p = 0;
  for (; p + step <= depth; p += step) {
    next.ask(p);
    dot_step<Factors>(left.data + p, left_stride, right + p, right_stride, acc);
  }
  if (p > 0 && p < depth) {  // the last vector, without what it shares with the one before
    const int64_t at = depth - step;
    dot_step<Factors>(left.data + at, left_stride, right + at, right_stride, acc, depth - p);
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
      const auto* a = left.data + at / kRight * left_stride;
      const auto* b = right + at % kRight * right_stride;
      for (int64_t k = 0; k < depth; ++k) sums[at] += Factors::multiply_one(a + k, b + k);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kLeft; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kRight; ++j) out.put(i, j, sums[i * kRight + j]);
  }
}

// The same for a left factor of up to kLeft rows.
template <typename Factors, int kLeft, int kRight>
inline void dot_tile_of(View<const typename Factors::Left> left,
                        const typename Factors::Right* right, int64_t right_stride,
                        NextRows<typename Factors::Right> next, DotsTo<typename Factors::Sum> out) {
  if (left.rows == kLeft) {
    dot_tile<Factors, kLeft, kRight>(left, right, right_stride, next, out);
  } else if constexpr (kLeft > 1) {
    dot_tile_of<Factors, kLeft - 1, kRight>(left, right, right_stride, next, out);
  }
}

// kRight rows of the right factor against all of the left one's, at most kLeft at a time and
// evenly: 9 rows as 3, 3 and 3, since a tile of few sums waits for each. With kAhead each tile asks
// for some of the kRight rows that follow.
template <typename Factors, int kLeft, int kRight, bool kAhead = false>
inline void dot_rows(View<const typename Factors::Left> left, const typename Factors::Right* right,
                     int64_t right_stride, DotsTo<typename Factors::Sum> out) {
  const int64_t tiles = (left.rows + kLeft - 1) / kLeft;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t i = left.rows * tile / tiles, end = left.rows * (tile + 1) / tiles;
    NextRows<typename Factors::Right> next;
    if constexpr (kAhead) {
      const int64_t row = kRight * tile / tiles, rows = kRight * (tile + 1) / tiles - row;
      next = {right + (kRight + row) * right_stride, right_stride, rows};
    }
    dot_tile_of<Factors, kLeft, kRight>(left.block(i, 0, end - i, left.cols), right, right_stride,
                                        next, out.at(i, 0));
  }
}

template <typename Factors>
void dots(View<const typename Factors::Left> left, View<const typename Factors::Right> right,
          DotsTo<typename Factors::Sum> out) {
  // 4 x 3 sums, 3 vectors of one side and 1 of the other fill 16 registers; 32 hold 4 x 4 sums.
  // Fewer rows only stream the right factor, and take more of its rows at once.
  constexpr int kRight = kVectorBytes == 64 ? 4 : 3;
  int64_t j = 0;
  const auto rows = [&] { return right.data + j * right.row_stride; };
  if (left.rows >= 3) {
    for (; j + kRight <= right.rows; j += kRight) {
      dot_rows<Factors, 4, kRight, true>(left, rows(), right.row_stride, out.at(0, j));
    }
  }
  if constexpr (std::is_same_v<typename Factors::Right, typename Factors::Sum>) {
    // One row waits for memory: 8 streams of it. 16-bit dtypes are held up by their conversion, and
    // slower so.
    for (; left.rows == 1 && j + 8 <= right.rows; j += 8) {
      dot_rows<Factors, 1, 8>(left, rows(), right.row_stride, out.at(0, j));
    }
  }
  for (; j + 4 <= right.rows; j += 4) {
    dot_rows<Factors, 2, 4>(left, rows(), right.row_stride, out.at(0, j));
  }
  for (; j < right.rows; ++j) {
    dot_rows<Factors, 2, 1>(left, rows(), right.row_stride, out.at(0, j));
  }
}

template <typename T>
void dot(View<const Acc<T>> left, View<const T> right, Acc<T>* out, int64_t ld, bool add) {
  dots<Widened<T>>(left, right, {out, ld, 1, add});
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
#pragma GCC unroll 16
    for (int p = 0; p < kDepth; ++p) {
      factor[i][p] = V{} + left.data[i * left.row_stride + p * left.col_stride];
    }
  }
  int64_t j = 0;
  for (; j + lanes <= right.cols; j += lanes) {
    V sum[kLeft];
#pragma GCC unroll 8
    for (int i = 0; i < kLeft; ++i) sum[i] = V{};  // what there is comes in last, see multiply_tile
#pragma GCC unroll 16
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

// out from row `p` of the right factor on, kDepth rows at a time; what is left half as many, and so
// on.
template <int kLeft, int kDepth, typename T>
void combine_from(int64_t p, View<const Acc<T>> left, View<const T> right, Acc<T>* out,
                  int64_t ld) {
  for (; p + kDepth <= right.rows; p += kDepth) {
    combine_tile<kLeft, kDepth>(left.block(0, p, kLeft, kDepth),
                                right.block(p, 0, kDepth, right.cols), out, ld, p > 0);
  }
  if constexpr (kDepth > 1) combine_from<kLeft, kDepth / 2>(p, left, right, out, ld);
}

template <typename T>
void combine_rows(View<const Acc<T>> left, View<const T> right, Acc<T>* out, int64_t ld) {
  // Each row is a stream for the hardware's prefetcher; the factors of a tile and its sums fill 16
  // registers, or 32. Of one row 8: rows 4 KB apart share a set of 8 lines in a first-level cache.
  constexpr int kMore = kVectorBytes == 64 ? 2 : 1;
  for (int64_t i = 0; i < left.rows; i += 4) {
    const int64_t rows = left.rows - i < 4 ? left.rows - i : 4;
    const View<const Acc<T>> some = left.block(i, 0, rows, left.cols);
    Acc<T>* to = out + i * ld;
    if (right.rows == 0) {
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t j = 0; j < right.cols; ++j) to[row * ld + j] = 0;
      }
    }
    if (rows == 1) combine_from<1, 8>(0, some, right, to, ld);
    if (rows == 2) combine_from<2, 6 * kMore>(0, some, right, to, ld);
    if (rows == 3) combine_from<3, 4 * kMore>(0, some, right, to, ld);
    if (rows == 4) combine_from<4, 3 * kMore>(0, some, right, to, ld);
  }
}

}  // namespace
}  // namespace lora_ext::cpu
