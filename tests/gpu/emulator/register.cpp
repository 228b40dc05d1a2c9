// Registers the emulated CUDA kernels as the CPU's, in place of lora_ext._C.
#include <torch/csrc/stable/library.h>

#include "operators.h"

STABLE_TORCH_LIBRARY_IMPL(lora_ext, CPU, library) {
  library.impl("linear_fwd", TORCH_BOX(&lora_ext::linear_fwd));
  library.impl("linear_bwd", TORCH_BOX(&lora_ext::linear_bwd));
}
