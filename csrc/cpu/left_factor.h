// The left factor of a product, whatever it is stored as, as the words P that multiply reads.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/isa.h"

namespace lora_ext::cpu {

// A word P is what multiply takes a step with: an element, or, where an instruction multiplies
// several neighbours along the summed dimension, these together. The words of so many elements.
template <typename P>
constexpr int64_t words_of(int64_t elements) {
  return elements;
}
template <>
constexpr int64_t words_of<Pair>(int64_t elements) {
  return pairs_of(elements);
}

template <typename P>
inline constexpr bool kIsPair = std::is_same_v<P, Pair>;

// dst, rows of pairs, = a matrix with dropout's mask on it; returns them as elements.
template <typename T>
View<const BFloat16> load_kept(View<const T> from, Bits keep, Pair* dst) {
  const int64_t words = pairs_of(from.cols);
  blocks().pairs->from<T>().load(from, dst, words);
  const View<BFloat16> kept = {&dst->even, from.rows, from.cols, 2 * words, 1};
  if (keep.data != nullptr) blocks().bfloat16.keep(keep, kept);
  return {kept.data, kept.rows, kept.cols, kept.row_stride, 1};
}

// A block of a left factor: of `count` parts, part i has every count-th row from row i on.
template <typename P>
struct Parts {
  View<const P> views[2] = {};
  int64_t count = 1;
};

// Of what is added to a block's product or taken along by it, the rows of its part i of `count`.
template <typename A>
Addend<A> part_of(Addend<A> addend, int64_t i, int64_t count) {
  if (addend.data == nullptr) return {};
  return {addend.data + i * addend.row_stride, count * addend.row_stride};
}
template <typename P>
Along<P> part_of(Along<P> along, int64_t i, int64_t count) {
  auto& [data, rows, cols, row_stride, col_stride] = along.a;
  if (cols == 0) return {};
  data += i * row_stride;
  rows = (rows - i + count - 1) / count;
  row_stride *= count;
  return along;
}

// A left factor (rows, depth) with dropout's mask on it: read in place, or by blocks copied to P.
template <typename P>
class Left {
 public:
  template <typename T>
  explicit Left(View<const T> matrix, Bits keep = {})
      : data_(reinterpret_cast<const char*>(matrix.data)),
        rows_(matrix.rows),
        depth_(matrix.cols),
        row_stride_(matrix.row_stride),
        col_stride_(matrix.col_stride),
        keep_(keep),
        element_(sizeof(T)),
        rows_of_pairs_(kIsPair<P> && std::is_same_v<T, BFloat16> && matrix.col_stride == 1 &&
                       keep.data == nullptr),
        read_(holds_words(matrix) && keep.data == nullptr ? nullptr : &copy<T>) {}

  int64_t rows() const { return rows_; }
  int64_t depth() const { return depth_; }
  bool in_place() const { return read_ == nullptr; }
  bool has_dense_rows() const { return col_stride_ == 1; }

  Left from(int64_t row, int64_t rows) const {
    Left part = *this;
    part.data_ += row * row_stride_ * element_;
    part.rows_ = rows;
    part.keep_ = keep_.from(row, 0);
    return part;
  }

  // Some rows, and steps of the summed dimension. `scratch` holds that many words unless the
  // factor is read in place; k % 8 == 0.
  View<const P> block(int64_t row, int64_t k, int64_t rows, int64_t depth, P* scratch) const {
    const char* data = data_ + (row * row_stride_ + k * col_stride_) * element_;
    if (!in_place())
      return read_({data, rows, depth, row_stride_, col_stride_}, keep_.from(row, k), scratch);
    const auto* words = reinterpret_cast<const P*>(data);
    if constexpr (kIsPair<P>) return {words, rows, words_of<P>(depth), row_stride_ / 2, 1};
    return {words, rows, depth, row_stride_, col_stride_};
  }

  // The same for a product that takes the rows in parts: pairs of an even number of steps are read
  // in place too where rows lie an odd number of elements apart. Every second row then begins
  // within a word of the others, and is in a part of its own.
  Parts<P> parts(int64_t row, int64_t k, int64_t rows, int64_t depth, P* scratch) const {
    if (in_place() || !rows_of_pairs_ || depth % 2 != 0) {
      return {{block(row, k, rows, depth, scratch)}, 1};
    }
    const int64_t count = row_stride_ % 2 == 0 ? 1 : 2;
    Parts<P> parts = {{}, count};
    for (int64_t i = 0; i < count; ++i) {
      const char* data = data_ + ((row + i) * row_stride_ + k) * element_;
      parts.views[i] = {reinterpret_cast<const P*>(data), (rows - i + count - 1) / count,
                        words_of<P>(depth), count * row_stride_ / 2, 1};
    }
    return parts;
  }

 private:
  // Whether a matrix's memory can be read as words. Pairs are neighbours in a row, and an odd
  // element at its end would take what follows for its neighbour.
  template <typename T>
  static bool holds_words(View<const T> matrix) {
    if constexpr (!kIsPair<P>) return std::is_same_v<T, P>;
    return std::is_same_v<T, BFloat16> && matrix.col_stride == 1 && matrix.cols % 2 == 0 &&
           matrix.row_stride % 2 == 0;
  }

  template <typename T>
  static View<const P> copy(View<const char> bytes, Bits keep, P* scratch) {
    const View<const T> from = {reinterpret_cast<const T*>(bytes.data), bytes.rows, bytes.cols,
                                bytes.row_stride, bytes.col_stride};
    const bool columns = keep.data == nullptr && from.row_stride == 1 && from.col_stride != 1;
    if constexpr (kIsPair<P>) {
      return columns ? transposed_pairs(from, scratch) : pairs(from, keep, scratch);
    } else {
      return elements(from, columns, keep, scratch);
    }
  }

  template <typename T>
  static View<const P> elements(View<const T> from, bool columns, Bits keep, P* scratch) {
    const View<const T> rows = columns ? from.transposed() : from;
    const View<P> to = {scratch, rows.rows, rows.cols, rows.cols, 1};
    blocks().storage<T>().load(rows, scratch, rows.cols);
    if (keep.data != nullptr) blocks().storage<P>().keep(keep, to);
    const View<const P> read = {scratch, to.rows, to.cols, to.row_stride, to.col_stride};
    return columns ? read.transposed() : read;
  }

  template <typename T>
  static View<const P> pairs(View<const T> from, Bits keep, P* scratch) {
    const int64_t words = pairs_of(from.cols);
    load_kept(from, keep, scratch);
    return {scratch, from.rows, words, words, 1};
  }

  template <typename T>
  static View<const P> transposed_pairs(View<const T> from, P* scratch) {
    blocks().pairs->from<T>().load_transposed(from, scratch, from.rows);
    return {scratch, from.rows, pairs_of(from.cols), 1, from.rows};
  }

  const char* data_;
  int64_t rows_, depth_, row_stride_, col_stride_;
  Bits keep_;
  int64_t element_;
  bool rows_of_pairs_;
  View<const P> (*read_)(View<const char>, Bits, P*);
};

}  // namespace lora_ext::cpu
