// The emulator's own test: each primitive against a result worked out by hand, and each misuse that
// it has to notice. Without an argument all that should work; with one, that misuse.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cuda/primitives.h"

using namespace lora_ext::cuda;

namespace {

#define EXPECT(condition)                                                 \
  if (!(condition)) {                                                     \
    std::fprintf(stderr, "line %d: %s is false\n", __LINE__, #condition); \
    std::exit(1);                                                         \
  }

struct Memory {
  void* data;
};

// Element (row, col) is 100 row + col: exact in 16 bits, and no two are alike.
void load_matrices_kernel(Memory out) {
  auto* tile = static_cast<uint16_t*>(shared_memory());  // (32, 8)
  const int lane = threadIdx.x;
  for (int col = 0; col < 8; ++col) tile[lane * 8 + col] = 100 * lane + col;
  barrier();
  uint32_t plain[4], transposed[4];
  load_matrices<false>(plain, tile + lane * 8);
  load_matrices<true>(transposed, tile + lane * 8);
  auto* to = static_cast<uint32_t*>(out.data) + lane * 8;
  std::memcpy(to, plain, sizeof(plain));
  std::memcpy(to + 4, transposed, sizeof(transposed));
}

void check_load_matrices() {
  uint32_t out[32][8];
  launch(load_matrices_kernel, 1, 1, 32, 32 * 16, nullptr, Memory{out});
  const auto pair = [](uint32_t low, uint32_t high) { return low | high << 16; };
  EXPECT(out[0][0] == pair(0, 1));         // lane 0: row 0, columns 0 and 1 of matrix 0
  EXPECT(out[1][0] == pair(2, 3));         // lane 1: columns 2 and 3
  EXPECT(out[4][0] == pair(100, 101));     // lane 4: row 1
  EXPECT(out[31][0] == pair(706, 707));    // lane 31: row 7, columns 6 and 7
  EXPECT(out[0][1] == pair(800, 801));     // matrix 1 has rows 8 to 15 of memory
  EXPECT(out[5][3] == pair(2502, 2503));   // matrix 3: row 24 + 1
  EXPECT(out[0][4] == pair(0, 100));       // transposed: rows 0 and 1 of column 0
  EXPECT(out[1][4] == pair(200, 300));     // rows 2 and 3
  EXPECT(out[4][4] == pair(1, 101));       // lane 4: column 1
  EXPECT(out[31][7] == pair(3007, 3107));  // matrix 3: rows 24 + 6, 24 + 7 of column 7
}

// left (16, 16) @ right (16, 8) with left[i][k] = i + 1 where k == i, else 0, so that the product
// is right's rows scaled; right[k][j] = 10 k + j.
template <typename T>
void multiply_add_kernel(Memory out) {
  const int lane = threadIdx.x, g = lane / 4, c = lane % 4 * 2;
  const auto pack = [](float low, float high) {
    T values[2];
    assign(values[0], low);
    assign(values[1], high);
    return std::bit_cast<uint32_t>(values);
  };
  const auto left = [&](int i, int k) { return pack(i == k ? i + 1 : 0, i == k + 1 ? i + 1 : 0); };
  const auto right = [&](int k) { return pack(10 * k + g, 10 * (k + 1) + g); };
  const uint32_t rows[4] = {left(g, c), left(g + 8, c), left(g, c + 8), left(g + 8, c + 8)};
  float sum[4] = {0.5f, 0.5f, 0.5f, 0.5f};
  multiply_add(sum, rows, right(c), right(c + 8), T());
  std::memcpy(static_cast<float*>(out.data) + lane * 4, sum, sizeof(sum));
}

template <typename T>
void check_multiply_add() {
  float out[32][4];
  launch(multiply_add_kernel<T>, 1, 1, 32, 0, nullptr, Memory{out});
  for (int lane = 0; lane < 32; ++lane) {
    for (int e = 0; e < 4; ++e) {
      const int i = lane / 4 + e / 2 * 8, j = lane % 4 * 2 + e % 2;
      EXPECT(out[lane][e] == 0.5f + (i + 1) * (10 * i + j));
    }
  }
}

// What is in shared memory before a group of copies is waited for must not be counted on.
void copies_kernel(Memory out) {
  auto* seen = static_cast<float*>(out.data);  // before, after the first, after both
  auto* tile = static_cast<float*>(shared_memory());
  alignas(16) static const float from[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  copy_async(tile, from, 8);
  commit_copies();
  copy_async(tile + 4, from + 4, 16);
  commit_copies();
  seen[0] = tile[0];
  wait_for_copies<1>();
  std::memcpy(seen + 1, tile, 16);
  seen[5] = tile[4];
  wait_for_copies<0>();
  std::memcpy(seen + 6, tile + 4, 16);
}

void check_copies() {
  bool late = false, early = false;
  for (int seed = 0; seed < 40; ++seed) {
    emulator::set_seed(seed);
    float seen[10];
    launch(copies_kernel, 1, 1, 1, 32, nullptr, Memory{seen});
    late |= std::isnan(seen[0]) && std::isnan(seen[5]);
    early |= seen[0] == 1 && seen[5] == 5;
    EXPECT(seen[1] == 1 && seen[2] == 2 && seen[3] == 0 && seen[4] == 0);  // 8 bytes, then zeros
    EXPECT(seen[6] == 5 && seen[9] == 8);
  }
  EXPECT(late && early);
}

// Each thread reads what the one 32 further wrote; without the barrier one warp runs far ahead.
template <bool kBarrier>
void neighbour_kernel(Memory out) {
  auto* shared = static_cast<int*>(shared_memory());
  shared[threadIdx.x] = threadIdx.x;
  if (kBarrier) barrier();
  static_cast<int*>(out.data)[threadIdx.x] = shared[(threadIdx.x + 32) % 96];
}

void check_barrier() {
  int out[96], first_warps = 0;
  bool wrong_without = false;
  for (int seed = 0; seed < 40; ++seed) {
    emulator::set_seed(seed);
    launch(neighbour_kernel<true>, 1, 1, 96, 96 * 4, nullptr, Memory{out});
    for (int i = 0; i < 96; ++i) EXPECT(out[i] == (i + 32) % 96);
    launch(neighbour_kernel<false>, 1, 1, 96, 96 * 4, nullptr, Memory{out});
    for (int warp = 0; warp < 3; ++warp) {
      wrong_without |= out[32 * warp] == -1;  // memory is poisoned with ones
      first_warps |= (out[32 * warp] == -1) << warp;
    }
  }
  EXPECT(wrong_without && first_warps == 7);  // each warp was ahead of its neighbour once
}

void check_numbers() {
  BFloat16 b;
  assign(b, 1.00390625f);  // halfway between 1 and 1 + 2^-7: to even
  EXPECT(widen(b) == 1.0f);
  assign(b, 1.01171875f);  // halfway between 1 + 2^-7 and 1 + 2^-6
  EXPECT(widen(b) == 1.015625f);
  assign(b, std::numeric_limits<float>::infinity());
  EXPECT(std::isinf(widen(b)));
  Half h;
  assign(h, 1e6f);
  EXPECT(std::isinf(widen(h)));
  assign(h, 0x1p-24f);
  EXPECT(widen(h) == 0x1p-24f);  // the smallest subnormal
}

void divergent_warp_kernel(Memory) {
  uint32_t to[4];
  if (threadIdx.x != 7) load_matrices<false>(to, shared_memory());
}
void divergent_barrier_kernel(Memory) {
  if (threadIdx.x < 32) barrier();
}
void misaligned_copy_kernel(Memory memory) {
  copy_async(static_cast<char*>(shared_memory()) + 8, memory.data, 16);
}
void misaligned_row_kernel(Memory) {
  uint32_t to[4];
  load_matrices<false>(to, static_cast<char*>(shared_memory()) + 2);
}

void misuse(const char* name) {
  alignas(16) char memory[16];
  const auto run = [&](const char* of, void (*kernel)(Memory)) {
    if (std::strcmp(name, of) == 0) launch(kernel, 1, 1, 64, 1024, nullptr, Memory{memory});
  };
  run("divergent_warp", divergent_warp_kernel);
  run("divergent_barrier", divergent_barrier_kernel);
  run("misaligned_copy", misaligned_copy_kernel);
  run("misaligned_row", misaligned_row_kernel);
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1) {
    misuse(arguments[1]);
    return 0;
  }
  check_numbers();
  check_load_matrices();
  check_multiply_add<Half>();
  check_multiply_add<BFloat16>();
  check_copies();
  check_barrier();
}
