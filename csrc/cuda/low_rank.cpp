#include "cuda/low_rank.h"

#include <torch/headeronly/util/Exception.h>

#include <cmath>

namespace lora_ext::cuda {
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

Bits bits_of(const Operand& keep) {
  if (!keep) return {};
  return {static_cast<const uint8_t*>(keep.data()), keep.stride(0)};
}

// Of the same sizes, dense, of like's dtype.
Tensor empty_like(const Tensor& tensor, const Tensor& like) {
  return empty(like, {tensor.size(0), tensor.size(1)});
}

}  // namespace

Launch::Launch(const char* name, const Operand& like)
    : dtype_(dtype_of(name, like)),
      device_(*like.tensor),
      multiprocessors_(use_card(device_.index())),
      like_(*like.tensor) {}

Context Launch::context() {
  return {dtype_, device_.stream(), multiprocessors_, [this](int64_t bytes) {
            scratch_.push_back(empty(like_, {bytes}, aoti_torch_dtype_uint8()));
            return scratch_.back().mutable_data_ptr();
          }};
}

// The kernels' views have no constness; nothing is written through that of an argument.
Matrix Launch::matrix(const Side& side) const {
  const Tensor& of = side.tensor;
  const bool is_float = is_half() && of.scalar_type() == ScalarType::Float;
  const Matrix matrix = {const_cast<void*>(of.const_data_ptr()),
                         of.size(0),
                         of.size(1),
                         of.stride(0),
                         of.stride(1),
                         is_float};
  return side.turned ? matrix.transposed() : matrix;
}

Tensor Launch::rounded(const Tensor& factor) const {
  if (factor.scalar_type() == like_.scalar_type()) return factor;
  const Tensor result = empty_like(factor, like_);
  LORA_EXT_CHECK(aoti_torch_copy_(result.get(), factor.get(), /*non_blocking=*/0));
  return result;
}

Tensor Launch::masked(const Tensor& x, const Operand& keep) {
  if (!keep) return x;
  const Tensor result = empty_like(x, like_);
  apply_mask(context(), matrix(x), bits_of(keep), 1, matrix(result), false);
  return result;
}

// out = scale * left @ right, by PyTorch; a scale that is not finite is for no library to see, MKL
// takes NaN for zero.
void Launch::product(const Tensor& left, const Tensor& right, double scale, const Tensor& out) {
  if (std::isfinite(scale)) return addmm_out(out, left, right, 0, scale, out);
  mm_out(left, right, out);
  apply_mask(context(), matrix(out), {}, scale, matrix(out), false);
}

void Launch::shrink(const Side& x, const Operand& keep, const Side& A, const Tensor& h) {
  if (!is_half()) {
    mm_out(masked(x.tensor, keep), A.as_tensor(), h);
  } else if (A.turned) {
    backward_t(context(), matrix(x), matrix(A.tensor), matrix(h));
  } else {
    forward_h(context(), matrix(x), bits_of(keep), matrix(A), matrix(h));
  }
}

void Launch::expand(const Side& h, const Side& B, double scale, const Operand& keep,
                    const Tensor& y, bool onto) {
  if (is_half() && B.turned) {
    cuda::backward_dx(context(), {}, {}, matrix(h), matrix(B.tensor), bits_of(keep), scale,
                      matrix(y), onto);
  } else if (is_half()) {
    forward_y(context(), {}, {}, {}, matrix(h), matrix(B), scale, matrix(y), onto);
  } else if (!keep && onto && std::isfinite(scale)) {
    addmm_out(y, h.tensor, B.as_tensor(), 1, scale, y);
  } else if (!keep && !onto) {
    product(h.tensor, B.as_tensor(), scale, y);
  } else {
    const Tensor low = empty_like(y, like_);
    mm_out(h.tensor, B.as_tensor(), low);
    apply_mask(context(), matrix(low), bits_of(keep), scale, matrix(y), onto);
  }
}

void Launch::gradient(const Tensor& x, const Operand& keep, const Tensor& t, double scale,
                      const Side& dA) {
  if (is_half()) {
    backward_adapter(context(), matrix(x), bits_of(keep), matrix(t), scale, matrix(dA));
  } else if (dA.turned) {
    product(lora_ext::transposed(t), x, scale, dA.tensor);
  } else {
    product(lora_ext::transposed(masked(x, keep)), t, scale, dA.tensor);
  }
}

void Launch::forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                     const Tensor& h, const Tensor& B, double scale, const Tensor& y) {
  Bias of_y;
  if (bias.has_value()) of_y = {bias->const_data_ptr(), bias->stride(0)};
  forward_y(context(), matrix(x), matrix(weight), of_y, matrix(h), matrix(B), scale, matrix(y),
            false);
}

void Launch::backward_dx(const Tensor& dy, const Tensor& weight, const Tensor& t, const Tensor& A,
                         double scale, const Operand& keep, const Tensor& dx) {
  cuda::backward_dx(context(), matrix(dy), matrix(weight), matrix(t), matrix(A), bits_of(keep),
                    scale, matrix(dx), false);
}

}  // namespace lora_ext::cuda
