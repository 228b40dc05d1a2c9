// The two operators on CUDA tensors, by the kernels of kernels.h.
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include "call.h"
#include "cuda/device.h"
#include "cuda/kernels.h"
#include "operators.h"
#include "tensor_utils.h"

namespace lora_ext {
namespace cuda {
namespace {

DType dtype_of(const char* name, const Operand& operand) {
  switch (operand.dtype) {
    case ScalarType::Half:
      return DType::kHalf;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Float:
      return DType::kFloat;
    case ScalarType::Double:
      return DType::kDouble;
    default:
      STD_TORCH_CHECK(false, name, " must have dtype float32, float64, bfloat16 or float16, got ",
                      torch::headeronly::toString(operand.dtype));
  }
}

// Device, stream and dtype of one call, and the scratch memory it has taken: freed with it, which
// PyTorch's allocator hands only to later work on the same stream.
class Launch {
 public:
  Launch(const char* name, const Operand& like)
      : dtype_(dtype_of(name, like)),
        device_(*like.tensor),
        card_(use_card(device_.index())),
        like_(*like.tensor) {}

  Context context() {
    return {dtype_, device_.stream(), card_.multiprocessors, [this](int64_t bytes) {
              scratch_.push_back(empty(like_, {bytes}, aoti_torch_dtype_uint8()));
              return scratch_.back().mutable_data_ptr();
            }};
  }

  // An argument, or none. The kernels' views have no constness, nothing is written through this
  // one.
  Matrix matrix(const Operand& operand) const {
    if (!operand) return {};
    return {const_cast<void*>(operand.data()),
            operand.size(0),
            operand.size(1),
            operand.stride(0),
            operand.stride(1),
            is_float(operand.dtype)};
  }
  // A result.
  Matrix result(const Tensor& tensor) const {
    return {tensor.mutable_data_ptr(), tensor.size(0),   tensor.size(1),
            tensor.stride(0),          tensor.stride(1), is_float(tensor.scalar_type())};
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
  bool is_float(ScalarType dtype) const {
    const bool half = dtype_ == DType::kHalf || dtype_ == DType::kBFloat16;
    return half && dtype == ScalarType::Float;
  }

  const DType dtype_;
  const Device device_;
  const Card card_;
  const Tensor& like_;
  std::vector<Tensor> scratch_;
};

Bits bits_of(const Operand& keep) {
  if (!keep) return {};
  return {static_cast<const uint8_t*>(keep.data()), keep.stride(0)};
}

}  // namespace
}  // namespace cuda

std::tuple<Tensor, Tensor> linear_fwd(const Tensor& x, const std::optional<Tensor>& weight,
                                      const std::optional<Tensor>& bias, const Tensor& A,
                                      const Tensor& B, double scale, const std::string& format,
                                      const std::optional<Tensor>& keep,
                                      const std::optional<Tensor>& weight_scale) {
  const Call call = check_forward(x, weight, bias, A, B, scale, format, keep, weight_scale);
  const NoGradGuard no_grad;
  cuda::Launch launch("x", call.x);
  const Tensor y = empty(x, {call.M, call.N}), h = empty(x, {call.M, call.R});
  const bool onto = weight.has_value() && launch.base_by_torch(call.M);
  if (onto && bias.has_value()) cuda::addmm_out(*bias, x, transposed(*weight), y);
  if (onto && !bias.has_value()) cuda::mm_out(x, transposed(*weight), y);
  cuda::Bias bias_view;
  if (bias.has_value()) bias_view = {call.bias.data(), call.bias.stride(0)};
  const cuda::Matrix x_view = launch.matrix(call.x), h_view = launch.result(h);
  cuda::forward_h(launch.context(), x_view, cuda::bits_of(call.low.keep), launch.matrix(call.low.A),
                  h_view);
  cuda::forward_y(launch.context(), x_view, launch.matrix(call.weight.data), bias_view, h_view,
                  launch.matrix(call.low.B), call.low.scale, launch.result(y), onto);
  return {y, h};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_bwd(
    const Tensor& dy, const std::optional<Tensor>& x, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& A, const std::optional<Tensor>& B, const std::optional<Tensor>& h,
    double scale, const std::vector<bool>& asked, const std::string& format,
    const std::optional<Tensor>& keep, const std::optional<Tensor>& weight_scale) {
  const BackwardCall call =
      check_backward(dy, x, weight, A, B, h, scale, asked, format, keep, weight_scale);
  const Needs& needs = call.needs;
  const NoGradGuard no_grad;
  cuda::Launch launch("dy", call.dy);
  const Gradients out(call);
  const cuda::Matrix dy_view = launch.matrix(call.dy);
  const cuda::Bits keep_view = cuda::bits_of(call.low.keep);
  if (needs.dweight) cuda::mm_out(transposed(dy), *x, out.dweight);
  if (needs.dbias) {
    const int64_t rows[] = {0};
    Tensor dbias = out.dbias;
    torch::stable::sum_out(dbias, dy, rows);
  }
  if (needs.dB) {
    cuda::backward_adapter(launch.context(), dy_view, {}, launch.matrix(call.h), call.low.scale,
                           launch.result(out.dB).transposed());
  }
  if (!needs.dx && !needs.dA) return out.tuple();
  const Tensor t = empty(dy, {call.M, call.R});
  const cuda::Matrix t_view = launch.result(t);
  cuda::backward_t(launch.context(), dy_view, launch.matrix(call.low.B), t_view);
  if (needs.dA) {
    cuda::backward_adapter(launch.context(), launch.matrix(call.x), keep_view, t_view,
                           call.low.scale, launch.result(out.dA));
  }
  if (needs.dx) {
    const bool onto = weight.has_value() && launch.base_by_torch(call.M);
    if (onto) cuda::mm_out(dy, *weight, out.dx);
    cuda::backward_dx(launch.context(), dy_view, launch.matrix(call.weight.data), t_view,
                      launch.matrix(call.low.A), keep_view, call.low.scale, launch.result(out.dx),
                      onto);
  }
  return out.tuple();
}

}  // namespace lora_ext
