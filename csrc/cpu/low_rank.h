// The products of rank R: h and t, and what is made of them.
#pragma once

#include <cstdint>
#include <optional>

#include "cpu/tensors.h"

namespace lora_ext::cpu {

// h or t, (M, R): a left factor of y or dx, and with its rows as the summed dimension of dB or dA.
// Held as what products take, unrounded sums or for pairs elements of the base's dtype, or as a
// tensor of that dtype.
template <typename T, typename P>
class Hidden {
 public:
  using Element = std::conditional_t<kIsPair<P>, T, P>;

  // Uninitialised; in h itself where that holds such elements, sums in rows of whole panels.
  static Hidden in(int64_t M, int64_t R, const Tensor* h) {
    Hidden hidden(M, R);
    if constexpr (std::is_same_v<T, Element>) {
      if (h != nullptr && (kIsPair<P> || (R % kPanel<P> == 0 && h->stride(0) == R))) {
        hidden.made_ = static_cast<T*>(h->mutable_data_ptr());
        hidden.ld_ = h->stride(0);
        return hidden;
      }
    }
    hidden.ld_ = kIsPair<P> ? 2 * pairs_of(R) : round_up_to_panel<P>(R);
    hidden.memory_ = Scratch<Element>(M * hidden.ld_);
    hidden.made_ = hidden.memory_.get();
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
    if (made_ != nullptr) {
      part.made_ = made_ + col;
    } else {
      part.rounded_ = rounded_.block(0, col, M_, cols);
    }
    return part;
  }

  // Call f with the matrix as a view.
  template <typename F>
  auto with_view(const F& f) const {
    if (made_ == nullptr) return f(rounded_);
    return f(View<const Element>{made_, M_, R_, ld_, 1});
  }

  // Rows of what is held, to be written. Of sums whole panels: what pads a row becomes zero.
  View<Element> rows(int64_t row, int64_t rows) const {
    return {made_ + row * ld_, rows, kIsPair<P> ? R_ : ld_, ld_, 1};
  }

  Left<P> left() const {
    return with_view([](auto view) { return Left<P>(view); });
  }

 private:
  Hidden(int64_t M, int64_t R) : M_(M), R_(R), ld_(R) {}

  int64_t M_, R_, ld_;
  Scratch<Element> memory_;
  Element* made_ = nullptr;
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

// The same for pairs, which need no widening: rows of elements.
inline View<const BFloat16> with_dense_rows(View<const BFloat16> matrix, Scratch<Pair>* scratch) {
  if (has_dense_rows(matrix)) return matrix;
  *scratch = Scratch<Pair>(matrix.rows * pairs_of(matrix.cols));
  return load_kept(matrix, {}, scratch->get());
}

// A left factor of few rows that dot products read: in place, or copied to dense rows. Widened to
// sums, or, where products take pairs and `widen` does not ask for that, as elements.
template <typename T, typename P>
class FewRows {
  using A = Acc<P>;

 public:
  FewRows(View<const T> rows, bool widen) {
    if constexpr (kIsPair<P>) {
      if (!widen) {
        elements_ = with_dense_rows(rows, &copy_);
        return;
      }
    }
    wide_ = cpu::widened(rows, &wide_copy_);
  }

  View<const A> widened() const { return wide_; }

  // out (rows, right.rows; dense rows of `ld`) = rows @ right.T, where `right` has dense rows.
  template <typename TF>
  void dot(View<const TF> right, A* out, int64_t ld) const {
    if constexpr (kIsPair<P> && std::is_same_v<T, TF>) {
      if (elements_.data != nullptr) {
        return blocks().pairs->dot(elements_, right, out, ld, 1, false);
      }
    }
    blocks().storage<TF>().dot(wide_, right, out, ld, false);
  }

 private:
  Scratch<A> wide_copy_;
  Scratch<P> copy_;
  View<const A> wide_{};
  View<const T> elements_{};
};

// All of y hangs on the few sums of h, so these are short: of 384 terms a row the rounding breaks
// the error rule at rank 1 under an alpha of 64. Of pairs they are rounded to bfloat16 anyway.
template <typename P>
inline constexpr int64_t kShrinkDepth = kIsPair<P> ? kDepth : 64;

// h = (keep * x) @ A, or t = dy @ B.T, by rows.
template <typename T, typename P>
class Shrink {
  using Element = typename Hidden<T, P>::Element;

 public:
  // `factor` is A, or B with `transposed`.
  Shrink(View<const T> left, Bits keep, const Operand& factor, bool transposed)
      : left_(left), keep_(keep), factor_(factor), transposed_(transposed) {
    with_factor([&](auto view) {
      const Sizes sizes = {
          left.rows,           left.cols, view.cols, false, has_dense_rows(view.transposed()),
          keep.data != nullptr};
      way_ = way_of(routes<T>(), Product::kShrink, sizes);
      if (way_ == Way::kStrips) packed_.emplace(Right<P>(view, left.rows));
    });
  }

  bool by_library() const { return way_ == Way::kLibrary; }

  // Some rows.
  void rows(int64_t row, View<Element> to) const {
    const View<const T> left = left_.block(row, 0, to.rows, left_.cols);
    if (way_ == Way::kStream) return of_few_rows(left, to);
    const Right<P> right = packed_->right().from(0, to.cols);
    const Leg<P> leg = {Left<P>(left, keep_.from(row, 0)), right, 1, {}, kShrinkDepth<P>};
    const bool few_steps = !kIsPair<P> && to.cols <= kShrinkCols;
    product<Element>(leg, Out<Element>{to}, few_steps ? kShrinkRows : kLoneRows);
  }

 private:
  // With a factor whose columns are dense, in place.
  void of_few_rows(View<const T> left, View<Element> to) const {
    constexpr bool in_place = std::is_same_v<Element, Acc<P>>;
    const Scratch<Acc<P>> apart(in_place ? 0 : to.rows * to.cols);
    Acc<P>* sums = apart.get();
    int64_t ld = to.cols;
    if constexpr (in_place) sums = to.data, ld = to.row_stride;
    with_factor([&](auto view) {
      using TF = std::remove_cvref_t<decltype(*view.data)>;
      FewRows<T, P>(left, !std::is_same_v<T, TF>).dot(view.transposed(), sums, ld);
    });
    if constexpr (!in_place) blocks().storage<T>().store(sums, ld, 1, nullptr, false, to);
  }

  template <typename F>
  void with_factor(const F& f) const {
    with_adapter<T>(factor_, [&](auto view) { f(transposed_ ? view.transposed() : view); });
  }

  const View<const T> left_;
  const Bits keep_;
  const Operand& factor_;
  const bool transposed_;
  Way way_;
  std::optional<Packed<P>> packed_;
};

// Rows of h from `row` on, and the same in `to`, rows of the tensor h, unless they are held in it.
template <typename T, typename P>
void make_hidden(const Shrink<T, P>& shrink, const Hidden<T, P>& hidden, int64_t row, View<T> to) {
  const auto made = hidden.rows(row, to.rows);
  shrink.rows(row, made);
  if constexpr (!kIsPair<P>) {
    if (static_cast<const void*>(made.data) == to.data) return;
    blocks().storage<T>().store(made.data, made.row_stride, 1, nullptr, false, to);
  }
}

// to += leg's product, for some rows of a base product of PyTorch's.
template <typename T, typename P>
void expand(const Leg<P>& leg, View<T> to) {
  if constexpr (kIsPair<P>) {
    if (leg.keep.data == nullptr && leg.right.is_ready() && to.col_stride == 1) {
      const int64_t rows = leg.left.rows(), depth = leg.left.depth();
      const Scratch<P> copy(leg.left.in_place() ? 0 : rows * words_of<P>(depth));
      return blocks().pairs->update(leg.left.block(0, 0, rows, depth, copy.get()),
                                    leg.right.ready(), static_cast<float>(leg.scale), to);
    }
  }
  // Sums in place stream; others go through a tile of sums, which stays in cache.
  const int64_t strip = std::is_same_v<T, Acc<P>> ? std::max<int64_t>(to.cols, 1) : kStripCols;
  for (int64_t col = 0; col < to.cols; col += strip) {
    const int64_t cols = std::min(strip, to.cols - col);
    product<T>(leg.block(0, to.rows, col, cols),
               Out<T>{to.block(0, col, to.rows, cols), nullptr, true});
  }
}

// out (R, C) = scale * hidden.T @ (keep * right), right (M, C): dB = h.T @ dy, dA.T = t.T @ x.
template <typename T, typename P, typename TOut>
void gradient(const Hidden<T, P>& hidden, View<const T> right, Bits keep, double scale,
              View<TOut> out) {
  hidden.with_view([&](auto view) {
    const int64_t M = right.rows, R = out.rows;
    if (M <= kFewRows && out.col_stride != 1 && out.row_stride == 1 && keep.data == nullptr) {
      // Of few rows one product, whose result is written as it lies.
      const Packed<P> factor(Right<P>(view, kFewRows));
      const Leg<P> leg = {Left<P>(right.transposed()), factor.right(), scale};
      for_each_part(out.cols, even_part(out.cols, out.cols, 512, 16, num_threads()),
                    [&](int64_t row, int64_t rows) {
                      product<TOut>(leg.block(row, rows, 0, R),
                                    Out<TOut>{out.transposed().block(row, 0, rows, R)});
                    });
      return;
    }
    const Left<P> left(view.transposed());
    const int64_t most = R <= kInPlaceRank && !kIsPair<P> ? kInPlaceCols : kPackedCols;
    for_each_part(
        out.cols, even_part(out.cols, most, 32, 16, num_threads()), [&](int64_t col, int64_t cols) {
          const Right<P> factor(right.block(0, col, M, cols), R, kInPlaceRank, keep.from(0, col));
          Leg<P> leg = {left, factor, scale};
          if (factor.is_ready()) leg.step = kInPlaceDepth;
          product<TOut>(leg, Out<TOut>{out.block(0, col, R, cols)});
        });
  });
}

}  // namespace lora_ext::cpu
