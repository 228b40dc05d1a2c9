// Block operations for AVX-512 with BF16: those of AVX-512, and its instruction for pairs.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(                                                                 \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c,prfchw"))), \
    apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12, in its own avx512fintrin.h
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c,prefer-vector-width=512")
#pragma GCC target("prfchw")
#endif
#define LORA_EXT_VECTOR_BYTES 64
#define LORA_EXT_TILE_ROWS 8
#define LORA_EXT_TILE_PANELS 2
#define LORA_EXT_DPBF16
#include "cpu/blocks_impl.h"

namespace lora_ext::cpu {
const Blocks kAvx512Bf16Blocks = make_blocks("avx512_bf16");
}  // namespace lora_ext::cpu
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
