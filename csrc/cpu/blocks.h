// The operations on blocks that every CPU kernel here is made of, one table of them per
// instruction set. Nothing of torch is included: the files that implement these are compiled for
// wider instruction sets than the rest, and an inline function shared with the rest could be
// linked from them and crash an older CPU.
#pragma once

#include <cstdint>

#include "cpu/operands.h"

namespace lora_ext::cpu {

// T is the storage dtype, A = Acc<T> the arithmetic.
template <typename T, typename A = Acc<T>>
struct StorageOps {
  // dst (rows, cols; dense rows of `ld`) = src
  void (*load)(View<const T> src, A* dst, int64_t ld);
  // dst, packed panels of src.rows rows each, = src
  void (*pack)(View<const T> src, A* dst);
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

// lora_ext/dropout.py's _mix. Of a number of more than 32 bits it reads the lowest 48.
[[gnu::always_inline]] inline uint32_t mix(uint64_t n) {
  uint32_t low = static_cast<uint32_t>(n ^ n >> 16) * 0x21F0AAAD;
  low = (low ^ low >> 15) * 0x735A2D97;
  return low ^ low >> 15;
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
