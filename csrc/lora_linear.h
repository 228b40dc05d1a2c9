// The operators (schemas in lora_ext/ops.py) and the one check of their arguments.
//   y = x @ weight.T + bias + alpha * (x @ A @ B)
// M rows of x, K in, N out, R rank; h = x @ A (M, R), t = dy @ B.T (M, R).
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace lora_ext {

using torch::stable::Tensor;

struct Shape {
  int64_t M, K, N, R;
};

// What lora_linear_bwd computes, in the order of its results.
struct Needs {
  bool dx, dweight, dbias, dA, dB;
};

// Throw, naming the argument, what was expected and what came, unless all fit; return the sizes.
Shape check_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                    const Tensor& A, const Tensor& B);
// The same for the backward. What `needs` does not read may be a stand-in with no elements, and a
// size that only stand-ins would tell is 0.
Shape check_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& A,
                     const Tensor& B, const Tensor& h, const Needs& needs);

std::tuple<Tensor, Tensor> lora_linear_fwd_cpu(const Tensor& x, const Tensor& weight,
                                               const std::optional<Tensor>& bias, const Tensor& A,
                                               const Tensor& B, double alpha);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lora_linear_bwd_cpu(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& A, const Tensor& B,
    const Tensor& h, double alpha, const std::vector<bool>& needs);

std::tuple<Tensor, Tensor> lora_linear_fwd_cuda(const Tensor& x, const Tensor& weight,
                                                const std::optional<Tensor>& bias, const Tensor& A,
                                                const Tensor& B, double alpha);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lora_linear_bwd_cuda(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& A, const Tensor& B,
    const Tensor& h, double alpha, const std::vector<bool>& needs);

// The same with a weight that pack_weight has laid out: of weight.T for the forward and of weight
// for the backward, which reads `packed` for dx alone.
std::tuple<Tensor, Tensor> lora_linear_fwd_packed_cpu(const Tensor& x, const Tensor& weight,
                                                      const std::optional<Tensor>& bias,
                                                      const Tensor& A, const Tensor& B,
                                                      double alpha,
                                                      const std::optional<Tensor>& packed);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lora_linear_bwd_packed_cpu(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& A, const Tensor& B,
    const Tensor& h, double alpha, const std::vector<bool>& needs,
    const std::optional<Tensor>& packed);
// The panels of weight, or of weight.T, in the dtype that products accumulate in.
Tensor pack_weight_cpu(const Tensor& weight, bool transposed);

}  // namespace lora_ext
