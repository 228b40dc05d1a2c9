// The block operations of blocks.h, written once with the compiler's vector types. Included by one
// file per instruction set, which first sets
//   LORA_EXT_VECTOR_BYTES   width of a vector register
//   LORA_EXT_TILE_ROWS      rows of a tile of a product and
//   LORA_EXT_TILE_PANELS    panels of it, whose sums stay in registers
//   LORA_EXT_DPBF16         where it has AVX512-BF16's instruction for pairs
// and the compiler's target (g++ does not define __AVX2__ and its like after a target pragma, so
// the width stands for them: 32 is AVX2, 64 is AVX-512). All is in an unnamed namespace, so that
// nothing compiled for one instruction set can be linked into another.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/act_impl.h"
#include "cpu/blocks.h"
#include "cpu/codes_impl.h"
#include "cpu/combine_codes_impl.h"
#include "cpu/dot_codes_impl.h"
#include "cpu/few_rows_impl.h"
#include "cpu/mask_impl.h"
#include "cpu/multiply_impl.h"
#include "cpu/pairs_impl.h"
#include "cpu/vectors.h"

namespace lora_ext::cpu {
namespace {

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
  constexpr int64_t panel = kPanel<Acc<T>>, lanes = kLanes<Acc<T>>;
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
    if (j == src.cols) continue;
    if (src.col_stride == 1) {
      for (int64_t v = 0; v < panel; v += lanes) {
        write(to + v, widen_first(row + j + v, src.cols - j - v));
      }
      continue;
    }
    load_row(row + j * src.col_stride, src.col_stride, src.cols - j, to);
    for (int64_t pad = src.cols - j; pad < panel; ++pad) to[pad] = 0;
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

template <typename T>
constexpr StorageOps<T> storage_ops() {
  StorageOps<T> ops = {};
  ops.load = &load<T>, ops.pack = &pack<T>, ops.store = &store<T>, ops.keep = &keep<T>;
  ops.dot = &dot<T>, ops.combine_rows = &combine_rows<T>, ops.update = &update<T>;
  ops.gated = &gated<T>, ops.gated_gradients = &gated_gradients<T>;
  if constexpr (std::is_same_v<Acc<T>, float>) {
    ops.decode = &decode<T>, ops.dot_codes = &dot_codes<T>;
    ops.combine_codes = &combine_codes<T>;
  }
  return ops;
}

constexpr Blocks make_blocks(const char* name) {
  return {name,
          storage_ops<float>(),
          storage_ops<double>(),
          storage_ops<BFloat16>(),
          storage_ops<Float16>(),
          {&multiply<float>, kTilePanels},
          {&multiply<double>, kTilePanels},
          {&hash_columns, &draw_bits, &pack_bits, &twist, &bernoulli},
          &kPairOps};
}

}  // namespace
}  // namespace lora_ext::cpu
