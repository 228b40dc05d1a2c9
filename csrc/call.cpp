#include "call.h"

#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <limits>
#include <utility>

#include "checks.h"
#include "tensor_utils.h"

namespace lora_ext {
namespace {

ScalarType dtype_of(const Tensor& tensor) {
  // What torch's own conversion asks a question a dtype for, 20 ns.
  static const int32_t float32 = aoti_torch_dtype_float32(), bfloat16 = aoti_torch_dtype_bfloat16(),
                       float16 = aoti_torch_dtype_float16(), float64 = aoti_torch_dtype_float64();
  int32_t dtype;
  LORA_EXT_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  if (dtype == float32) return ScalarType::Float;
  if (dtype == bfloat16) return ScalarType::BFloat16;
  if (dtype == float16) return ScalarType::Half;
  if (dtype == float64) return ScalarType::Double;
  return tensor.scalar_type();
}

Format format_of(const std::string& name, const Checks& checks) {
  if (name == "plain") return Format::kPlain;
  constexpr std::pair<const char*, Format> on_cpu[] = {{"panels", Format::kPanels},
                                                       {"nf4", Format::kNf4},
                                                       {"fp4", Format::kFp4},
                                                       {"int8", Format::kInt8}};
  for (const auto& [known, format] : on_cpu) {
    if (name != known) continue;
    STD_TORCH_CHECK(checks.on_cpu(), "format must be plain for tensors that are not on cpu, got ",
                    name);
    return format;
  }
  STD_TORCH_CHECK(false, "format must be plain, panels, nf4, fp4 or int8, got ", name);
}

// The scale as the sums' type has it: beyond float it is infinite there, as in PyTorch's own
// product of a number and a tensor.
double scale_of_sums(double scale, const Operand& like) {
  if (like.dtype == ScalarType::Double || !(std::abs(scale) > std::numeric_limits<float>::max())) {
    return scale;
  }
  return std::copysign(std::numeric_limits<double>::infinity(), scale);
}

// Codes and their scales, from end to end in memory.
void check_codes(const Checks& checks, const Weight& weight, int64_t N, int64_t K) {
  const auto& [data, format, scale] = weight;
  STD_TORCH_CHECK(scale,
                  "weight_scale must be a tensor where format is nf4, fp4 or int8, got None");
  STD_TORCH_CHECK(
      checks.dtype() != ScalarType::Double,
      "x must have dtype float32, bfloat16 or float16 where the weight is of codes, got ",
      torch::headeronly::toString(checks.dtype()));
  check_is("weight", data, format == Format::kInt8 ? ScalarType::Char : ScalarType::Byte);
  check_is("weight_scale", scale, ScalarType::Float);
  checks.place("weight_scale", scale);
  if (format == Format::kInt8) {
    check_shape("weight", data, {N, K});
    check_shape("weight_scale", scale, {N});
  } else {
    check_shape("weight", data, {(N * K + 1) / 2, 1});
    block_bits_of(weight, N * K);
  }
  STD_TORCH_CHECK((data.stride(1) == 1 || data.size(1) < 2) &&
                      (data.stride(0) == data.size(1) || data.size(0) < 2),
                  "weight must be contiguous where it is of codes, got strides ",
                  text_of(data.strides, 2));
  STD_TORCH_CHECK(scale.stride(0) == 1 || scale.size(0) < 2,
                  "weight_scale must be contiguous, got stride ", scale.stride(0));
}

// The weight but for the size of panels, which the CPU kernels know.
void check_weight(const Checks& checks, const Weight& weight, int64_t N, int64_t K) {
  checks.place("weight", weight.data);
  if (is_of_codes(weight.format)) return check_codes(checks, weight, N, K);
  if (weight.format == Format::kPanels) return;
  check_shape("weight", weight.data, {N, K});
  checks.dtype("weight", weight.data);
}

void check_keep(const Checks& checks, const Operand& keep, int64_t M, int64_t K) {
  check_shape("keep", keep, {M, (K + 7) / 8});
  STD_TORCH_CHECK(keep.dtype == ScalarType::Byte, "keep must have dtype Byte, got ",
                  torch::headeronly::toString(keep.dtype));
  STD_TORCH_CHECK(keep.stride(1) == 1 || keep.size(1) < 2,
                  "keep must have rows without gaps, got stride ", keep.stride(1));
  checks.place("keep", keep);
}

// A, which dx reads, and of which dA has the layout.
void read_A(const Checks& checks, const std::optional<Tensor>& A, BackwardCall* call) {
  if (!call->needs.dx && !call->needs.dA) return;
  check_given("A", A, call->needs.dx ? "dx" : "dA");
  const Operand& operand = call->low.A = Operand(A);
  check_dim("A", operand, 2, "(in_features, rank)");
  call->K = operand.size(0);
  call->R = operand.size(1);
  checks.adapter_dtype("A", operand);
  checks.place("A", operand, call->needs.dx);
}

// B, which t is made of, and of which dB has the layout.
void read_B(const Checks& checks, const std::optional<Tensor>& B, BackwardCall* call) {
  const Needs& needs = call->needs;
  if (!needs.dx && !needs.dA && !needs.dB) return;
  check_given("B", B, needs.dx ? "dx" : needs.dA ? "dA" : "dB");
  const Operand& operand = call->low.B = Operand(B);
  check_dim("B", operand, 2, "(rank, out_features)");
  if (!call->low.A) call->R = operand.size(0);
  check_shape("B", operand, {call->R, call->N});
  checks.adapter_dtype("B", operand);
  checks.place("B", operand, needs.dx || needs.dA);
}

void read_x(const Checks& checks, const std::optional<Tensor>& x, BackwardCall* call) {
  if (!call->needs.dA && !call->needs.dweight) return;
  check_given("x", x, call->needs.dA ? "dA" : "dweight");
  const Operand& operand = call->x = Operand(x);
  check_dim("x", operand, 2, "(M, in_features)");
  if (!call->low.A) call->K = operand.size(1);
  check_shape("x", operand, {call->M, call->K});
  checks.dtype("x", operand);
  checks.place("x", operand);
}

// What Python has as None.
Tensor undefined() {
  AtenTensorHandle none;
  LORA_EXT_CHECK(aoti_torch_new_uninitialized_tensor(&none));
  return Tensor(none);
}

// Memory for the gradient of A or B.
Tensor empty_like_factor(const Operand& factor) {
  const bool is_transposed = factor.stride(0) == 1 && factor.stride(1) != 1;
  return empty_matrix(*factor.tensor, factor.size(0), factor.size(1), is_transposed);
}

}  // namespace

Operand::Operand(const Tensor& given) : tensor(&given), dtype(dtype_of(given)) {
  int64_t* read;
  LORA_EXT_CHECK(aoti_torch_get_dim(given.get(), &dim));
  LORA_EXT_CHECK(aoti_torch_get_sizes(given.get(), &read));
  sizes = read;
  LORA_EXT_CHECK(aoti_torch_get_strides(given.get(), &read));
  strides = read;
}

Operand::Operand(const std::optional<Tensor>& given) {
  if (given.has_value()) *this = Operand(*given);
}

int64_t block_bits_of(const Weight& weight, int64_t elements) {
  const Operand& scale = weight.scale;
  STD_TORCH_CHECK(scale.dim == 1, "weight_scale must have shape (blocks,), got ",
                  text_of(scale.sizes, scale.dim));
  // Half as many elements in a block make another number of blocks, until there is one.
  for (int64_t bits = 5; bits < 40; ++bits) {
    const int64_t blocks = (elements + (int64_t{1} << bits) - 1) >> bits;
    if (blocks == scale.size(0)) return bits;
    if (blocks < scale.size(0)) break;
  }
  STD_TORCH_CHECK(false, "weight_scale must have one value a block of a power of two of the ",
                  elements, " elements, from 32 on, got shape ", text_of(scale.sizes, scale.dim));
}

Call check_forward(const Tensor& x, const std::optional<Tensor>& weight,
                   const std::optional<Tensor>& bias, const Tensor& A, const Tensor& B,
                   double scale, const std::string& format, const std::optional<Tensor>& keep,
                   const std::optional<Tensor>& weight_scale) {
  Call call;
  call.x = Operand(x);
  check_dim("x", call.x, 2, "(M, in_features)");
  const Checks checks("x", call.x);
  call.weight = {Operand(weight), format_of(format, checks), Operand(weight_scale)};
  call.bias = Operand(bias);
  call.low = {Operand(A), Operand(B), scale_of_sums(scale, call.x), Operand(keep)};
  const bool plain = weight.has_value() && call.weight.format == Format::kPlain;
  if (plain) check_dim("weight", call.weight.data, 2, "(out_features, in_features)");
  check_dim("A", call.low.A, 2, "(in_features, rank)");
  if (!plain) check_dim("B", call.low.B, 2, "(rank, out_features)");
  call.M = call.x.size(0);
  call.K = call.x.size(1);
  call.N = plain ? call.weight.data.size(0) : call.low.B.size(1);
  call.R = call.low.A.size(1);
  STD_TORCH_CHECK(call.R > 0, "A must have shape (in_features, rank) with rank at least 1, got ",
                  text_of(call.low.A.sizes, 2));
  if (weight.has_value()) check_weight(checks, call.weight, call.N, call.K);
  if (bias.has_value()) {
    STD_TORCH_CHECK(weight.has_value(), "bias must be None where weight is None");
    check_shape("bias", call.bias, {call.N});
    checks.dtype("bias", call.bias);
    checks.place("bias", call.bias);
  }
  check_shape("A", call.low.A, {call.K, call.R});
  check_shape("B", call.low.B, {call.R, call.N});
  checks.adapter_dtype("A", call.low.A);
  checks.adapter_dtype("B", call.low.B);
  checks.place("A", call.low.A);
  checks.place("B", call.low.B);
  if (keep.has_value()) check_keep(checks, call.low.keep, call.M, call.K);
  return call;
}

BackwardCall check_backward(const Tensor& dy, const std::optional<Tensor>& x,
                            const std::optional<Tensor>& weight, const std::optional<Tensor>& A,
                            const std::optional<Tensor>& B, const std::optional<Tensor>& h,
                            double scale, const std::vector<bool>& needs, const std::string& format,
                            const std::optional<Tensor>& keep,
                            const std::optional<Tensor>& weight_scale) {
  BackwardCall call;
  call.needs = {needs.at(0), needs.at(1), needs.at(2), needs.at(3), needs.at(4)};
  call.dy = Operand(dy);
  check_dim("dy", call.dy, 2, "(M, out_features)");
  const Checks checks("dy", call.dy);
  call.weight.format = format_of(format, checks);
  call.low.scale = scale_of_sums(scale, call.dy);
  call.M = call.dy.size(0);
  call.N = call.dy.size(1);
  // In this order each takes the sizes that it has to fit from the ones before.
  read_A(checks, A, &call);
  read_B(checks, B, &call);
  read_x(checks, x, &call);
  if (call.needs.dx && weight.has_value()) {
    call.weight.data = Operand(weight);
    call.weight.scale = Operand(weight_scale);
    check_weight(checks, call.weight, call.N, call.K);
  }
  if (call.needs.dB) {
    check_given("h", h, "dB");
    call.h = Operand(h);
    check_shape("h", call.h, {call.M, call.R});
    checks.dtype("h", call.h);
    checks.place("h", call.h);
  }
  if (keep.has_value() && (call.needs.dx || call.needs.dA)) {
    call.low.keep = Operand(keep);
    check_keep(checks, call.low.keep, call.M, call.K);
  }
  return call;
}

Gradients::Gradients(const BackwardCall& call)
    : dx(call.needs.dx ? empty(*call.dy.tensor, {call.M, call.K}) : undefined()),
      dweight(call.needs.dweight ? empty(*call.dy.tensor, {call.N, call.K}) : undefined()),
      dbias(call.needs.dbias ? empty(*call.dy.tensor, {call.N}) : undefined()),
      dA(call.needs.dA ? empty_like_factor(call.low.A) : undefined()),
      dB(call.needs.dB ? empty_like_factor(call.low.B) : undefined()) {}

}  // namespace lora_ext
