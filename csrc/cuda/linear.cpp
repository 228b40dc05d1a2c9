// The two operators on CUDA tensors. PyTorch makes the base product, which no kernel of ours is
// known to make faster on any card; the low-rank part is low_rank.h's.
#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <string_view>

#include "call.h"
#include "cuda/device.h"
#include "cuda/low_rank.h"
#include "operators.h"
#include "tensor_utils.h"

namespace lora_ext {
namespace {

// Whether LORA_EXT_CUDA_BASE=own asks for the base product by our kernels, of 16-bit dtypes: so
// that a card can show where they win (provider cpp.own_base of benchmarks.bench_linear).
bool own_base(const cuda::Launch& launch) {
  const char* asked = std::getenv("LORA_EXT_CUDA_BASE");
  return asked != nullptr && std::string_view(asked) == "own" && launch.is_half();
}

}  // namespace

std::tuple<Tensor, Tensor> linear_fwd(const Tensor& x, const std::optional<Tensor>& weight,
                                      const std::optional<Tensor>& bias, const Tensor& A,
                                      const Tensor& B, double scale, const std::string& format,
                                      const std::optional<Tensor>& keep,
                                      const std::optional<Tensor>& weight_scale) {
  const Call call = check_forward(x, weight, bias, A, B, scale, format, keep, weight_scale);
  const NoGradGuard no_grad;
  cuda::Launch launch("x", call.x);
  const Tensor y = empty(x, {call.M, call.N}), h = empty(x, {call.M, call.R});
  const bool own = weight.has_value() && own_base(launch);
  if (weight.has_value() && !own) {
    if (bias.has_value()) {
      cuda::addmm_out(*bias, x, transposed(*weight), 1, 1, y);
    } else {
      cuda::mm_out(x, transposed(*weight), y);
    }
  }
  launch.shrink(x, call.low.keep, launch.rounded(A), h);
  const Tensor factor = launch.rounded(B);
  if (own) {
    launch.forward(x, *weight, bias, h, factor, call.low.scale, y);
  } else {
    launch.expand(h, factor, call.low.scale, {}, y, weight.has_value());
  }
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
  if (needs.dweight) cuda::mm_out(transposed(dy), *x, out.dweight);
  if (needs.dbias) {
    const int64_t rows[] = {0};
    Tensor dbias = out.dbias;
    torch::stable::sum_out(dbias, dy, rows);
  }
  if (needs.dB) launch.gradient(dy, {}, *h, call.low.scale, {out.dB, true});
  if (!needs.dx && !needs.dA) return out.tuple();
  const Tensor t = empty(dy, {call.M, call.R});
  launch.shrink(dy, {}, {launch.rounded(*B), true}, t);
  if (needs.dA) launch.gradient(*x, call.low.keep, t, call.low.scale, out.dA);
  if (!needs.dx) return out.tuple();
  const Tensor factor = launch.rounded(*A);
  if (weight.has_value() && own_base(launch)) {
    launch.backward_dx(dy, *weight, t, factor, call.low.scale, call.low.keep, out.dx);
  } else {
    if (weight.has_value()) cuda::mm_out(dy, *weight, out.dx);
    launch.expand(t, {factor, true}, call.low.scale, call.low.keep, out.dx, weight.has_value());
  }
  return out.tuple();
}

}  // namespace lora_ext
