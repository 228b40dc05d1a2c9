// Block operations for AVX-512 (F, BW, DQ, VL). A tile of 8 rows by 2 panels: 10 loads feed 16
// multiplications, and 8 rows a multiple of 4 KB apart share a set of the first-level cache.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(                                                      \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,prfchw"))), \
    apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12, in its own avx512fintrin.h
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,prefer-vector-width=512")
#pragma GCC target("prfchw")
#endif
#define LORA_EXT_VECTOR_BYTES 64
#define LORA_EXT_TILE_ROWS 8
#define LORA_EXT_TILE_PANELS 2
#include "cpu/blocks_impl.h"

namespace lora_ext::cpu {
const Blocks kAvx512Blocks = make_blocks("avx512");
}  // namespace lora_ext::cpu
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
