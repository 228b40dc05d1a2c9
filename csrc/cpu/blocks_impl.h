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
#include "cpu/few_rows_impl.h"
#include "cpu/mask_impl.h"
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

// to = scale * row + bias, or += it.
template <bool kAdd, typename T>
void store_row(const Acc<T>* row, Acc<T> scale, const T* bias, int64_t cols, T* to,
               int64_t stride) {
  constexpr int64_t lanes = kLanes<Acc<T>>;
  int64_t j = 0;
  if (stride == 1) {
    for (; j + lanes <= cols; j += lanes) {
      Vector<Acc<T>> v = scale * read<Vector<Acc<T>>>(row + j);
      if (bias != nullptr) v += widen(bias + j);
      if (kAdd) v += widen(to + j);
      narrow(v, to + j);
    }
  }
  for (; j < cols; ++j) {
    Acc<T> value = scale * row[j];
    if (bias != nullptr) value += widen_one(bias + j);
    if (kAdd) value += widen_one(to + j * stride);
    narrow_one(value, to + j * stride);
  }
}

template <typename T>
void store(const Acc<T>* src, int64_t ld, Acc<T> scale, const T* bias, bool add, View<T> dst) {
  if (dst.row_stride == 1 && dst.col_stride != 1) {  // a transposed matrix: write along its rows
    for (int64_t j = 0; j < dst.cols; ++j) {
      const Acc<T> shift = bias != nullptr ? widen_one(bias + j) : 0;
      T* to = dst.data + j * dst.col_stride;
      for (int64_t i = 0; i < dst.rows; ++i) {
        const Acc<T> value = scale * src[i * ld + j] + shift;
        narrow_one(add ? widen_one(to + i) + value : value, to + i);
      }
    }
    return;
  }
  for (int64_t i = 0; i < dst.rows; ++i) {
    T* to = dst.data + i * dst.row_stride;
    if (add) {
      store_row<true>(src + i * ld, scale, bias, dst.cols, to, dst.col_stride);
    } else {
      store_row<false>(src + i * ld, scale, bias, dst.cols, to, dst.col_stride);
    }
  }
}

// ---- keep ----

// Whole vectors of elements of sizeof(T) bytes, of as many lanes as the mask has bits for.
template <typename T>
struct KeepIn;
template <>
struct KeepIn<float> {
  using type = UintVector;
};
template <>
struct KeepIn<double> {
  using type = UlongVector;
};
template <>
struct KeepIn<BFloat16> {
  using type = ShortVector;
};
template <>
struct KeepIn<Float16> {
  using type = ShortVector;
};

template <typename T>
void keep(Bits bits, View<T> values) {
  using V = typename KeepIn<T>::type;
  using Lane = std::remove_cvref_t<decltype(V{}[0])>;
  constexpr int64_t lanes = sizeof(V) / sizeof(Lane);
  V bit_of_lane;
#pragma GCC unroll 16
  for (int64_t i = 0; i < lanes; ++i) bit_of_lane[i] = static_cast<Lane>(Lane{1} << i);
  for (int64_t row = 0; row < values.rows; ++row) {
    const uint8_t* mask = bits.data + row * bits.row_stride;
    T* to = values.data + row * values.row_stride;
    int64_t j = 0;
    for (; j + lanes <= values.cols; j += lanes) {
      uint32_t word = mask[j / 8];
      if constexpr (lanes == 16) word |= static_cast<uint32_t>(mask[j / 8 + 1]) << 8;
      if constexpr (lanes < 8) word >>= j % 8;
      const V kept = (V)(((V{} + static_cast<Lane>(word)) & bit_of_lane) != 0);
      write(to + j, read<V>(to + j) & kept);
    }
    for (; j < values.cols; ++j) {
      if ((mask[j / 8] >> j % 8 & 1) == 0) to[j] = T{};
    }
  }
}

// ---- multiply ----

// c (kRows, one panel) = scale * a (kRows, depth) @ b (depth, one panel) + addend, the sums in
// registers.
template <int kRows, bool kAhead, typename A>
inline void multiply_tile(View<const A> a, const A* b, int64_t ldb, A* c, int64_t ldc, A scale,
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
      V sum = scale * acc[i][v];
      if (addend.data != nullptr) sum += read<V>(addend.data + i * addend.row_stride + at);
      write(c + i * ldc + at, sum);
    }
  }
}

// The same for the last rows of a block: a.rows <= kRows.
template <int kRows, typename A>
inline void multiply_rows(View<const A> a, const A* b, int64_t ldb, A* c, int64_t ldc, A scale,
                          Addend<A> addend, Ahead ahead) {
  if (a.rows == kRows) {
    if (ahead.data != nullptr) {
      multiply_tile<kRows, true>(a, b, ldb, c, ldc, scale, addend, ahead);
    } else {
      multiply_tile<kRows, false>(a, b, ldb, c, ldc, scale, addend, ahead);
    }
  } else if constexpr (kRows > 1) {
    multiply_rows<kRows - 1>(a, b, ldb, c, ldc, scale, addend, ahead);
  }
}

// And for the last columns: through a tile of whole width, since c's neighbours are not ours.
template <typename A>
void multiply_edge(View<const A> a, const A* b, int64_t ldb, int64_t cols, A* c, int64_t ldc,
                   A scale, Addend<A> addend) {
  A tile[kTileRows * kPanel<A>];
  multiply_rows<kTileRows>(a, b, ldb, tile, kPanel<A>, scale, Addend<A>{}, Ahead{});
  for (int64_t i = 0; i < a.rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) {
      const A start = addend.data != nullptr ? addend.data[i * addend.row_stride + j] : 0;
      c[i * ldc + j] = start + tile[i * kPanel<A> + j];
    }
  }
}

template <typename A>
void multiply(View<const A> a, Panels<const A> b, int64_t cols, A* c, int64_t ldc, A scale,
              Addend<A> addend, Ahead ahead) {
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
          multiply_rows<kTileRows>(rows, panel, b.row_stride, to, ldc, scale, from, next);
          next = {};
        } else {
          multiply_edge(rows, panel, b.row_stride, cols - j, to, ldc, scale, from);
        }
      }
    }
  }
}

template <typename T>
constexpr StorageOps<T> kStorageOps = {&load<T>, &pack<T>, &store<T>,
                                       &keep<T>, &dot<T>,  &combine_rows<T>};

constexpr Blocks make_blocks(const char* name) {
  return {name,
          kStorageOps<float>,
          kStorageOps<double>,
          kStorageOps<BFloat16>,
          kStorageOps<Float16>,
          {&multiply<float>},
          {&multiply<double>},
          {&draw_bits, &pack_bits}};
}

}  // namespace
}  // namespace lora_ext::cpu
