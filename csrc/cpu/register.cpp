// Registers the CPU kernels for the operators that lora_ext/ops.py declares.
#include <torch/csrc/stable/library.h>

#include "lora_linear.h"

STABLE_TORCH_LIBRARY_IMPL(lora_ext, CPU, library) {
  library.impl("lora_linear_fwd", TORCH_BOX(&lora_ext::lora_linear_fwd_cpu));
  library.impl("lora_linear_bwd", TORCH_BOX(&lora_ext::lora_linear_bwd_cpu));
  library.impl("lora_linear_fwd_packed", TORCH_BOX(&lora_ext::lora_linear_fwd_packed_cpu));
  library.impl("lora_linear_bwd_packed", TORCH_BOX(&lora_ext::lora_linear_bwd_packed_cpu));
  library.impl("pack_weight", TORCH_BOX(&lora_ext::pack_weight_cpu));
}
