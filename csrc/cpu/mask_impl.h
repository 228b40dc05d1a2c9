// The block operations for dropout's mask, see MaskOps in blocks.h. Part of blocks_impl.h. Loops
// that g++ vectorises: each works on 64 elements, an array of bytes that are 0 or 1 between the two
// steps.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/blocks.h"

namespace lora_ext::cpu {
namespace {

constexpr int64_t kMaskBlock = 64;

// bits = kept, bytes of 0 or 1, eight in a byte. One multiplication moves the lowest bit of byte i
// to bit 56 + i, and no other pair of a bit and a term of the factor meets there.
inline void bits_of_bytes(const uint8_t (&kept)[kMaskBlock], int64_t bytes, uint8_t* bits) {
  for (int64_t i = 0; i < bytes; ++i) {
    uint64_t eight = 0;
    for (int64_t k = 0; k < 8; ++k) eight |= static_cast<uint64_t>(kept[8 * i + k]) << 8 * k;
    bits[i] = static_cast<uint8_t>(eight * 0x0102040810204080 >> 56);
  }
}

// One row's bits, by blocks: keep(k) is 0 or 1 for element k.
template <typename F>
inline void row_of_bits(int64_t cols, uint8_t* bits, const F& keep) {
  int64_t from = 0;
  uint8_t kept[kMaskBlock];
  for (; from + kMaskBlock <= cols; from += kMaskBlock) {
    for (int64_t i = 0; i < kMaskBlock; ++i) kept[i] = keep(from + i);
    bits_of_bytes(kept, kMaskBlock / 8, bits + from / 8);
  }
  if (from == cols) return;
  for (int64_t i = 0; i < kMaskBlock; ++i) kept[i] = from + i < cols ? keep(from + i) : 0;
  bits_of_bytes(kept, (cols - from + 7) / 8, bits + from / 8);
}

// As lora_ext/dropout.py's keep_mask, in int32 where products wrap and shifts keep the sign.
void draw_bits(uint32_t row, const uint32_t* columns, int64_t cols, int32_t threshold,
               uint8_t* bits) {
  row_of_bits(cols, bits, [&](int64_t k) {
    uint32_t n = (row ^ columns[k]) * 0x21F0AAAD;
    n = (n ^ static_cast<uint32_t>(static_cast<int32_t>(n) >> 15)) * 0x735A2D97;
    return static_cast<uint8_t>(static_cast<int32_t>(n) >= threshold);
  });
}

void pack_bits(const uint8_t* mask, int64_t stride, int64_t cols, uint8_t* bits) {
  if (stride == 1) {
    row_of_bits(cols, bits, [&](int64_t k) { return static_cast<uint8_t>(mask[k] != 0); });
  } else {
    row_of_bits(cols, bits, [&](int64_t k) { return static_cast<uint8_t>(mask[k * stride] != 0); });
  }
}

}  // namespace
}  // namespace lora_ext::cpu
