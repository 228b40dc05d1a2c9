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

void hash_columns(int64_t from, int64_t count, const int64_t (&seed)[2], uint32_t* hashes) {
  const auto first = static_cast<uint64_t>(seed[0]), second = static_cast<uint64_t>(seed[1]);
  for (int64_t k = 0; k < count; ++k) {
    hashes[k] = mix(mix(static_cast<uint64_t>(from + k) ^ second) ^ first);
  }
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

// Matsumoto and Nishimura, "Mersenne Twister", ACM TOMACS 8(1), 1998. A word is made of the two at
// its place and the one 397 further on; out of place, so that the loops are vectorised.
void twist(uint32_t* state) {
  constexpr int64_t n = kTwisterWords, m = 397;
  const auto mixed = [](uint32_t first, uint32_t second) {
    const uint32_t both = (first & 0x80000000) | (second & 0x7FFFFFFF);
    return both >> 1 ^ (second & 1 ? 0x9908B0DF : 0);
  };
  uint32_t next[n];
  for (int64_t i = 0; i < n - m; ++i) next[i] = state[i + m] ^ mixed(state[i], state[i + 1]);
  for (int64_t i = n - m; i < n - 1; ++i) {
    next[i] = next[i + m - n] ^ mixed(state[i], state[i + 1]);
  }
  next[n - 1] = next[m - 1] ^ mixed(state[n - 1], next[0]);
  std::memcpy(state, next, sizeof(next));
}

// As PyTorch's CPU generator makes a double of two words, the first the high one, and compares it.
void bernoulli(const uint32_t* words, int64_t count, int64_t threshold, uint8_t* kept) {
  const auto tempered = [](uint32_t word) {
    word ^= word >> 11;
    word ^= word << 7 & 0x9D2C5680;
    word ^= word << 15 & 0xEFC60000;
    return word ^ word >> 18;
  };
  for (int64_t i = 0; i < count; ++i) {
    const int64_t high = tempered(words[2 * i]) & 0x1FFFFF, low = tempered(words[2 * i + 1]);
    kept[i] = static_cast<uint8_t>((high << 32 | low) < threshold);
  }
}

}  // namespace
}  // namespace lora_ext::cpu
