// Forward on the CPU: y = x @ weight.T + bias + alpha * h @ B, h = x @ A.
//
// Two ways to the base product. Where PyTorch's GEMM runs at the CPU's rate, it makes it, and one
// pass over row blocks adds the low-rank part while y is in cache. Where it does not (16-bit dtypes
// without hardware for them) the product is ours, with the low-rank part as R more steps of its
// summed dimension.
#include "cpu/tensors.h"
#include "lora_linear.h"

namespace lora_ext {
namespace cpu {
namespace {

// Below this many rows, packing the weight costs more than the library's slow product.
constexpr int64_t kMinRowsOfOwnProduct = 4;

template <typename T>
void forward(const Shape& shape, const Tensor& x, const Tensor& weight,
             const std::optional<Tensor>& bias, const Tensor& A, const Tensor& B, double alpha,
             const Tensor& y, const Tensor& h) {
  using Sum = Acc<T>;
  const auto [M, K, N, R] = shape;
  const View<const T> x_view = matrix<const T>(x);
  const View<T> y_view = matrix<T>(y), h_view = matrix<T>(h);
  const auto factor = [&](auto view) { return RightFactor<Sum>(view, M); };
  const auto A_factor = with_adapter<T>(A, factor), B_factor = with_adapter<T>(B, factor);
  const int64_t ld = round_up_to_panel<Sum>(R);
  const Scratch<Sum> alpha_h(M * ld);

  const auto shrink = [&](int64_t row, int64_t rows) {
    Sum* block = alpha_h.get() + row * ld;
    skinny_product<T>(x_view.block(row, 0, rows, K), A_factor, R, block, ld);
    blocks().storage<T>().store(block, ld, Sum(1), nullptr, h_view.block(row, 0, rows, R));
    blocks().storage<Sum>().store(block, ld, Sum(alpha), nullptr, {block, rows, R, ld, 1});
  };

  if (library_gemm_is_fast<T>() || M < kMinRowsOfOwnProduct) {
    linear_out(x, weight, bias, y);
    for_each_row_block(M, [&](int64_t row, int64_t rows) {
      shrink(row, rows);
      add_low_rank<T>({alpha_h.get() + row * ld, ld, R, B_factor.from(0, 0)},
                      y_view.block(row, 0, rows, N));
    });
    return;
  }
  for_each_row_block(M, shrink);
  const View<const T> weight_t = matrix<const T>(weight).transposed();
  const T* bias_data = nullptr;
  const Tensor dense_bias = bias.has_value() ? torch::stable::contiguous(*bias) : y;
  if (bias.has_value()) bias_data = static_cast<const T*>(dense_bias.data_ptr());
  for_each_tile<Sum>(M, N, [&](int64_t row, int64_t rows, int64_t col, int64_t cols) {
    const LowRank<Sum> low = {alpha_h.get() + row * ld, ld, R, B_factor.from(0, col)};
    product_tile<T>(x_view.block(row, 0, rows, K), weight_t.block(0, col, K, cols),
                    bias_data == nullptr ? nullptr : bias_data + col,
                    y_view.block(row, col, rows, cols), &low);
  });
}

}  // namespace
}  // namespace cpu

std::tuple<Tensor, Tensor> lora_linear_fwd_cpu(const Tensor& x, const Tensor& weight,
                                               const std::optional<Tensor>& bias, const Tensor& A,
                                               const Tensor& B, double alpha) {
  const Shape shape = check_forward(x, weight, bias, A, B);
  const cpu::NoGradGuard no_grad;
  const Tensor y = cpu::empty_like_dtype(x, {shape.M, shape.N});
  const Tensor h = cpu::empty_like_dtype(x, {shape.M, shape.R});
  cpu::with_storage_type(x.scalar_type(), [&](auto storage) {
    cpu::forward<decltype(storage)>(shape, x, weight, bias, A, B, alpha, y, h);
  });
  return {y, h};
}

}  // namespace lora_ext
