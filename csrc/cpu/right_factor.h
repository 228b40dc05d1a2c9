// The right factor of a product, whatever it is stored as, as panels of the words P that multiply
// reads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/isa.h"
#include "cpu/left_factor.h"
#include "cpu/parallel.h"
#include "cpu/route.h"
#include "cpu/scratch.h"

namespace lora_ext::cpu {

// A matrix as panels in place, if its layout allows that and a left factor of `uses` rows, at most
// `most`, makes it worth it.
template <typename P, typename T>
bool reads_in_place(View<const T> matrix, int64_t uses, int64_t most) {
  return std::is_same_v<T, P> && uses <= most && matrix.col_stride == 1 &&
         matrix.cols % kPanel<P> == 0;
}

// A right factor (depth, cols) with dropout's mask on it: in panels already, in place or packed; or
// something that fills panels. A new format of a weight is a new fill.
template <typename P>
class Right {
 public:
  // In panels.
  Right(Panels<const P> ready, int64_t depth, int64_t cols, bool far)
      : ready_(ready), is_ready_(true), far_(far), depth_(depth), cols_(cols) {}

  // A matrix, for a left factor of `uses` rows; in place for at most `most` of them.
  template <typename T>
  Right(View<const T> matrix, int64_t uses, int64_t most = kInPlaceUses, Bits keep = {})
      : is_ready_(keep.data == nullptr && reads_in_place<P>(matrix, uses, most)),
        far_(matrix.rows * matrix.cols * static_cast<int64_t>(sizeof(T)) > kFarBytes),
        depth_(matrix.rows),
        cols_(matrix.cols),
        data_(reinterpret_cast<const char*>(matrix.data)),
        row_stride_(matrix.row_stride),
        col_stride_(matrix.col_stride),
        element_(sizeof(T)),
        keep_(keep),
        fill_(&pack<T>) {
    if constexpr (std::is_same_v<T, P>) {
      if (is_ready_) ready_ = {matrix.data, matrix.row_stride, kPanel<P>};
    }
  }

  // A weight of codes, of which T is x's dtype: with `transposed` its transpose.
  template <typename T>
  static Right of_codes(const Codes& codes, int64_t depth, int64_t cols, bool transposed, T) {
    Right right({}, depth, cols, false);
    right.is_ready_ = false;
    right.codes_ = codes;
    right.fill_codes_ = transposed ? &decode_transposed<T> : &decode<T>;
    return right;
  }

  int64_t depth() const { return depth_; }
  int64_t cols() const { return cols_; }
  bool is_ready() const { return is_ready_; }
  // Whether it is read as panels where a matrix lies.
  bool in_place() const { return is_ready_ && fill_ != nullptr; }
  bool is_far() const { return far_; }
  bool has_dense_rows() const { return col_stride_ == 1; }
  Panels<const P> ready() const { return ready_; }

  // The columns from `col` on; col % kPanel == 0.
  Right from(int64_t col, int64_t cols) const {
    Right part = *this;
    part.cols_ = cols;
    if (is_ready_) part.ready_ = ready_.from(0, col);
    part.data_ += col * col_stride_ * element_;
    part.first_col_ += col;
    part.keep_ = keep_.from(0, col);
    return part;
  }

  // Packed panels of words_of(depth) rows = rows k to k + depth of columns `col` to `col` + `cols`.
  void fill(int64_t k, int64_t depth, int64_t col, int64_t cols, P* panels) const {
    if (fill_codes_ != nullptr) {
      return fill_codes_(codes_, {k, first_col_ + col, depth, cols}, panels);
    }
    fill_({address(k, col), depth, cols, row_stride_, col_stride_}, keep_.from(k, col), panels);
  }

  // For prefetching: where an element of what fill reads lies, and how far apart rows are in bytes.
  const char* address(int64_t k, int64_t col) const {
    return data_ + (k * row_stride_ + col * col_stride_) * element_;
  }
  int64_t row_bytes() const { return row_stride_ * element_; }
  int64_t element_bytes() const { return element_; }

 private:
  template <typename T>
  static void pack(View<const char> bytes, Bits keep, P* panels) {
    const View<const T> from = {reinterpret_cast<const T*>(bytes.data), bytes.rows, bytes.cols,
                                bytes.row_stride, bytes.col_stride};
    if constexpr (kIsPair<P>) {
      if (keep.data == nullptr) return blocks().pairs->from<T>().pack(from, panels);
      const Scratch<P> kept(from.rows * pairs_of(from.cols));
      return blocks().pairs->from_bfloat16.pack(load_kept(from, keep, kept.get()), panels);
    } else {
      pack_elements(from, keep, panels);
    }
  }

  template <typename T>
  static void pack_elements(View<const T> from, Bits keep, P* panels) {
    blocks().storage<T>().pack(from, panels);
    if (keep.data == nullptr) return;
    for (int64_t col = 0; col < from.cols; col += kPanel<P>, panels += from.rows * kPanel<P>) {
      const int64_t cols = std::min(kPanel<P>, from.cols - col);
      blocks().storage<P>().keep(keep.from(0, col), {panels, from.rows, cols, kPanel<P>, 1});
    }
  }

  // Panels of weight.T, whose columns are the weight's rows: a panel of these at a time. What codes
  // stand for is of the dtype T already, so that pairs round nothing.
  template <typename T>
  static void decode_transposed(const Codes& codes, Region part, P* panels) {
    const int64_t words = words_of<P>(part.rows);
    const Scratch<float> rows(kPanel<P> * part.rows);
    for (int64_t j = 0; j < part.cols; j += kPanel<P>, panels += words * kPanel<P>) {
      const int64_t n = std::min(kPanel<P>, part.cols - j);
      blocks().storage<T>().decode(codes, {part.col + j, part.row, n, part.rows}, rows.get(),
                                   part.rows);
      pack_decoded({rows.get(), part.rows, n, 1, part.rows}, panels);
    }
  }

  // Panels of the weight: the rows of a word at a time, spread over them.
  template <typename T>
  static void decode(const Codes& codes, Region part, P* panels) {
    constexpr int64_t kRows = kIsPair<P> ? 2 : 1;
    const int64_t width = round_up_to_panel<P>(part.cols), words = words_of<P>(part.rows);
    const Scratch<float> rows(kRows * width);
    std::fill_n(rows.get(), kRows * width, 0.0f);
    const Scratch<P> line(kIsPair<P> ? width : 0);
    for (int64_t p = 0; p < words; ++p) {
      const int64_t row = p * kRows, n = std::min(kRows, part.rows - row);
      blocks().storage<T>().decode(codes, {part.row + row, part.col, n, part.cols}, rows.get(),
                                   width);
      const P* from = line.get();
      if constexpr (kIsPair<P>) {
        pack_decoded({rows.get(), n, width, width, 1}, line.get());
      } else {
        from = rows.get();
      }
      for (int64_t j = 0; j < width; j += kPanel<P>) {
        std::copy_n(from + j, kPanel<P>, panels + j * words + p * kPanel<P>);
      }
    }
  }

  static void pack_decoded(View<const float> decoded, P* panels) {
    if constexpr (kIsPair<P>) {
      blocks().pairs->from_float.pack(decoded, panels);
    } else {
      blocks().float32.pack(decoded, panels);
    }
  }

  Panels<const P> ready_;
  bool is_ready_, far_;
  int64_t depth_, cols_;
  const char* data_ = nullptr;
  int64_t row_stride_ = 0, col_stride_ = 0, element_ = sizeof(P);
  Bits keep_;
  void (*fill_)(View<const char>, Bits, P*) = nullptr;
  Codes codes_;
  int64_t first_col_ = 0;
  void (*fill_codes_)(const Codes&, Region, P*) = nullptr;
};

// Fill `panels` with columns of a right factor, by several threads where that is worth it.
template <typename P>
void fill_panels(const Right<P>& right, P* panels) {
  constexpr int64_t kWorthThreads = 1 << 16;  // elements
  const int64_t cols = right.cols();
  const int64_t most = right.depth() * cols < kWorthThreads ? std::max<int64_t>(cols, 1) : 64;
  for_each_part(cols, round_up_to_panel<P>(most), [&](int64_t col, int64_t n_cols) {
    right.fill(0, right.depth(), col, n_cols, panels + col * words_of<P>(right.depth()));
  });
}

// A right factor packed whole unless it is read in place, for all threads: A and B.
template <typename P>
class Packed {
 public:
  explicit Packed(const Right<P>& right) : right_(right) {
    if (right.is_ready()) return;
    const int64_t rows = words_of<P>(right.depth());
    memory_ = Scratch<P>(rows * round_up_to_panel<P>(right.cols()));
    fill_panels(right, memory_.get());
    right_ = {Panels<const P>::packed(memory_.get(), rows), right.depth(), right.cols(), false};
  }
  const Right<P>& right() const { return right_; }

 private:
  Scratch<P> memory_;
  Right<P> right_;
};

}  // namespace lora_ext::cpu
