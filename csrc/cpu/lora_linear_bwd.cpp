// Backward on the CPU, with t = dy @ B.T:
//   dx = dy @ weight + alpha * t @ A.T     dA = alpha * x.T @ t     dB = alpha * h.T @ dy
//   dweight = dy.T @ x                     dbias = sum of dy over its rows
// Only what `needs` asks for is computed. The products with the weight go the ways of the forward.
#include "cpu/tensors.h"
#include "lora_linear.h"

namespace lora_ext {
namespace cpu {
namespace {

// Columns that one thread has at a time of a product summed over all rows (dA, dB): of one that
// packs them, and of one that reads them where they lie.
constexpr int64_t kColumnBlock = 128, kInPlaceColumns = 512;

// Up to this many rows, t and dx read B, A and the weight as they lie: t and the low-rank part of
// dx are dot products with rows (packing those takes 30 us at 2048 x 16, more than using them), and
// the rest of dx combines the weight's rows as they stream by.
constexpr int64_t kRowsThatStream = 4;

// out (R, cols) = scale * left.T @ right, left (M, R; dense rows of `ld`), split over columns.
template <typename T, typename TOut>
void transposed_product(const Acc<T>* left, int64_t ld, int64_t R, View<const T> right,
                        double scale, View<TOut> out) {
  using Sum = Acc<T>;
  const int64_t most = R <= kInPlaceRank ? kInPlaceColumns : kColumnBlock;
  const int64_t part = even_part(right.cols, most, 32, kPanel<float>);
  for_each_part(right.cols, part, [&](int64_t col, int64_t cols) {
    const Scratch<Sum> sum(R * cols);
    skinny_transposed_product<T>(left, ld, R, right.block(0, col, right.rows, cols), sum.get(),
                                 cols);
    cpu::blocks().storage<TOut>().store(sum.get(), cols, Sum(scale), nullptr, false,
                                        out.block(0, col, R, cols));
  });
}

// The same into the gradient of an adapter, which may be float over a half base.
template <typename T>
void adapter_gradient(const Acc<T>* left, int64_t ld, int64_t R, View<const T> right, double alpha,
                      const Tensor& out, bool transposed) {
  const auto write = [&](auto storage) {
    using TOut = decltype(storage);
    const View<TOut> view = matrix<TOut>(out);
    transposed_product<T, TOut>(left, ld, R, right, alpha, transposed ? view.transposed() : view);
  };
  if constexpr (sizeof(T) == 2) {
    if (out.scalar_type() == ScalarType::Float) return write(float{});
  }
  write(T{});
}

template <typename T>
class Backward {
  using Sum = Acc<T>;

 public:
  Backward(const Shape& shape, const Tensor& dy, double alpha)
      : shape_(shape),
        dy_(dy),
        dy_view_(matrix<const T>(dy)),
        alpha_(alpha),
        ld_(round_up_to_panel<Sum>(shape.R)) {}

  void dB(const Tensor& h, const Tensor& out) const {
    const auto [M, K, N, R] = shape_;
    const Scratch<Sum> left(M * ld_);
    blocks().storage<T>().load(matrix<const T>(h), left.get(), ld_);
    if (takes_few_rows(out)) {
      scale(left.get());
      const RightFactor<Sum> right(dy_view_, R);
      const View<const Sum> left_t = {left.get(), R, M, 1, ld_};
      blocks().products<Sum>().multiply(left_t, right.from(0, 0), N,
                                        static_cast<Sum*>(out.data_ptr()), N, Sum(1), {}, {});
      return;
    }
    adapter_gradient<T>(left.get(), ld_, R, dy_view_, alpha_, out, false);
  }

  void dbias(Tensor out) const {
    const int64_t rows[] = {0};
    torch::stable::sum_out(out, dy_, rows);
  }

  void dweight(const Tensor& x, const Tensor& out) const {
    // Ours reads dy down its columns: 14.9 ms for 12.1 at 960 x 768 x 768 in float.
    if (sizeof(T) > 2 || library_product_is_faster<T>()) {
      mm_out(transposed(dy_), x, out);
      return;
    }
    const View<const T> dy_t = dy_view_.transposed(), x_view = matrix<const T>(x);
    const View<T> out_view = matrix<T>(out);
    for_each_strip(shape_.N, shape_.K, [&](int64_t row, int64_t rows, int64_t col, int64_t cols) {
      product_strip<T>(dy_t.block(row, 0, rows, shape_.M), x_view.block(0, col, shape_.M, cols),
                       is_far(x_view), nullptr, out_view.block(row, col, rows, cols), nullptr);
    });
  }

  // alpha * t = alpha * dy @ B.T, for dA and dx.
  Scratch<Sum> alpha_t(const Tensor& B) const {
    const auto [M, K, N, R] = shape_;
    Scratch<Sum> out(M * ld_);
    unscaled_t(B, out.get());
    scale(out.get());
    return out;
  }

  void dA(const Scratch<Sum>& alpha_t, const Tensor& x, const Tensor& out) const {
    const auto [M, K, N, R] = shape_;
    if (takes_few_rows(out)) {
      const auto x_t = matrix<const Sum>(x).transposed();
      const RightFactor<Sum> right(View<const Sum>{alpha_t.get(), M, R, ld_, 1}, kFewRows);
      blocks().products<Sum>().multiply(x_t, right.from(0, 0), R, static_cast<Sum*>(out.data_ptr()),
                                        R, Sum(1), {}, {});
      return;
    }
    adapter_gradient<T>(alpha_t.get(), ld_, R, matrix<const T>(x), 1, out, true);
  }

  void dx(const Scratch<Sum>& alpha_t, const Tensor& weight, const Tensor& A,
          const std::optional<Tensor>& packed, const Tensor& out) const {
    const auto [M, K, N, R] = shape_;
    const View<T> out_view = matrix<T>(out);
    const View<const T> weight_view = matrix<const T>(weight);
    with_adapter<T>(A, [&](auto view) {
      if (M <= kRowsThatStream && has_dense_rows(weight_view) && has_dense_rows(view)) {
        dx_of_few_rows(alpha_t, weight_view, view, out_view);
        return;
      }
      const RightFactor<Sum> right(view.transposed(), M);
      if (packed.has_value() || M <= rows_of_dots() || !library_product_is_faster<T>()) {
        product_with_weight(alpha_t, weight_view, packed, right, out_view);
        return;
      }
      mm_out(dy_, weight, out);
      for_each_row_block(M, [&](int64_t row, int64_t rows) {
        add_low_rank<T>({alpha_t.get() + row * ld_, ld_, R, right.from(0, 0)},
                        out_view.block(row, 0, rows, K));
      });
    });
  }

 private:
  // Of few rows dA and dB are one product of factors as they lie, into the result as it lies: 7 us
  // for 19 at 1 x 2048 x 16 (dA), 6 for 12 (dB).
  bool takes_few_rows(const Tensor& out) const {
    return std::is_same_v<T, Sum> && shape_.M > 0 && shape_.M <= kFewRows && out.numel() > 0;
  }

  void scale(Sum* t) const {
    const auto [M, K, N, R] = shape_;
    blocks().storage<Sum>().store(t, ld_, Sum(alpha_), nullptr, false, {t, M, R, ld_, 1});
  }

  void unscaled_t(const Tensor& B, Sum* out) const {
    const auto [M, K, N, R] = shape_;
    with_adapter<T>(B, [&](auto view) {
      if (M <= kRowsThatStream && has_dense_rows(view)) {
        using TB = std::remove_const_t<std::remove_pointer_t<decltype(view.data)>>;
        const Scratch<Sum> left(M * N);
        blocks().storage<T>().load(dy_view_, left.get(), N);
        blocks().storage<TB>().dot({left.get(), M, N, N, 1}, view, out, ld_, false);
        return;
      }
      const RightFactor<Sum> right(view.transposed(), M);
      for_each_row_block(M, [&](int64_t row, int64_t rows) {
        skinny_product<T>(dy_view_.block(row, 0, rows, N), right, out + row * ld_, ld_);
      });
    });
  }

  // dx of so few rows that the weight and A are read where they lie, once, from end to end.
  template <typename TA>
  void dx_of_few_rows(const Scratch<Sum>& alpha_t, View<const T> weight, View<const TA> A,
                      View<T> out) const {
    const auto [M, K, N, R] = shape_;
    const Scratch<Sum> left(M * N);
    blocks().storage<T>().load(dy_view_, left.get(), N);
    for_each_part(K, even_part(K, std::max<int64_t>(K, 1), 256, kPanel<Sum>),
                  [&](int64_t col, int64_t cols) {
                    const Scratch<Sum> sum(M * cols);
                    blocks().storage<T>().combine_rows(
                        {left.get(), M, N, N, 1}, weight.block(0, col, N, cols), sum.get(), cols);
                    blocks().storage<TA>().dot({alpha_t.get(), M, R, ld_, 1},
                                               A.block(col, 0, cols, R), sum.get(), cols, true);
                    blocks().storage<T>().store(sum.get(), cols, Sum(1), nullptr, false,
                                                out.block(0, col, M, cols));
                  });
  }

  void product_with_weight(const Scratch<Sum>& alpha_t, View<const T> weight,
                           const std::optional<Tensor>& packed, const RightFactor<Sum>& A_t,
                           View<T> out) const {
    const auto [M, K, N, R] = shape_;
    for_each_strip(M, K, [&](int64_t row, int64_t rows, int64_t col, int64_t cols) {
      const LowRank<Sum> low = {alpha_t.get() + row * ld_, ld_, R, A_t.from(0, col)};
      product_strip<T>(dy_view_.block(row, 0, rows, N), weight.block(0, col, N, cols),
                       is_far(weight), nullptr, out.block(row, col, rows, cols), &low,
                       panels_of<Sum>(packed, N, col));
    });
  }

  const Shape shape_;
  const Tensor dy_;
  const View<const T> dy_view_;
  const double alpha_;
  const int64_t ld_;  // of h and t in scratch: R rounded up to a panel
};

}  // namespace
}  // namespace cpu

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lora_linear_bwd_cpu(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& A, const Tensor& B,
    const Tensor& h, double alpha, const std::vector<bool>& needs) {
  return lora_linear_bwd_packed_cpu(dy, x, weight, A, B, h, alpha, needs, std::nullopt);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lora_linear_bwd_packed_cpu(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& A, const Tensor& B,
    const Tensor& h, double alpha, const std::vector<bool>& asked,
    const std::optional<Tensor>& packed) {
  const Needs needs = {asked.at(0), asked.at(1), asked.at(2), asked.at(3), asked.at(4)};
  const Shape shape = check_backward(dy, x, weight, A, B, h, needs);
  const cpu::NoGradGuard no_grad;
  const auto [M, K, N, R] = shape;
  if (packed.has_value() && needs.dx) cpu::check_packed(*packed, weight, N, K);
  const auto result = [](bool need, const Tensor& like, std::initializer_list<int64_t> sizes) {
    return need ? cpu::empty(like, sizes) : cpu::empty(like, {0});
  };
  const Tensor dx = result(needs.dx, dy, {M, K}), dweight = result(needs.dweight, dy, {N, K}),
               dbias = result(needs.dbias, dy, {N}), dA = result(needs.dA, A, {K, R}),
               dB = result(needs.dB, B, {R, N});
  cpu::with_storage_type(dy.scalar_type(), [&](auto storage) {
    const cpu::Backward<decltype(storage)> backward(shape, dy, alpha);
    if (needs.dB) backward.dB(h, dB);
    if (needs.dbias) backward.dbias(dbias);
    if (needs.dweight) backward.dweight(x, dweight);
    if (!needs.dx && !needs.dA) return;
    const auto alpha_t = backward.alpha_t(B);
    if (needs.dA) backward.dA(alpha_t, x, dA);
    if (needs.dx) backward.dx(alpha_t, weight, A, packed, dx);
  });
  return {dx, dweight, dbias, dA, dB};
}

}  // namespace lora_ext
