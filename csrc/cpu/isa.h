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

// Up to how many rows of x or dy our products, which read the weight where it lies, beat the
// library's. On a Zen 3 core, float (torch 2.13): x @ weight.T by dot products 78 us for 145 with 4
// rows of 768 x 768, 275 for 297 with 16, 2112 for 2881 with 16 of 2048 x 2048; dy @ weight 267 us
// for 285, 2249 for 2343. With 32 rows neither gains. Not measured with AVX-512, where only what
// streams the weight once is taken.
int64_t own_product_rows();

}  // namespace lora_ext::cpu
