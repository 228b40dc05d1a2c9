// The choice of instruction set, made once a process.
#pragma once

#include "cpu/blocks.h"

namespace lora_ext::cpu {

// The widest block operations this CPU runs. LORA_EXT_CPU_ISA=baseline|avx2|avx512 caps the choice,
// so that a test can run the narrower ones.
const Blocks& blocks();

// Whether PyTorch's GEMM for a 16-bit dtype runs at the CPU's own rate. Where the hardware lacks
// the dtype its fallback reaches a tenth of the float rate (10 of 95 GFLOP/s on a Zen 3 core,
// torch 2.13), and our own product, which widens to float on the way in, is the faster one.
template <typename T>
bool library_gemm_is_fast();

}  // namespace lora_ext::cpu
