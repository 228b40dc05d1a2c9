// The operations on blocks that every CPU kernel here is made of, one table of them per
// instruction set. Nothing of torch is included: the files that implement these are compiled for
// wider instruction sets than the rest, and an inline function shared with the rest could be
// linked from them and crash an older CPU.
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

// A few elements of a row: what each holds, and where the row of the other factor that it meets
// begins. Those rows are dense and StorageOps::few_width long, zeros past their last element.
template <typename A>
struct Few {
  const int32_t* at;
  A* values;
  int64_t count;
};

// The activation of a gated MLP: x / (1 + e^-x); gelu by erf, and by tanh; the square of relu.
enum class Act : int8_t { kSilu, kGelu, kGeluTanh, kRelu2 };

// T is the storage dtype, A = Acc<T> the arithmetic.
template <typename T, typename A = Acc<T>>
struct StorageOps {
  // dst (rows, cols; dense rows of `ld`) = src
  void (*load)(View<const T> src, A* dst, int64_t ld);
  // dst, packed panels of src.rows rows each, = src
  void (*pack)(View<const T> src, A* dst);
  // dst, dense rows of `ld`, = src; zeros past the last column, up to `ld`, which is whole panels
  void (*lay_out)(View<const T> src, A* dst, int64_t ld);
  // dst = scale * src (dense rows of `ld`) + bias (per column, may be null); with `add` it is added
  // to what dst holds
  void (*store)(const A* src, int64_t ld, A scale, const T* bias, bool add, View<T> dst);
  // values, of dense rows, become 0 where their bit is 0
  void (*keep)(Bits bits, View<T> values);
  // out (left.rows, right.rows; dense rows of `ld`) = left @ right.T, or += with `add`; both have
  // dense rows. Packs nothing, and reads `right` once for 3 or 4 rows of `left`: for few of those
  void (*dot)(View<const A> left, View<const T> right, A* out, int64_t ld, bool add);
  // out (left.rows, right.cols; dense rows of `ld`) = left @ right, as sums of right's rows, which
  // are dense. Packs nothing, and reads `right` from end to end once for 4 rows of `left`
  void (*combine_rows)(View<const A> left, View<const T> right, A* out, int64_t ld);
  // y (dense rows) += scale * a @ b, where y is read and written once and rounded at the end
  void (*update)(View<const A> a, Panels<const A> b, A scale, View<T> y);
  // sums (few_width) += a few elements times the rows that they meet
  void (*combine_few)(Few<A> few, const A* rows, A* sums);
  // a few elements += (left * factor) @ the rows that they meet, transposed; left has `cols`
  void (*sample_few)(const T* left, int64_t cols, const A* factor, const A* rows, Few<A> few);
  // The sum of squares of row + left @ low, where low has dense rows of `ld`, whole panels
  A (*squares)(const A* row, const A* left, int64_t rank, const A* low, int64_t ld);
  // z = scale * (y - sums), y += factor * z + bias; `cols` elements of each
  void (*rescale)(const A* sums, A scale, const A* factor, const A* bias, int64_t cols, T* y, T* z);
  int64_t few_width;
  // hidden = act(gate) * up, all of one shape
  void (*gated)(Act act, View<const T> gate, View<const T> up, View<T> hidden);
  // d_up = d_hidden * act(gate), d_gate = d_hidden * up * act'(gate); d_gate may be d_hidden
  void (*gated_gradients)(Act act, View<const T> d_hidden, View<const T> gate, View<const T> up,
                          View<T> d_gate, View<T> d_up);
  // dst (dense rows of `ld`) = a region of a weight of codes. Null for double, as are the next two
  void (*decode)(const Codes& codes, Region region, A* dst, int64_t ld);
  // out (left.rows, rows; dense rows of `ld`) = left @ rows of a weight of codes from `row` on,
  // transposed; left has dense rows. For few of them: the codes are read once for 8
  void (*dot_codes)(View<const A> left, const Codes& codes, int64_t row, int64_t rows, A* out,
                    int64_t ld);
  // out (left.rows, cols; dense rows of `ld`) = left @ some columns, from `col` on, of all rows of
  // a weight of codes; both the weight's rows and these columns are whole blocks, or of bytes whole
  // 64. The codes are read once for 8 rows of `left`, or 4
  void (*combine_codes)(View<const A> left, const Codes& codes, int64_t col, int64_t cols, A* out,
                        int64_t ld);
};

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

// W is the word of the factors: float, double or a pair.
template <typename W>
struct MultiplyOps {
  // c (a.rows, cols; dense rows of `ldc`) = scale * (a @ b + along.a @ along.b) + addend; a.cols
  // rows of b's panels are read, and with none of them c becomes the addend. The scale meets the
  // sums. Columns past `cols` are not written.
  void (*multiply)(View<const W> a, Panels<const W> b, int64_t cols, Acc<W>* c, int64_t ldc,
                   Acc<W> scale, Addend<Acc<W>> addend, Ahead ahead, Along<W> along);
  int64_t tile_panels;  // that it reads at a time
};

// Pairs made of a matrix of T; float is rounded to nearest even.
template <typename T>
struct PairLoadOps {
  // A left factor: dst (src.rows, pairs_of(src.cols); dense rows of `ld`) = src
  void (*load)(View<const T> src, Pair* dst, int64_t ld);
  // The same for a transposed matrix, whose columns are dense: dst is (pairs, rows), dense rows of
  // `ld`
  void (*load_transposed)(View<const T> src, Pair* dst, int64_t ld);
  // A right factor: packed panels of pairs_of(src.rows) rows each
  void (*pack)(View<const T> src, Pair* dst);
};

// bfloat16 by pairs, with sums of float. The depth of a factor below counts pairs.
struct PairOps {
  PairLoadOps<BFloat16> from_bfloat16;
  PairLoadOps<float> from_float;
  MultiplyOps<Pair> products;
  // y (dense rows) += scale * a @ b
  void (*update)(View<const Pair> a, Panels<const Pair> b, float scale, View<BFloat16> y);
  // out (left.rows, right.rows; dense rows of `ld`) = scale * left @ right.T, or += with `add`;
  // both factors have dense rows, which are read in place
  void (*dot)(View<const BFloat16> left, View<const BFloat16> right, float* out, int64_t ld,
              float scale, bool add);
  // out (left.rows, right.cols; dense rows of `ld`) = left @ right, as sums of pairs of right's
  // rows, which are dense
  void (*combine_rows)(View<const Pair> left, View<const BFloat16> right, float* out, int64_t ld);

  template <typename T>
  const PairLoadOps<T>& from() const;
};
template <>
inline const PairLoadOps<BFloat16>& PairOps::from<BFloat16>() const {
  return from_bfloat16;
}
template <>
inline const PairLoadOps<float>& PairOps::from<float>() const {
  return from_float;
}

// Rows of dropout's mask as bits, (cols + 7) / 8 bytes; bits past the end are 0.
struct MaskOps {
  // The hashes of `count` columns from one on.
  void (*columns)(int64_t from, int64_t count, const int64_t (&seed)[2], uint32_t* hashes);
  // Drawn: bit k is whether the hash of row ^ columns[k] is at least the threshold.
  void (*draw)(uint32_t row, const uint32_t* columns, int64_t cols, int32_t threshold,
               uint8_t* bits);
  // Packed: bit k is whether the k-th byte, `stride` apart, is not 0.
  void (*pack)(const uint8_t* mask, int64_t stride, int64_t cols, uint8_t* bits);
  // MT19937: the next 624 words of its state, in place; and bytes of 0 or 1, from two words each,
  // that are 1 where 53 bits of the two are below the threshold.
  void (*twist)(uint32_t* state);
  void (*bernoulli)(const uint32_t* words, int64_t count, int64_t threshold, uint8_t* kept);
};

inline constexpr int64_t kTwisterWords = 624;

struct Blocks {
  const char* name;
  StorageOps<float> float32;
  StorageOps<double> float64;
  StorageOps<BFloat16> bfloat16;
  StorageOps<Float16> float16;
  MultiplyOps<float> in_float;
  MultiplyOps<double> in_double;
  MaskOps mask;
  const PairOps* pairs;

  template <typename T>
  const StorageOps<T>& storage() const;
  template <typename A>
  const MultiplyOps<A>& products() const;
};

template <>
inline const StorageOps<float>& Blocks::storage<float>() const {
  return float32;
}
template <>
inline const StorageOps<double>& Blocks::storage<double>() const {
  return float64;
}
template <>
inline const StorageOps<BFloat16>& Blocks::storage<BFloat16>() const {
  return bfloat16;
}
template <>
inline const StorageOps<Float16>& Blocks::storage<Float16>() const {
  return float16;
}
template <>
inline const MultiplyOps<float>& Blocks::products<float>() const {
  return in_float;
}
template <>
inline const MultiplyOps<double>& Blocks::products<double>() const {
  return in_double;
}
template <>
inline const MultiplyOps<Pair>& Blocks::products<Pair>() const {
  return pairs->products;
}

extern const Blocks kBaselineBlocks;
#if defined(__x86_64__)
extern const Blocks kAvx2Blocks;
extern const Blocks kAvx512Blocks;
extern const Blocks kAvx512Bf16Blocks;
#endif

}  // namespace lora_ext::cpu
