// What csrc/cuda/primitives.h declares, in the emulator: each by its definition in the PTX manual.
#pragma once

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <source_location>

#include "emulator.h"

namespace lora_ext::cuda {

struct Half {
  _Float16 value;
};
struct BFloat16 {
  uint16_t bits;
};

inline float widen(Half value) { return value.value; }
inline float widen(BFloat16 value) { return std::bit_cast<float>(uint32_t(value.bits) << 16); }
inline float widen(float value) { return value; }
inline double widen(double value) { return value; }

inline void assign(Half& to, float value) { to.value = static_cast<_Float16>(value); }
inline void assign(BFloat16& to, float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  to.bits = std::isnan(value) ? 0x7FC0 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
inline void assign(float& to, float value) { to = value; }
inline void assign(double& to, double value) { to = value; }

using emulator::commit_copies;
using emulator::copy_async;
using emulator::shared_memory;

// Each has a place in the source, at which a test may have it left out.
using Line = std::source_location;

inline void barrier(Line at = Line::current()) {
  if (!emulator::left_out(at.file_name(), at.line())) emulator::barrier();
}

inline void warp_barrier(Line at = Line::current()) {
  if (emulator::left_out(at.file_name(), at.line())) return;
  emulator::with_warp([](void* const(&)[emulator::kLanes]) {}, nullptr);
}

template <int kBytes>
void copy_piece(void* to, const void* from) {
  emulator::check_aligned(to, kBytes);
  emulator::check_aligned(from, kBytes);
  std::memcpy(to, from, kBytes);
}

template <int kPending>
void wait_for_copies(Line at = Line::current()) {
  if (!emulator::left_out(at.file_name(), at.line())) emulator::wait_for_copies(kPending);
}

struct LoadMatrices {
  uint32_t (*to)[4];
  const char* row;  // 16 bytes
};

template <bool kTransposed>
void load_matrices_of_warp(void* const (&lanes)[emulator::kLanes]) {
  const auto of = [&](int lane) { return static_cast<LoadMatrices*>(lanes[lane]); };
  for (int lane = 0; lane < 32; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t pair[2];
      for (int e = 0; e < 2; ++e) {
        const int row = kTransposed ? lane % 4 * 2 + e : lane / 4;
        const int col = kTransposed ? lane / 4 : lane % 4 * 2 + e;
        std::memcpy(&pair[e], of(matrix * 8 + row)->row + 2 * col, 2);
      }
      (*of(lane)->to)[matrix] = pair[0] | uint32_t(pair[1]) << 16;
    }
  }
}

template <bool kTransposed>
void load_matrices(uint32_t (&to)[4], const void* row) {
  emulator::check_aligned(row, 16);
  LoadMatrices argument = {&to, static_cast<const char*>(row)};
  emulator::with_warp(load_matrices_of_warp<kTransposed>, &argument);
}

struct MultiplyAdd {
  float* sum;
  const uint32_t* left;
  uint32_t right[2];
};

template <typename T>
float element(uint32_t pair, int e) {
  const auto bits = static_cast<uint16_t>(pair >> 16 * e);
  return widen(std::bit_cast<T>(bits));
}

template <typename T>
void multiply_add_of_warp(void* const (&lanes)[emulator::kLanes]) {
  float left[16][16], right[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = *static_cast<MultiplyAdd*>(lanes[lane]);
    const int g = lane / 4, c = lane % 4 * 2;
    for (int e = 0; e < 8; ++e)
      left[g + e / 2 % 2 * 8][c + e / 4 * 8 + e % 2] = element<T>(own.left[e / 2], e % 2);
    for (int e = 0; e < 4; ++e)
      right[c + e / 2 * 8 + e % 2][g] = element<T>(own.right[e / 2], e % 2);
  }
  float sum[16][8];
  for (int i = 0; i < 16; ++i) {
    float row[8] = {};
    for (int k = 0; k < 16; ++k) {
      for (int j = 0; j < 8; ++j) row[j] += left[i][k] * right[k][j];
    }
    std::memcpy(sum[i], row, sizeof(row));
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* own = static_cast<MultiplyAdd*>(lanes[lane])->sum;
    for (int e = 0; e < 4; ++e) own[e] += sum[lane / 4 + e / 2 * 8][lane % 4 * 2 + e % 2];
  }
}

template <typename T>
void multiply_add(float (&sum)[4], const uint32_t (&left)[4], uint32_t right0, uint32_t right1, T) {
  MultiplyAdd argument = {sum, left, {right0, right1}};
  emulator::with_warp(multiply_add_of_warp<T>, &argument);
}

// A small card, so that small problems take every way.
inline void use_device(int) {}
inline int multiprocessors_of(int) { return 4; }

template <typename Argument>
void launch(void (*kernel)(Argument), int64_t blocks_x, int64_t blocks_y, int threads,
            int shared_bytes, void*, Argument argument) {
  struct Launch {
    void (*kernel)(Argument);
    Argument argument;
  } of_all = {kernel, argument};
  if (blocks_x < 1 || blocks_x >= int64_t(1) << 31 || blocks_y < 1 || blocks_y > 65535 ||
      threads < 1 || threads > 1024 || shared_bytes > 99 * 1024) {
    emulator::fail("a launch that a card would refuse");
  }
  emulator::run(
      blocks_x, blocks_y, threads, shared_bytes,
      [](const void* all) {
        const auto* launch = static_cast<const Launch*>(all);
        launch->kernel(launch->argument);
      },
      &of_all);
}

}  // namespace lora_ext::cuda
