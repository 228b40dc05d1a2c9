// Registers the CUDA kernels for the operators that lora_ext/ops.py declares; the CPU's are in _C.
#include <torch/csrc/stable/library.h>

#include "operators.h"

STABLE_TORCH_LIBRARY_IMPL(lora_ext, CUDA, library) {
  library.impl("linear_fwd", TORCH_BOX(&lora_ext::linear_fwd));
  library.impl("linear_bwd", TORCH_BOX(&lora_ext::linear_bwd));
}
