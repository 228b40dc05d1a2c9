// The kernels of the operators; their schemas are in lora_ext/ops.py.
#pragma once

#include "call.h"

namespace lora_ext {

// y and h.
std::tuple<Tensor, Tensor> linear_fwd(const Tensor& x, const std::optional<Tensor>& weight,
                                      const std::optional<Tensor>& bias, const Tensor& A,
                                      const Tensor& B, double scale, const std::string& format,
                                      const std::optional<Tensor>& keep,
                                      const std::optional<Tensor>& weight_scale);
// dx, dweight, dbias, dA and dB.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_bwd(
    const Tensor& dy, const std::optional<Tensor>& x, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& A, const std::optional<Tensor>& B, const std::optional<Tensor>& h,
    double scale, const std::vector<bool>& needs, const std::string& format,
    const std::optional<Tensor>& keep, const std::optional<Tensor>& weight_scale);
// The same for layers of one x, a list an operand: a y each, and their h side by side.
std::tuple<std::vector<Tensor>, Tensor> linears_fwd(
    const Tensor& x, const std::vector<Tensor>& weights,
    const std::vector<std::optional<Tensor>>& biases, const std::vector<Tensor>& As,
    const std::vector<Tensor>& Bs, const std::vector<double>& scales,
    const std::vector<std::string>& formats, const std::vector<std::optional<Tensor>>& keeps,
    const std::vector<std::optional<Tensor>>& weight_scales);
// dx, the sum over layers, and for each dweight, dbias, dA and dB. `needs` asks in that order.
std::vector<Tensor> linears_bwd(const std::vector<Tensor>& dys, const std::optional<Tensor>& x,
                                const std::vector<std::optional<Tensor>>& weights,
                                const std::vector<std::optional<Tensor>>& As,
                                const std::vector<std::optional<Tensor>>& Bs,
                                const std::vector<std::optional<Tensor>>& hs,
                                const std::vector<double>& scales, const std::vector<bool>& needs,
                                const std::vector<std::string>& formats,
                                const std::vector<std::optional<Tensor>>& keeps,
                                const std::vector<std::optional<Tensor>>& weight_scales);
// Of a gated MLP: act(gate) * up, and its gradients into d_gate, which may be d_hidden, and d_up.
Tensor gated_fwd(const Tensor& gate, const Tensor& up, const std::string& act);
void gated_bwd(const Tensor& d_hidden, const Tensor& gate, const Tensor& up, const std::string& act,
               Tensor d_gate, Tensor d_up);
// The norms of the rows of weight + scale * (A @ B).T, (N,), float32 or double.
Tensor dora_norm(const Tensor& weight, const Tensor& A, const Tensor& B, double scale);
// DoRA over a dropped x, from y = x @ weight.T + scale * h @ B: with factor = g - 1 and z, what the
// dropped x gives, y += factor * z + bias; returns z. Of its gradient, dx -= (factor * dy) @ weight
// where x is dropped.
Tensor dora_dropped_fwd(Tensor y, const Tensor& x, const Tensor& weight,
                        const std::optional<Tensor>& bias, const Tensor& h, const Tensor& B,
                        const Tensor& keep, const Tensor& factor, double scale, double p);
void dora_dropped_bwd(Tensor dx, const Tensor& dy, const Tensor& weight, const Tensor& keep,
                      const Tensor& factor);
// The panels of weight, or of weight.T, in the dtype that products accumulate in.
Tensor pack_weight(const Tensor& weight, bool transposed);
// Dropout's mask as bits: drawn from a seed's hash, of a wider mask's columns from one on; from the
// state of PyTorch's CPU generator, which goes on by the draw, or of a mask of bytes.
Tensor draw_keep(const Tensor& seed, int64_t rows, int64_t cols, double p, int64_t first_column);
Tensor draw_bernoulli(const Tensor& state, int64_t rows, int64_t cols, double p);
Tensor pack_keep(const Tensor& mask);

}  // namespace lora_ext
