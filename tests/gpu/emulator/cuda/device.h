// What csrc/cuda/device.h declares, for tensors on the CPU.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/tensor.h>

namespace lora_ext::cuda {

using torch::stable::Tensor;

class Device {
 public:
  explicit Device(const Tensor&) {}
  void* stream() const { return nullptr; }
  int index() const { return 0; }
};

inline void mm_out(const Tensor& left, const Tensor& right, const Tensor& out) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), left.get(), right.get()));
}

inline void addmm_out(const Tensor& add, const Tensor& left, const Tensor& right, double beta,
                      double alpha, const Tensor& out) {
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), add.get(), left.get(), right.get(), beta, alpha));
}

}  // namespace lora_ext::cuda
