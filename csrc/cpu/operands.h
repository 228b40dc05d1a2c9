// What the block operations of blocks.h read and write: elements, matrices, panels, masks, codes.
#pragma once

#include <cstdint>

namespace lora_ext::cpu {

// Storage only: 16 bits, converted to float on the way in and rounded to nearest even on the way
// out.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
// Neighbours along the summed dimension in one word: what the bfloat16 product of AVX512-BF16
// multiplies at a time. Of an odd number of elements the last one's neighbour is 0.
struct Pair {
  BFloat16 even, odd;
};

// The functions here are always inlined: a copy of one that was compiled for a wide instruction set
// may not be linked into code for all CPUs.

// The number of pairs that `count` elements make.
[[gnu::always_inline]] constexpr int64_t pairs_of(int64_t count) { return (count + 1) / 2; }

// What products of T accumulate in.
template <typename T>
struct AccumulateIn {
  using type = float;
};
template <>
struct AccumulateIn<double> {
  using type = double;
};
template <typename T>
using Acc = typename AccumulateIn<T>::type;

// A matrix in memory; strides in elements.
template <typename T>
struct View {
  T* data;
  int64_t rows, cols;
  int64_t row_stride, col_stride;

  [[gnu::always_inline]] View block(int64_t row, int64_t col, int64_t n_rows,
                                    int64_t n_cols) const {
    return {data + row * row_stride + col * col_stride, n_rows, n_cols, row_stride, col_stride};
  }
  [[gnu::always_inline]] View transposed() const {
    return {data, cols, rows, col_stride, row_stride};
  }
};

// A right-hand factor (depth, cols) is read in panels of kPanel columns, a row of which is one
// cache line. Packed, a panel's rows follow one another and columns past the last are zero; a dense
// matrix of whole panels is read in place. The layout is the same for every instruction set. Of
// pairs a panel has half as many rows, each with two elements of 16 columns.
template <typename A>
inline constexpr int64_t kPanel = 64 / sizeof(A);

template <typename A>
struct Panels {
  A* data = nullptr;
  int64_t row_stride = 0, panel_stride = 0;  // in elements

  [[gnu::always_inline]] static Panels packed(A* data, int64_t depth) {
    return {data, kPanel<A>, depth * kPanel<A>};
  }
  // The panels from `row` and from the one that begins with column `col` on; col % kPanel == 0.
  [[gnu::always_inline]] Panels from(int64_t row, int64_t col) const {
    return {data + col / kPanel<A> * panel_stride + row * row_stride, row_stride, panel_stride};
  }
};

template <typename A>
[[gnu::always_inline]] constexpr int64_t round_up_to_panel(int64_t cols) {
  return (cols + kPanel<A> - 1) / kPanel<A> * kPanel<A>;
}

// Dropout's mask of a matrix, a bit an element: element k of a row is bit k % 8, the least
// significant first, of the row's byte k / 8. No data means that everything is kept.
struct Bits {
  const uint8_t* data = nullptr;
  int64_t row_stride = 0;  // in bytes

  // The mask from an element on; col % 8 == 0.
  [[gnu::always_inline]] Bits from(int64_t row, int64_t col) const {
    return {data == nullptr ? data : data + row * row_stride + col / 8, row_stride};
  }
};

// A frozen weight of codes. Of 4 bits, the first of a byte its upper half: each stands for
// values[code] times the scale of its block, 1 << block_bits elements, and blocks run on from one
// row to the next. Without values, signed bytes, which their row's scale multiplies. What a code
// stands for is rounded to the dtype T of x before it meets x.
struct Codes {
  const uint8_t* data = nullptr;
  const float* scale = nullptr;
  const float* values = nullptr;
  int64_t block_bits = 0;  // at least 5
  int64_t width = 0;       // elements in a row
};

// Some rows and columns of it.
struct Region {
  int64_t row, col, rows, cols;
};

// The activation of a gated MLP: x / (1 + e^-x); gelu by erf, and by tanh; the square of relu.
enum class Act : int8_t { kSilu, kGelu, kGeluTanh, kRelu2 };

// What a product is added to: nothing; a matrix of dense rows, such as the result itself; or, with
// a stride of 0, one row for all, as a bias is.
template <typename A>
struct Addend {
  const A* data = nullptr;
  int64_t row_stride = 0;

  [[gnu::always_inline]] Addend from(int64_t col) const {
    return {data == nullptr ? data : data + col, row_stride};
  }
};

// Another product, of the same rows and columns, that the sums of a product take along. Of no
// columns of `a` there is none.
template <typename W>
struct Along {
  View<const W> a = {};
  Panels<const W> b = {};

  [[gnu::always_inline]] Along from(int64_t row, int64_t rows, int64_t col) const {
    if (a.cols == 0) return {};
    return {a.block(row, 0, rows, a.cols), b.from(0, col)};
  }
};

// What will be read next and lies far away, as panels of as many rows as those at hand: one line of
// a row of each is asked for while those are worked on. Strides in bytes; it may reach past the end
// of what there is.
struct Ahead {
  const char* data = nullptr;
  int64_t row_stride = 0, panel_stride = 0;
};

}  // namespace lora_ext::cpu
