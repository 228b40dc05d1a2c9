// The choice of instruction set, made once a process.
#pragma once

#include "cpu/blocks.h"

namespace lora_ext::cpu {

// The fastest block operations this CPU runs. LORA_EXT_CPU_ISA=baseline|avx2|avx512|avx512_bf16
// asks for one instruction set, or the widest below it that the CPU has, so that a test can run
// each.
const Blocks& blocks();

// Whether PyTorch's GEMM beats our own product by strips (products.h) at x @ weight.T and dy @
// weight. On a Zen 3 core, torch 2.13, whose FMA units give 102 GFLOP/s: float 92 to 95 for its
// GEMM alone and 93 to 97 for our product alone (weight packed), and ours takes the low-rank part
// along. Of a 16-bit dtype that the hardware lacks its fallback reaches 10 at x @ weight.T and 1 at
// dy @ weight. Double is level. With AVX-512 ours has never been timed.
template <typename T>
bool library_product_is_faster();

// Up to how many rows the weight is read as it lies: x @ weight.T by dot products, dx by strips. On
// a Zen 3 core, float: 0.42 ms for 0.47 by packed strips with 32 rows of 768 x 768; with 64 rows
// 0.84 for 0.87 there, but 4.6 for 3.9 of 3072 x 768. Not timed with AVX-512, where only what
// streams the weight once is taken.
int64_t rows_of_dots();

}  // namespace lora_ext::cpu
