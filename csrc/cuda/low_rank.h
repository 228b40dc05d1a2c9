// The low-rank part of a call on CUDA tensors: by our kernels for 16-bit dtypes, by PyTorch's
// products for float and double, where kernels of ours have no tensor cores to gain by.
#pragma once

#include <utility>
#include <vector>

#include "call.h"
#include "cuda/device.h"
#include "cuda/kernels.h"
#include "tensor_utils.h"

namespace lora_ext::cuda {

// A matrix of a call, or its transpose.
struct Side {
  Side(const Tensor& tensor, bool turned = false) : tensor(tensor), turned(turned) {}
  Tensor as_tensor() const { return turned ? lora_ext::transposed(tensor) : tensor; }

  const Tensor& tensor;
  bool turned;
};

// Device, stream and dtype of one call, and the scratch memory it has taken: freed with it, which
// PyTorch's allocator hands only to later work on the same stream.
class Launch {
 public:
  Launch(const char* name, const Operand& like);

  bool is_half() const { return dtype_ == DType::kHalf || dtype_ == DType::kBFloat16; }
  // A or B in the dtype that products have: float over a 16-bit base is rounded once.
  Tensor rounded(const Tensor& factor) const;

  // h = (keep * x) @ A; t = dy @ B.T
  void shrink(const Side& x, const Operand& keep, const Side& A, const Tensor& h);
  // y = scale * keep * (h @ B), added to what is there with `onto`; dx of t and A.T
  void expand(const Side& h, const Side& B, double scale, const Operand& keep, const Tensor& y,
              bool onto);
  // dA = scale * (keep * x).T @ t; dB.T = scale * dy.T @ h, `turned` as dB
  void gradient(const Tensor& x, const Operand& keep, const Tensor& t, double scale,
                const Side& dA);

  // The base product too, by kernels of ours: y = x @ weight.T + bias + scale * h @ B
  void forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
               const Tensor& h, const Tensor& B, double scale, const Tensor& y);
  // dx = dy @ weight + scale * keep * (t @ A.T)
  void backward_dx(const Tensor& dy, const Tensor& weight, const Tensor& t, const Tensor& A,
                   double scale, const Operand& keep, const Tensor& dx);

 private:
  Context context();
  Matrix matrix(const Side& side) const;
  Tensor masked(const Tensor& x, const Operand& keep);
  void product(const Tensor& left, const Tensor& right, double scale, const Tensor& out);

  const DType dtype_;
  const Device device_;
  const int multiprocessors_;
  const Tensor& like_;
  std::vector<Tensor> scratch_;
};

}  // namespace lora_ext::cuda
