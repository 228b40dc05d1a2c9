// The two operators on CUDA tensors, by the kernels of kernels.h.
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "cuda/device.h"
#include "cuda/kernels.h"
#include "lora_linear.h"
#include "tensor_utils.h"

namespace lora_ext {
namespace cuda {
namespace {

using torch::headeronly::ScalarType;

DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half:
      return DType::kHalf;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Float:
      return DType::kFloat;
    case ScalarType::Double:
      return DType::kDouble;
    default:
      STD_TORCH_CHECK(false, "x must have dtype float32, float64, bfloat16 or float16, got ",
                      torch::headeronly::toString(tensor.scalar_type()));
  }
}

// Device, stream and dtype of one call, and the scratch memory it has taken: freed with it, which
// PyTorch's allocator hands only to later work on the same stream.
class Call {
 public:
  explicit Call(const Tensor& like)
      : device_(like), card_(use_card(device_.index())), like_(like), dtype_(dtype_of(like)) {}

  Context context() {
    return {dtype_, device_.stream(), card_.multiprocessors, [this](int64_t bytes) {
              scratch_.push_back(empty(like_, {bytes}, aoti_torch_dtype_uint8()));
              return scratch_.back().data_ptr();
            }};
  }

  Matrix matrix(const Tensor& tensor) const {
    const bool half = dtype_ == DType::kHalf || dtype_ == DType::kBFloat16;
    return {tensor.data_ptr(), tensor.size(0),   tensor.size(1),
            tensor.stride(0),  tensor.stride(1), half && tensor.scalar_type() == ScalarType::Float};
  }

  // Whether PyTorch makes the product with the weight and our kernel adds the low-rank part to it.
  // For 16-bit dtypes where mma.sync, which our tiles use, does not reach the tensor cores' full
  // rate (Hopper, and Blackwell in data centres, which have asynchronous instructions for it); for
  // the others, whose tiles use no tensor cores, and then float32 is tf32 where PyTorch allows
  // it. With up to one tile of rows, reading the weight is what takes the time, and that we do as
  // well, in one pass.
  bool base_by_torch(int64_t M) const {
    if (M <= 64) return false;
    if (dtype_ == DType::kFloat || dtype_ == DType::kDouble) return true;
    return card_.capability >= 90 && card_.capability < 120;
  }

 private:
  const Device device_;
  const Card card_;
  const Tensor like_;
  const DType dtype_;
  std::vector<Tensor> scratch_;
};

}  // namespace
}  // namespace cuda

std::tuple<Tensor, Tensor> lora_linear_fwd_cuda(const Tensor& x, const Tensor& weight,
                                                const std::optional<Tensor>& bias, const Tensor& A,
                                                const Tensor& B, double alpha) {
  const Shape shape = check_forward(x, weight, bias, A, B);
  const NoGradGuard no_grad;
  cuda::Call call(x);
  const Tensor y = empty(x, {shape.M, shape.N}), h = empty(x, {shape.M, shape.R});
  const bool onto = call.base_by_torch(shape.M);
  if (onto && bias.has_value()) cuda::addmm_out(*bias, x, transposed(weight), y);
  if (onto && !bias.has_value()) cuda::mm_out(x, transposed(weight), y);
  cuda::Bias bias_view;
  if (bias.has_value()) bias_view = {bias->data_ptr(), bias->stride(0)};
  cuda::forward_h(call.context(), call.matrix(x), call.matrix(A), call.matrix(h));
  cuda::forward_y(call.context(), call.matrix(x), call.matrix(weight), bias_view, call.matrix(h),
                  call.matrix(B), alpha, call.matrix(y), onto);
  return {y, h};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lora_linear_bwd_cuda(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& A, const Tensor& B,
    const Tensor& h, double alpha, const std::vector<bool>& asked) {
  const Needs needs = {asked.at(0), asked.at(1), asked.at(2), asked.at(3), asked.at(4)};
  const auto [M, K, N, R] = check_backward(dy, x, weight, A, B, h, needs);
  const NoGradGuard no_grad;
  cuda::Call call(dy);
  const auto result = [](bool need, const Tensor& like, std::initializer_list<int64_t> sizes) {
    return need ? empty(like, sizes) : empty(like, {0});
  };
  const Tensor dx = result(needs.dx, dy, {M, K}), dweight = result(needs.dweight, dy, {N, K}),
               dA = result(needs.dA, A, {K, R}), dB = result(needs.dB, B, {R, N});
  Tensor dbias = result(needs.dbias, dy, {N});
  if (needs.dweight) cuda::mm_out(transposed(dy), x, dweight);
  if (needs.dbias) {
    const int64_t rows[] = {0};
    torch::stable::sum_out(dbias, dy, rows);
  }
  if (needs.dB) {
    cuda::backward_adapter(call.context(), call.matrix(dy), call.matrix(h), alpha,
                           call.matrix(dB).transposed());
  }
  if (needs.dx || needs.dA) {
    const Tensor t = empty(dy, {M, R});
    cuda::backward_t(call.context(), call.matrix(dy), call.matrix(B), call.matrix(t));
    if (needs.dA) {
      cuda::backward_adapter(call.context(), call.matrix(x), call.matrix(t), alpha,
                             call.matrix(dA));
    }
    if (needs.dx) {
      const bool onto = call.base_by_torch(M);
      if (onto) cuda::mm_out(dy, weight, dx);
      cuda::backward_dx(call.context(), call.matrix(dy), call.matrix(weight), call.matrix(t),
                        call.matrix(A), alpha, call.matrix(dx), onto);
    }
  }
  return {dx, dweight, dbias, dA, dB};
}

}  // namespace lora_ext
