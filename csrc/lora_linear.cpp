#include "lora_linear.h"

#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <sstream>
#include <string>

namespace lora_ext {
namespace {

using torch::headeronly::ScalarType;

std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << (tensor.dim() == 1 ? ",)" : ")");
  return text.str();
}

void check_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes) {
  bool fits = tensor.dim() == static_cast<int64_t>(sizes.size());
  int64_t i = 0;
  for (const int64_t size : sizes) fits = fits && tensor.size(i++) == size;
  if (fits) return;
  std::ostringstream expected;
  i = 0;
  for (const int64_t size : sizes) expected << (i++ ? ", " : "") << size;
  STD_TORCH_CHECK(false, name, " must have shape (", expected.str(), sizes.size() == 1 ? "," : "",
                  "), got ", shape_of(tensor));
}

void check_matrix(const char* name, const Tensor& tensor, const char* meaning) {
  STD_TORCH_CHECK(tensor.dim() == 2, name, " must have shape ", meaning, ", got ",
                  shape_of(tensor));
}

void check_dtype(const char* name, const Tensor& tensor, ScalarType expected,
                 bool float_over_half = false) {
  const ScalarType dtype = tensor.scalar_type();
  const bool half = expected == ScalarType::BFloat16 || expected == ScalarType::Half;
  STD_TORCH_CHECK(dtype == expected || (float_over_half && half && dtype == ScalarType::Float),
                  name, " must have x's dtype ", torch::headeronly::toString(expected), ", got ",
                  torch::headeronly::toString(dtype));
}

void check_adapter(const Tensor& A, const Tensor& B, ScalarType dtype) {
  check_dtype("A", A, dtype, true);
  check_dtype("B", B, dtype, true);
}

}  // namespace

Shape check_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                    const Tensor& A, const Tensor& B) {
  check_matrix("x", x, "(M, in_features)");
  check_matrix("weight", weight, "(out_features, in_features)");
  check_matrix("A", A, "(in_features, rank)");
  const Shape shape = {x.size(0), x.size(1), weight.size(0), A.size(1)};
  check_shape("weight", weight, {shape.N, shape.K});
  if (bias.has_value()) check_shape("bias", *bias, {shape.N});
  check_shape("A", A, {shape.K, shape.R});
  check_shape("B", B, {shape.R, shape.N});
  const ScalarType dtype = x.scalar_type();
  check_dtype("weight", weight, dtype);
  if (bias.has_value()) check_dtype("bias", *bias, dtype);
  check_adapter(A, B, dtype);
  return shape;
}

Shape check_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& A,
                     const Tensor& B, const Tensor& h, const Needs& needs) {
  check_matrix("dy", dy, "(M, out_features)");
  const bool reads_x = needs.dA || needs.dweight, reads_t = needs.dx || needs.dA;
  if (reads_x) check_matrix("x", x, "(M, in_features)");
  if (needs.dx) check_matrix("weight", weight, "(out_features, in_features)");
  if (reads_t) check_matrix("B", B, "(rank, out_features)");
  if (needs.dB) check_matrix("h", h, "(M, rank)");
  const Shape shape = {dy.size(0),
                       reads_x    ? x.size(1)
                       : needs.dx ? weight.size(1)
                                  : 0,
                       dy.size(1),
                       reads_t    ? B.size(0)
                       : needs.dB ? h.size(1)
                                  : 0};
  const ScalarType dtype = dy.scalar_type();
  if (reads_x) {
    check_shape("x", x, {shape.M, shape.K});
    check_dtype("x", x, dtype);
  }
  if (needs.dx) {
    check_shape("weight", weight, {shape.N, shape.K});
    check_dtype("weight", weight, dtype);
    check_shape("A", A, {shape.K, shape.R});
  }
  if (reads_t) check_shape("B", B, {shape.R, shape.N});
  if (needs.dB) {
    check_shape("h", h, {shape.M, shape.R});
    check_dtype("h", h, dtype);
  }
  check_adapter(A, B, dtype);
  return shape;
}

}  // namespace lora_ext
