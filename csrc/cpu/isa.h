// The choice of instruction set, made once a process.
#pragma once

#include "cpu/blocks.h"

namespace lora_ext::cpu {

// The widest block operations this CPU runs. LORA_EXT_CPU_ISA=baseline|avx2|avx512 caps the choice,
// so that a test can run the narrower ones.
const Blocks& blocks();

}  // namespace lora_ext::cpu
