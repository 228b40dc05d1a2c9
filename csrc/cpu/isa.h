// The choice of instruction set, made once a process.
#pragma once

#include "cpu/blocks.h"

namespace lora_ext::cpu {

// The widest block operations this CPU runs. LORA_EXT_CPU_ISA=baseline|avx2|avx512 caps the choice,
// so that a test can run the narrower ones.
const Blocks& blocks();

// Whether PyTorch's GEMM for a dtype runs at the CPU's own rate. For a 16-bit dtype that the
// hardware lacks its fallback reaches 10 of 95 GFLOP/s at x @ weight.T and 1 at dy @ weight (Zen 3
// core, torch 2.13), and our own product, which widens to float on the way in, is the faster one.
template <typename T>
bool library_gemm_is_fast();

// Up to how many rows of x our dot products beat the library at x @ weight.T. On a Zen 3 core,
// float, 2048 x 2048 (torch 2.13): 329 us for 366 with 1 row, 659 for 1640 with 4, 1240 for 1923
// with 8. Not measured with AVX-512, where only what streams the weight once is taken.
int64_t dot_rows();

}  // namespace lora_ext::cpu
