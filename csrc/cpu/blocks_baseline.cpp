// Block operations for any CPU that the compiler's default target covers: SSE2 on x86-64 (16
// registers of 16 bytes: 3 rows of 4 vectors), NEON on aarch64 (32 registers: 6 rows of 4).
#define LORA_EXT_VECTOR_BYTES 16
#if defined(__aarch64__)
#define LORA_EXT_TILE_ROWS 6
#else
#define LORA_EXT_TILE_ROWS 3
#endif
#define LORA_EXT_TILE_PANELS 1
#include "cpu/blocks_impl.h"

namespace lora_ext::cpu {
const Blocks kBaselineBlocks = make_blocks("baseline");
}  // namespace lora_ext::cpu
