// Forward on the CPU: y = x @ weight.T + bias + alpha * h @ B, h = x @ A.
//
// Three ways to the base product, the low-rank part and the rest in one pass over y:
// - few rows: dot products with the weight's rows as they lie, the low-rank part added to each
//   block of columns before it is stored;
// - where PyTorch's GEMM runs at the CPU's rate, it makes the whole base product first, and a
//   second pass over row blocks of y adds the low-rank part: y is read and written once more;
// - where ours is the faster one (isa.h: AVX2, all but double), strips of it, with the low-rank
//   part as R more steps of the summed dimension.
#include "cpu/tensors.h"
#include "lora_linear.h"

namespace lora_ext {
namespace cpu {
namespace {

template <typename T>
class Forward {
  using Sum = Acc<T>;

 public:
  Forward(const Shape& shape, const Tensor& x, const Tensor& weight,
          const std::optional<Tensor>& bias, const Tensor& A, const Tensor& B, double alpha,
          const std::optional<Tensor>& packed)
      : shape_(shape),
        x_(matrix<const T>(x)),
        weight_(matrix<const T>(weight)),
        A_(with_adapter<T>(A, [&](auto view) { return RightFactor<Sum>(view, shape.M); })),
        B_(with_adapter<T>(B, [&](auto view) { return RightFactor<Sum>(view, shape.M); })),
        alpha_(alpha),
        packed_(packed),
        ld_(round_up_to_panel<Sum>(shape.R)),
        alpha_h_(shape.M * ld_) {
    if (bias.has_value()) dense_bias_.emplace(torch::stable::contiguous(*bias));
  }

  bool suits_dots() const {
    // Up to 16 rows dot products keep pace with a packed weight, and up to 4 they are faster.
    const int64_t most = packed_.has_value() ? 16 : rows_of_dots();
    // Each dot product ends in a sum over lanes, about what packing 20 elements costs.
    return shape_.M <= most && shape_.K >= 20 * shape_.M && has_dense_rows(weight_);
  }

  void by_dots(View<T> y, View<T> h) const {
    constexpr int64_t kCols = 256;
    const auto [M, K, N, R] = shape_;
    shrink(0, M, h);
    const Scratch<Sum> copy(M * K);
    View<const Sum> x = {copy.get(), M, K, K, 1};
    blocks().storage<T>().load(x_, copy.get(), K);
    for_each_part(N, even_part(N, kCols, 32, kPanel<float>), [&](int64_t col, int64_t cols) {
      const Scratch<Sum> sum(M * cols);
      const LowRank<Sum> low = low_rank(0, col);
      blocks().storage<T>().dot(x, weight_.block(col, 0, cols, K), sum.get(), cols, false);
      blocks().products<Sum>().multiply({low.left, M, R, ld_, 1}, low.right, cols, sum.get(), cols,
                                        Sum(1), {sum.get(), cols}, {});
      blocks().storage<T>().store(sum.get(), cols, Sum(1), bias(col), false,
                                  y.block(0, col, M, cols));
    });
  }

  // y holds the base product and the bias already.
  void onto_base(View<T> y, View<T> h) const {
    for_each_row_block(shape_.M, [&](int64_t row, int64_t rows) {
      shrink(row, rows, h);
      add_low_rank<T>(low_rank(row, 0), y.block(row, 0, rows, shape_.N));
    });
  }

  void by_strips(View<T> y, View<T> h) const {
    const auto [M, K, N, R] = shape_;
    for_each_row_block(M, [&](int64_t row, int64_t rows) { shrink(row, rows, h); });
    for_each_strip(M, N, [&](int64_t row, int64_t rows, int64_t col, int64_t cols) {
      const LowRank<Sum> low = low_rank(row, col);
      product_strip<T>(x_.block(row, 0, rows, K), weight_.transposed().block(0, col, K, cols),
                       is_far(weight_), bias(col), y.block(row, col, rows, cols), &low,
                       panels_of<Sum>(packed_, K, col));
    });
  }

 private:
  // h = x @ A for some rows, and alpha * h for the low-rank part: alpha meets unrounded sums.
  void shrink(int64_t row, int64_t rows, View<T> h) const {
    const int64_t R = shape_.R;
    Sum* block = alpha_h_.get() + row * ld_;
    skinny_product<T>(x_.block(row, 0, rows, shape_.K), A_, block, ld_);
    blocks().storage<T>().store(block, ld_, Sum(1), nullptr, false, h.block(row, 0, rows, R));
    blocks().storage<Sum>().store(block, ld_, Sum(alpha_), nullptr, false,
                                  {block, rows, R, ld_, 1});
  }

  LowRank<Sum> low_rank(int64_t row, int64_t col) const {
    return {alpha_h_.get() + row * ld_, ld_, shape_.R, B_.from(0, col)};
  }

  const T* bias(int64_t col) const {
    return dense_bias_ ? static_cast<const T*>(dense_bias_->data_ptr()) + col : nullptr;
  }

  const Shape shape_;
  const View<const T> x_, weight_;
  const RightFactor<Sum> A_, B_;
  const double alpha_;
  const std::optional<Tensor> packed_;
  const int64_t ld_;  // of alpha_h_: R rounded up to a panel
  const Scratch<Sum> alpha_h_;
  std::optional<Tensor> dense_bias_;
};

}  // namespace
}  // namespace cpu

std::tuple<Tensor, Tensor> lora_linear_fwd_cpu(const Tensor& x, const Tensor& weight,
                                               const std::optional<Tensor>& bias, const Tensor& A,
                                               const Tensor& B, double alpha) {
  return lora_linear_fwd_packed_cpu(x, weight, bias, A, B, alpha, std::nullopt);
}

std::tuple<Tensor, Tensor> lora_linear_fwd_packed_cpu(const Tensor& x, const Tensor& weight,
                                                      const std::optional<Tensor>& bias,
                                                      const Tensor& A, const Tensor& B,
                                                      double alpha,
                                                      const std::optional<Tensor>& packed) {
  const Shape shape = check_forward(x, weight, bias, A, B);
  if (packed.has_value()) cpu::check_packed(*packed, weight, shape.K, shape.N);
  const cpu::NoGradGuard no_grad;
  const Tensor y = cpu::empty(x, {shape.M, shape.N});
  const Tensor h = cpu::empty(x, {shape.M, shape.R});
  cpu::with_storage_type(x.scalar_type(), [&](auto storage) {
    using T = decltype(storage);
    const cpu::Forward<T> forward(shape, x, weight, bias, A, B, alpha, packed);
    const cpu::View<T> y_view = cpu::matrix<T>(y), h_view = cpu::matrix<T>(h);
    if (forward.suits_dots()) {
      forward.by_dots(y_view, h_view);
    } else if (!packed.has_value() && cpu::library_product_is_faster<T>()) {
      cpu::linear_out(x, weight, bias, y);
      forward.onto_base(y_view, h_view);
    } else {
      forward.by_strips(y_view, h_view);
    }
  });
  return {y, h};
}

}  // namespace lora_ext
