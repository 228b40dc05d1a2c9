// Registers the CUDA kernels for the operators that lora_ext/ops.py declares for them. Not the
// names that the CPU kernels have: for CUDA tensors the Triton kernels are registered there.
#include <torch/csrc/stable/library.h>

#include "lora_linear.h"

STABLE_TORCH_LIBRARY_IMPL(lora_ext, CUDA, library) {
  library.impl("lora_linear_fwd_cuda", TORCH_BOX(&lora_ext::lora_linear_fwd_cuda));
  library.impl("lora_linear_bwd_cuda", TORCH_BOX(&lora_ext::lora_linear_bwd_cuda));
}
