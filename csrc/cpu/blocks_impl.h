// The block operations of blocks.h, written once with the compiler's vector types. Included by one
// file per instruction set, which first sets
//   LORA_EXT_VECTOR_BYTES   width of a vector register
//   LORA_EXT_TILE_ROWS      rows of c that a tile keeps in registers beside one panel's width
// and the compiler's target (g++ does not define __AVX2__ and its like after a target pragma, so
// the width stands for them: 32 is AVX2, 64 is AVX-512). All is in an unnamed namespace, so that
// nothing compiled for one instruction set can be linked into another.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/blocks.h"
#include "cpu/vectors.h"

namespace lora_ext::cpu {
namespace {

constexpr int kTileRows = LORA_EXT_TILE_ROWS;

// ---- load, pack, store ----

template <typename T>
void load_row(const T* src, int64_t stride, int64_t cols, Acc<T>* dst) {
  constexpr int64_t lanes = kLanes<Acc<T>>;
  int64_t j = 0;
  if (stride == 1) {
    for (; j + lanes <= cols; j += lanes) write(dst + j, widen(src + j));
  }
  for (; j < cols; ++j) dst[j] = widen_one(src + j * stride);
}

template <typename T>
void load(View<const T> src, Acc<T>* dst, int64_t ld) {
  for (int64_t i = 0; i < src.rows; ++i) {
    load_row(src.data + i * src.row_stride, src.col_stride, src.cols, dst + i * ld);
  }
}

// One panel of a matrix whose columns are dense, of up to kPanel columns.
template <typename T>
void pack_transposed(View<const T> src, Acc<T>* dst) {
  using A = Acc<T>;
  constexpr int64_t lanes = kLanes<A>, panel = kPanel<A>;
  // A cache line of each column at a time, of `lanes` columns: 16 of them, a power of two apart,
  // would meet in one set of a first-level cache.
  const int64_t whole = src.rows / panel * panel;
  for (int64_t line = 0; line < whole; line += panel) {
    for (int64_t j = 0; j < panel; j += lanes) {
      for (int64_t p = line; p < line + panel; p += lanes) {
        Vector<A> square[lanes];
#pragma GCC unroll 16
        for (int64_t i = 0; i < lanes; ++i) {
          square[i] =
              j + i < src.cols ? widen(src.data + p + (j + i) * src.col_stride) : Vector<A>{};
        }
        transpose<A>(square);
#pragma GCC unroll 16
        for (int64_t i = 0; i < lanes; ++i) write(dst + (p + i) * panel + j, square[i]);
      }
    }
  }
  for (int64_t p = whole; p < src.rows; ++p) {
    load_row(src.data + p, src.col_stride, src.cols, dst + p * panel);
    for (int64_t j = src.cols; j < panel; ++j) dst[p * panel + j] = 0;
  }
}

template <typename T>
void pack(View<const T> src, Acc<T>* dst) {
  constexpr int64_t panel = kPanel<Acc<T>>;
  const int64_t panel_size = src.rows * panel;
  if (src.col_stride != 1 && src.row_stride == 1) {
    for (int64_t j = 0; j < src.cols; j += panel, dst += panel_size) {
      const int64_t cols = src.cols - j < panel ? src.cols - j : panel;
      pack_transposed(src.block(0, j, src.rows, cols), dst);
    }
    return;
  }
  // Row by row, so that the rows are read from end to end.
  for (int64_t p = 0; p < src.rows; ++p) {
    const T* row = src.data + p * src.row_stride;
    Acc<T>* to = dst + p * panel;
    int64_t j = 0;
    for (; j + panel <= src.cols; j += panel, to += panel_size) {
      load_row(row + j * src.col_stride, src.col_stride, panel, to);
    }
    if (j < src.cols) {
      load_row(row + j * src.col_stride, src.col_stride, src.cols - j, to);
      for (int64_t pad = src.cols - j; pad < panel; ++pad) to[pad] = 0;
    }
  }
}

template <typename T>
void store(const Acc<T>* src, int64_t ld, Acc<T> scale, const T* bias, View<T> dst) {
  constexpr int64_t lanes = kLanes<Acc<T>>;
  if (dst.row_stride == 1 && dst.col_stride != 1) {  // a transposed matrix: write along its rows
    for (int64_t j = 0; j < dst.cols; ++j) {
      const Acc<T> shift = bias != nullptr ? widen_one(bias + j) : 0;
      T* to = dst.data + j * dst.col_stride;
      for (int64_t i = 0; i < dst.rows; ++i) narrow_one(scale * src[i * ld + j] + shift, to + i);
    }
    return;
  }
  for (int64_t i = 0; i < dst.rows; ++i) {
    const Acc<T>* from = src + i * ld;
    T* to = dst.data + i * dst.row_stride;
    int64_t j = 0;
    if (dst.col_stride == 1) {
      for (; j + lanes <= dst.cols; j += lanes) {
        Vector<Acc<T>> v = scale * read<Vector<Acc<T>>>(from + j);
        if (bias != nullptr) v += widen(bias + j);
        narrow(v, to + j);
      }
    }
    for (; j < dst.cols; ++j) {
      const Acc<T> shift = bias != nullptr ? widen_one(bias + j) : 0;
      narrow_one(scale * from[j] + shift, to + j * dst.col_stride);
    }
  }
}

// ---- multiply ----

// c (kRows, one panel) = a (kRows, depth) @ b (depth, one panel) + addend, the sums in registers.
template <int kRows, bool kAhead, typename A>
inline void multiply_tile(View<const A> a, const A* b, int64_t ldb, A* c, int64_t ldc,
                          Addend<A> addend, Ahead ahead) {
  using V = Vector<A>;
  V acc[kRows][kVectors] = {};
  for (int64_t p = 0; p < a.cols; ++p) {
    V row[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) row[v] = read<V>(b + p * ldb + v * kLanes<A>);
    if constexpr (kAhead) __builtin_prefetch(ahead.data + p * ahead.row_stride, 0, 2);
    const A* column = a.data + p * a.col_stride;
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[i][v] += column[i * a.row_stride] * row[v];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      // The addend comes in last: sums of kDepth terms that are then summed round a third as much
      // as one sum (largest error of h at K = 1100 in float, kDepth = 256: 2.1e-6 for 5.9e-6).
      const int64_t at = v * kLanes<A>;
      V sum = acc[i][v];
      if (addend.data != nullptr) sum += read<V>(addend.data + i * addend.row_stride + at);
      write(c + i * ldc + at, sum);
    }
  }
}

// The same for the last rows of a block: a.rows <= kRows.
template <int kRows, typename A>
inline void multiply_rows(View<const A> a, const A* b, int64_t ldb, A* c, int64_t ldc,
                          Addend<A> addend, Ahead ahead) {
  if (a.rows == kRows) {
    if (ahead.data != nullptr) {
      multiply_tile<kRows, true>(a, b, ldb, c, ldc, addend, ahead);
    } else {
      multiply_tile<kRows, false>(a, b, ldb, c, ldc, addend, ahead);
    }
  } else if constexpr (kRows > 1) {
    multiply_rows<kRows - 1>(a, b, ldb, c, ldc, addend, ahead);
  }
}

// And for the last columns: through a tile of whole width, since c's neighbours are not ours.
template <typename A>
void multiply_edge(View<const A> a, const A* b, int64_t ldb, int64_t cols, A* c, int64_t ldc,
                   Addend<A> addend) {
  A tile[kTileRows * kPanel<A>];
  multiply_rows<kTileRows>(a, b, ldb, tile, kPanel<A>, Addend<A>{}, Ahead{});
  for (int64_t i = 0; i < a.rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) {
      const A start = addend.data != nullptr ? addend.data[i * addend.row_stride + j] : 0;
      c[i * ldc + j] = start + tile[i * kPanel<A> + j];
    }
  }
}

template <typename A>
void multiply(View<const A> a, Panels<const A> b, int64_t cols, A* c, int64_t ldc, Addend<A> addend,
              Ahead ahead) {
  // Tiles of even height: 8 rows as 4 and 4, since 2 of the sums in flight of 6 and 2 wait.
  const int64_t tiles = (a.rows + kTileRows - 1) / kTileRows;
  const auto first_row = [&](int64_t tile) { return a.rows * tile / tiles; };
  // A panel serves the tiles of a strip before the next is read. With many steps between two
  // touches of c that saves reading b again; with few (h @ B) c is most of the traffic, and one
  // tile's rows, passed from end to end, stream: 1.36 ms for 1.90 on 960 x 3072 with 16 steps.
  const int64_t strip_tiles = a.cols < 64 ? 1 : 8;
  for (int64_t strip = 0; strip < tiles; strip += strip_tiles) {
    const int64_t end = strip + strip_tiles < tiles ? strip + strip_tiles : tiles;
    for (int64_t j = 0; j < cols; j += kPanel<A>) {
      const A* panel = b.from(0, j).data;
      Ahead next = ahead;  // once a panel
      if (strip > 0) next = {};
      if (next.data != nullptr) next.data += j / kPanel<A> * next.panel_stride;
      for (int64_t tile = strip; tile < end; ++tile) {
        const int64_t i = first_row(tile);
        const View<const A> rows = a.block(i, 0, first_row(tile + 1) - i, a.cols);
        A* to = c + i * ldc + j;
        Addend<A> from = addend;
        if (from.data != nullptr) from.data += i * from.row_stride + j;
        if (cols - j >= kPanel<A>) {
          multiply_rows<kTileRows>(rows, panel, b.row_stride, to, ldc, from, next);
          next = {};
        } else {
          multiply_edge(rows, panel, b.row_stride, cols - j, to, ldc, from);
        }
      }
    }
  }
}

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

template <typename T>
constexpr StorageOps<T> kStorageOps = {&load<T>, &pack<T>, &store<T>, &dot<T>, &combine_rows<T>};

constexpr Blocks make_blocks(const char* name) {
  return {name,
          kStorageOps<float>,
          kStorageOps<double>,
          kStorageOps<BFloat16>,
          kStorageOps<Float16>,
          {&multiply<float>},
          {&multiply<double>}};
}

}  // namespace
}  // namespace lora_ext::cpu
