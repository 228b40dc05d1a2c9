// The choice of instruction set, made once a process.
#pragma once

#include "cpu/blocks.h"

namespace lora_ext::cpu {

// The fastest block operations this CPU runs. LORA_EXT_CPU_ISA=baseline|avx2|avx512|avx512_bf16
// asks for one instruction set, or the widest below it that the CPU has, so that a test can run
// each.
const Blocks& blocks();

}  // namespace lora_ext::cpu
