// A CUDA block on one CPU thread: each CUDA thread is a fiber, and what a kernel asks of the
// hardware (csrc/cuda/primitives.h) has its documented meaning and no more. What CUDA leaves open
// is decided by a seed, for the worst: the order of threads, and when an asynchronous copy is done.
//
// - Between two barriers one warp runs as far as it can before the next one starts, in an order
//   drawn again at each barrier; so what a missing barrier would have kept apart is far apart.
// - A copy is done where it is issued or, as often, as late as its group allows.
// - Shared memory is NaN before a block starts, and no larger than the launch asks for.
// - A warp-wide instruction that not all 32 lanes reach, a barrier that not all threads reach and a
//   misaligned address end the process with a message.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {

struct Index {
  unsigned x = 0, y = 0;
};

// Run `thread` once for each thread of each block, one block after the other.
void run(int64_t blocks_x, int64_t blocks_y, int threads, size_t shared_bytes,
         void (*thread)(const void* argument), const void* argument);

void set_seed(uint64_t seed);  // of the launches from here on; 0 at start

// From a kernel:
void* shared_memory();
void barrier();
void copy_async(void* to, const void* from, int bytes);
void commit_copies();
void wait_for_copies(int pending);

// Wait until all lanes of the warp are here, with arguments of their own; one then does `operation`
// on all of them, in the order of lanes.
constexpr int kLanes = 32;
void with_warp(void (*operation)(void* const (&lanes)[kLanes]), void* argument);

// Whether LORA_EXT_EMULATOR_WITHOUT names this place, as in "tile.h:12".
bool left_out(const char* file, unsigned line);

[[noreturn]] void fail(const char* what);
void check_aligned(const void* address, size_t bytes);

}  // namespace emulator

// As CUDA names them, for the thread that runs.
extern emulator::Index threadIdx, blockIdx;

#define __device__
#define __global__
#define __launch_bounds__(...)
