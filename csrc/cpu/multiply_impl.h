// The products of blocks.h by tiles: sums of a few rows of the left factor and a few panels of the
// right one, kept in registers over the whole depth and handed on at the end. Part of
// blocks_impl.h. W is the word of the factors: float, double or a pair.
#pragma once

#include <cstdint>

#include "cpu/blocks.h"
#include "cpu/vectors.h"

namespace lora_ext::cpu {
namespace {

constexpr int kTileRows = LORA_EXT_TILE_ROWS, kTilePanels = LORA_EXT_TILE_PANELS;

// ---- where the sums go ----

// c = scale * sums + addend. The addend comes in last: sums of kDepth terms that are then summed
// round a third as much as one sum.
template <typename A>
struct ToSums {
  A* c;
  int64_t ldc;
  A scale;
  Addend<A> addend;

  ToSums at(int64_t row, int64_t col) const {
    ToSums moved = *this;
    moved.c += row * ldc + col;
    if (addend.data != nullptr) moved.addend.data += row * addend.row_stride + col;
    return moved;
  }
  const A* row(int64_t row) const { return c + row * ldc; }
  void put(int64_t row, int64_t col, Vector<A> sum) const {
    sum *= scale;
    if (addend.data != nullptr) sum += read<Vector<A>>(addend.data + row * addend.row_stride + col);
    write(c + row * ldc + col, sum);
  }
  void put_one(int64_t row, int64_t col, A sum) const {
    const A start = addend.data != nullptr ? addend.data[row * addend.row_stride + col] : 0;
    c[row * ldc + col] = scale * sum + start;
  }
};

// y += scale * sums
template <typename T>
struct ToStorage {
  T* y;
  int64_t ld;
  Acc<T> scale;

  ToStorage at(int64_t row, int64_t col) const { return {y + row * ld + col, ld, scale}; }
  const T* row(int64_t row) const { return y + row * ld; }
  void put(int64_t row, int64_t col, Vector<Acc<T>> sum) const {
    T* to = y + row * ld + col;
    narrow(widen(to) + scale * sum, to);
  }
  void put_one(int64_t row, int64_t col, Acc<T> sum) const {
    T* to = y + row * ld + col;
    narrow_one(widen_one(to) + scale * sum, to);
  }
};

// ---- tiles ----

// acc += a (kRows, depth) @ b (depth, kPanels panels). Always inlined: out of line the sums are in
// memory, and each step waits for its stores (45 rows in bfloat16: 1.6 times as long).
template <int kRows, int kPanels, bool kAhead, typename W>
[[gnu::always_inline]] inline void add_steps(View<const W> a, Panels<const W> b, Ahead ahead,
                                             Vector<Acc<W>> (&acc)[kRows][kPanels * kVectors]) {
  for (int64_t p = 0; p < a.cols; ++p) {
    Vector<W> row[kPanels * kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kPanels * kVectors; ++v) {
      const W* panel = b.data + v / kVectors * b.panel_stride;
      row[v] = read<Vector<W>>(panel + p * b.row_stride + v % kVectors * kLanes<W>);
    }
    if constexpr (kAhead) {
#pragma GCC unroll 2
      for (int panel = 0; panel < kPanels; ++panel) {
        const char* next = ahead.data + panel * ahead.panel_stride;
        __builtin_prefetch(next + p * ahead.row_stride, 0, 2);
      }
    }
    const W* column = a.data + p * a.col_stride;
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const W* factor = column + i * a.row_stride;
#pragma GCC unroll 8
      for (int v = 0; v < kPanels * kVectors; ++v) {
        acc[i][v] = multiply_add(acc[i][v], factor, row[v]);
      }
    }
  }
}

// out = a @ b + along's product
template <int kRows, int kPanels, bool kAhead, typename W, typename Out>
inline void multiply_tile(View<const W> a, Panels<const W> b, Along<W> along, Ahead ahead,
                          const Out& out) {
  Vector<Acc<W>> acc[kRows][kPanels * kVectors] = {};
  // Where the sums go is asked for while they are made: 0.7 % of y and 1.5 % of dx in float32, at
  // 960 rows of 768 x 768.
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int panel = 0; panel < kPanels; ++panel) {
      __builtin_prefetch(out.row(i) + panel * kPanel<W>, 1, 3);
    }
  }
  add_steps<kRows, kPanels, kAhead>(a, b, ahead, acc);
  add_steps<kRows, kPanels, false>(along.a, along.b, Ahead{}, acc);
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kPanels * kVectors; ++v) out.put(i, v * kLanes<W>, acc[i][v]);
  }
}

// The same for the last rows of a block: a.rows <= kRows.
template <int kRows, int kPanels, typename W, typename Out>
inline void multiply_rows(View<const W> a, Panels<const W> b, Along<W> along, Ahead ahead,
                          const Out& out) {
  if (a.rows == kRows) {
    if (ahead.data != nullptr) {
      multiply_tile<kRows, kPanels, true>(a, b, along, ahead, out);
    } else {
      multiply_tile<kRows, kPanels, false>(a, b, along, ahead, out);
    }
  } else if constexpr (kRows > 1) {
    multiply_rows<kRows - 1, kPanels>(a, b, along, ahead, out);
  }
}

// And for the last columns: through a tile of whole width, since out's neighbours are not ours.
template <typename W, typename Out>
void multiply_edge(View<const W> a, Panels<const W> b, Along<W> along, int64_t cols,
                   const Out& out) {
  Acc<W> tile[kTileRows * kPanel<W>];
  multiply_rows<kTileRows, 1>(a, b, along, Ahead{}, ToSums<Acc<W>>{tile, kPanel<W>, 1, {}});
  for (int64_t i = 0; i < a.rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) out.put_one(i, j, tile[i * kPanel<W> + j]);
  }
}

// out (a.rows, cols) = a @ b + along's product
template <typename W, typename Out>
void multiply_to(View<const W> a, Panels<const W> b, int64_t cols, Along<W> along, Ahead ahead,
                 const Out& out) {
  constexpr int64_t panel = kPanel<W>;
  // Tiles of even height: 9 rows as 5 and 4, since the sums in flight of 8 and 1 wait.
  const int64_t tiles = (a.rows + kTileRows - 1) / kTileRows;
  const auto first_row = [&](int64_t tile) { return a.rows * tile / tiles; };
  // Panels serve the tiles of a strip before the next are read. With many steps between two touches
  // of the result that saves reading b again; with few (h @ B) the result is most of the traffic,
  // and one tile's rows, passed from end to end, stream.
  const int64_t strip_tiles = a.cols < 64 ? 1 : 8;
  for (int64_t strip = 0; strip < tiles; strip += strip_tiles) {
    const int64_t end = strip + strip_tiles < tiles ? strip + strip_tiles : tiles;
    for (int64_t j = 0, width; j < cols; j += width) {
      const int64_t left = cols - j;
      width = left < kTilePanels * panel ? panel : kTilePanels * panel;
      Ahead next = ahead;  // once a panel
      if (strip > 0) next = {};
      if (next.data != nullptr) next.data += j / panel * next.panel_stride;
      for (int64_t tile = strip; tile < end; ++tile) {
        const int64_t i = first_row(tile);
        const View<const W> rows = a.block(i, 0, first_row(tile + 1) - i, a.cols);
        const Panels<const W> panels = b.from(0, j);
        const Along<W> more = along.from(i, rows.rows, j);
        if (left < panel) {
          multiply_edge(rows, panels, more, left, out.at(i, j));
        } else if (width == panel) {
          multiply_rows<kTileRows, 1>(rows, panels, more, next, out.at(i, j));
        } else {
          multiply_rows<kTileRows, kTilePanels>(rows, panels, more, next, out.at(i, j));
        }
        next = {};
      }
    }
  }
}

template <typename W>
void multiply(View<const W> a, Panels<const W> b, int64_t cols, Acc<W>* c, int64_t ldc,
              Acc<W> scale, Addend<Acc<W>> addend, Ahead ahead, Along<W> along) {
  multiply_to(a, b, cols, along, ahead, ToSums<Acc<W>>{c, ldc, scale, addend});
}

template <typename T>
void update(View<const Acc<T>> a, Panels<const Acc<T>> b, Acc<T> scale, View<T> y) {
  multiply_to(a, b, y.cols, Along<Acc<T>>{}, Ahead{}, ToStorage<T>{y.data, y.row_stride, scale});
}

}  // namespace
}  // namespace lora_ext::cpu
