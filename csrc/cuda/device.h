// The device that a tensor lies on, and PyTorch's own operators there.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "tensor_utils.h"

namespace lora_ext::cuda {

using torch::stable::Tensor;

// Makes a tensor's device the current one as long as it lives.
class Device {
 public:
  explicit Device(const Tensor& tensor)
      : guard_(tensor.get_device_index()), index_(tensor.get_device_index()) {}

  int index() const { return index_; }
  void* stream() const {
    void* stream;
    LORA_EXT_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return stream;
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  int index_;
};

inline void mm_out(const Tensor& left, const Tensor& right, const Tensor& out) {
  LORA_EXT_CHECK(aoti_torch_cuda_mm_out(out.get(), left.get(), right.get()));
}

// out = beta * add + alpha * left @ right; with beta 0 `add` is not read and may be `out`.
inline void addmm_out(const Tensor& add, const Tensor& left, const Tensor& right, double beta,
                      double alpha, const Tensor& out) {
  LORA_EXT_CHECK(
      aoti_torch_cuda_addmm_out(out.get(), add.get(), left.get(), right.get(), beta, alpha));
}

}  // namespace lora_ext::cuda
