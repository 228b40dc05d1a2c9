// The products of rank R: h and t, and what is made of them.
#pragma once

#include <cstdint>
#include <optional>

#include "cpu/tensors.h"

namespace lora_ext::cpu {

// h or t, (M, R): a left factor of y or dx, and with its rows as the summed dimension of dB or dA.
// Held as unrounded sums, or as a tensor of the base's dtype.
template <typename T>
class Hidden {
 public:
  using A = Acc<T>;

  // Uninitialised sums; in h itself where that has the sums' type and rows of whole panels.
  static Hidden sums(int64_t M, int64_t R, const Tensor* h) {
    Hidden hidden(M, R);
    if constexpr (std::is_same_v<T, A>) {
      if (h != nullptr && R % kPanel<A> == 0 && h->stride(0) == R) {
        hidden.sums_ = static_cast<A*>(h->mutable_data_ptr());
        return hidden;
      }
    }
    hidden.ld_ = round_up_to_panel<A>(R);
    hidden.memory_ = Scratch<A>(M * hidden.ld_);
    hidden.sums_ = hidden.memory_.get();
    return hidden;
  }
  // A matrix of the base's dtype, which it borrows.
  static Hidden of(View<const T> matrix) {
    Hidden hidden(matrix.rows, matrix.cols);
    hidden.rounded_ = matrix;
    return hidden;
  }

  // Some columns, borrowed.
  Hidden columns(int64_t col, int64_t cols) const {
    Hidden part(M_, cols);
    part.ld_ = ld_;
    if (sums_ != nullptr) {
      part.sums_ = sums_ + col;
    } else {
      part.rounded_ = rounded_.block(0, col, M_, cols);
    }
    return part;
  }

  // Call f with the matrix as a view.
  template <typename F>
  auto with_view(const F& f) const {
    if (sums_ == nullptr) return f(rounded_);
    return f(View<const A>{sums_, M_, R_, ld_, 1});
  }

  // Rows of the sums, to be written: whole panels, what pads a row becomes zero.
  View<A> rows(int64_t row, int64_t rows) const { return {sums_ + row * ld_, rows, ld_, ld_, 1}; }

  Left<A> left() const {
    return with_view([](auto view) { return Left<A>(view); });
  }

 private:
  Hidden(int64_t M, int64_t R) : M_(M), R_(R), ld_(R) {}

  int64_t M_, R_, ld_;
  Scratch<A> memory_;
  A* sums_ = nullptr;
  View<const T> rounded_{};
};

// Blocks of rows, in parallel.
template <typename F>
void for_each_row_block(int64_t rows, const F& body) {
  for_each_part(rows, even_part(rows, kRowBlock, 6, 6, num_threads()), body);
}

// A matrix of few rows as dense rows of sums, in place or copied to `scratch`.
template <typename T>
View<const Acc<T>> widened(View<const T> matrix, Scratch<Acc<T>>* scratch) {
  if constexpr (std::is_same_v<T, Acc<T>>) {
    if (has_dense_rows(matrix)) return matrix;
  }
  *scratch = Scratch<Acc<T>>(matrix.rows * matrix.cols);
  blocks().storage<T>().load(matrix, scratch->get(), matrix.cols);
  return {scratch->get(), matrix.rows, matrix.cols, matrix.cols, 1};
}

// All of y hangs on the few sums of h, so these are short: of 384 terms a row the rounding breaks
// the error rule at rank 1 under an alpha of 64.
inline constexpr int64_t kShrinkDepth = 64;

// h = (keep * x) @ A, or t = dy @ B.T, by rows.
template <typename T>
class Shrink {
  using A = Acc<T>;

 public:
  // `factor` is A, or B with `transposed`.
  Shrink(View<const T> left, Bits keep, const Operand& factor, bool transposed)
      : left_(left), keep_(keep), factor_(factor), transposed_(transposed) {
    with_factor([&](auto view) {
      const Sizes sizes = {
          left.rows,           left.cols, view.cols, false, has_dense_rows(view.transposed()),
          keep.data != nullptr};
      way_ = way_of(routes<T>(), Product::kShrink, sizes);
      if (way_ == Way::kStrips) packed_.emplace(Right<A>(view, left.rows));
    });
  }

  bool by_library() const { return way_ == Way::kLibrary; }

  // Some rows of the sums.
  void rows(int64_t row, View<A> to) const {
    const View<const T> left = left_.block(row, 0, to.rows, left_.cols);
    if (way_ == Way::kStream) {  // a matrix whose columns are dense, in place
      Scratch<A> copy;
      const View<const A> wide = widened(left, &copy);
      with_factor([&](auto view) {
        using TF = std::remove_cvref_t<decltype(*view.data)>;
        blocks().storage<TF>().dot(wide, view.transposed(), to.data, to.row_stride, false);
      });
      return;
    }
    const Right<A> right = packed_->right().from(0, to.cols);
    const Leg<A> leg = {Left<A>(left, keep_.from(row, 0)), right, 1, {}, kShrinkDepth};
    product<A>(leg, Out<A>{to});
  }

 private:
  template <typename F>
  void with_factor(const F& f) const {
    with_adapter<T>(factor_, [&](auto view) { f(transposed_ ? view.transposed() : view); });
  }

  const View<const T> left_;
  const Bits keep_;
  const Operand& factor_;
  const bool transposed_;
  Way way_;
  std::optional<Packed<A>> packed_;
};

// to += leg's product, for some rows of a base product of PyTorch's.
template <typename T>
void expand(const Leg<Acc<T>>& leg, View<T> to) {
  // Sums in place stream; others go through a tile of sums, which stays in cache.
  const int64_t strip = std::is_same_v<T, Acc<T>> ? std::max<int64_t>(to.cols, 1) : kStripCols;
  for (int64_t col = 0; col < to.cols; col += strip) {
    const int64_t cols = std::min(strip, to.cols - col);
    product<T>(leg.block(0, to.rows, col, cols),
               Out<T>{to.block(0, col, to.rows, cols), nullptr, true});
  }
}

// out (R, C) = scale * hidden.T @ (keep * right), right (M, C): dB = h.T @ dy, dA.T = t.T @ x.
template <typename T, typename TOut>
void gradient(const Hidden<T>& hidden, View<const T> right, Bits keep, double scale,
              View<TOut> out) {
  using A = Acc<T>;
  hidden.with_view([&](auto view) {
    const int64_t M = right.rows, R = out.rows;
    if (M <= kFewRows && out.col_stride != 1 && out.row_stride == 1 && keep.data == nullptr) {
      // Of few rows one product, whose result is written as it lies.
      const Packed<A> factor(Right<A>(view, kFewRows));
      const Leg<A> leg = {Left<A>(right.transposed()), factor.right(), scale};
      for_each_part(out.cols, even_part(out.cols, out.cols, 512, 16, num_threads()),
                    [&](int64_t row, int64_t rows) {
                      product<TOut>(leg.block(row, rows, 0, R),
                                    Out<TOut>{out.transposed().block(row, 0, rows, R)});
                    });
      return;
    }
    const Left<A> left(view.transposed());
    const int64_t most = R <= kInPlaceRank ? kInPlaceCols : kPackedCols;
    for_each_part(
        out.cols, even_part(out.cols, most, 32, 16, num_threads()), [&](int64_t col, int64_t cols) {
          const Right<A> factor(right.block(0, col, M, cols), R, kInPlaceRank, keep.from(0, col));
          const int64_t step = factor.is_ready() ? kInPlaceDepth : kDepth;
          const Leg<A> leg = {left, factor, scale, {}, step};
          product<TOut>(leg, Out<TOut>{out.block(0, col, R, cols)});
        });
  });
}

}  // namespace lora_ext::cpu
