// Block operations for AVX2 with FMA and F16C. A tile of 6 rows by 2 vectors keeps 12 sums, 2 panel
// vectors and a broadcast in the 16 registers.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define LORA_EXT_VECTOR_BYTES 32
#define LORA_EXT_TILE_ROWS 6
#define LORA_EXT_TILE_PANELS 1
#include "cpu/blocks_impl.h"

namespace lora_ext::cpu {
const Blocks kAvx2Blocks = make_blocks("avx2");
}  // namespace lora_ext::cpu
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
