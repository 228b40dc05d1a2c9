// Registers the emulated CUDA kernels as the CPU's, in place of lora_ext._C.
#include <torch/csrc/stable/library.h>

#include "lora_linear.h"

STABLE_TORCH_LIBRARY_IMPL(lora_ext, CPU, library) {
  library.impl("lora_linear_fwd", TORCH_BOX(&lora_ext::lora_linear_fwd_cuda));
  library.impl("lora_linear_bwd", TORCH_BOX(&lora_ext::lora_linear_bwd_cuda));
}
