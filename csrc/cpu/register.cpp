// Registers the CPU kernels for the operators that lora_ext/ops.py declares.
#include <torch/csrc/stable/library.h>

#include "operators.h"

STABLE_TORCH_LIBRARY_IMPL(lora_ext, CPU, library) {
  library.impl("linear_fwd", TORCH_BOX(&lora_ext::linear_fwd));
  library.impl("linear_bwd", TORCH_BOX(&lora_ext::linear_bwd));
  library.impl("linears_fwd", TORCH_BOX(&lora_ext::linears_fwd));
  library.impl("linears_bwd", TORCH_BOX(&lora_ext::linears_bwd));
  library.impl("gated_fwd", TORCH_BOX(&lora_ext::gated_fwd));
  library.impl("gated_bwd", TORCH_BOX(&lora_ext::gated_bwd));
  library.impl("dora_norm", TORCH_BOX(&lora_ext::dora_norm));
  library.impl("dora_dropped_fwd", TORCH_BOX(&lora_ext::dora_dropped_fwd));
  library.impl("dora_dropped_bwd", TORCH_BOX(&lora_ext::dora_dropped_bwd));
  library.impl("pack_weight", TORCH_BOX(&lora_ext::pack_weight));
  library.impl("draw_keep", TORCH_BOX(&lora_ext::draw_keep));
  library.impl("draw_bernoulli", TORCH_BOX(&lora_ext::draw_bernoulli));
  library.impl("pack_keep", TORCH_BOX(&lora_ext::pack_keep));
}
