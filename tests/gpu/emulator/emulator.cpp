#include "emulator.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

emulator::Index threadIdx, blockIdx;

// Exchange stacks: save this one's registers and place in *from, go on at `to`.
extern "C" void emulator_switch(void** from, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.globl emulator_switch
emulator_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");
#else
#error "the emulator switches stacks by x86-64 instructions"
#endif

namespace emulator {
namespace {

struct Copy {
  void* to;
  const void* from;
  int bytes;

  void perform() const {
    std::memcpy(to, from, bytes);
    std::memset(static_cast<char*>(to) + bytes, 0, 16 - bytes);
  }
};

enum class State { kReady, kAtWarp, kAtBarrier, kDone };

constexpr size_t kStackBytes = 64 * 1024;

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  void* context = nullptr;  // its stack while it does not run
  State state = State::kDone;
  void (*operation)(void* const (&)[kLanes]) = nullptr;
  void* argument = nullptr;
  std::deque<std::vector<Copy>> groups;  // committed, oldest first
  std::vector<Copy> open;
};

struct Machine {
  std::vector<Fiber> fibers;
  std::unique_ptr<char[]> shared;
  void (*thread)(const void*) = nullptr;
  const void* argument = nullptr;
  int current = 0;
  void* scheduler = nullptr;  // the stack of run()
  std::mt19937_64 random;
  uint64_t seed = 0;
};
Machine machine;

Fiber& self() { return machine.fibers[machine.current]; }

void pause_as(State state) {
  Fiber& fiber = self();
  fiber.state = state;
  emulator_switch(&fiber.context, machine.scheduler);
}

void fiber_main() {
  machine.thread(machine.argument);
  pause_as(State::kDone);
  fail("a finished thread went on");
}

void start(Fiber& fiber) {
  fiber.groups.clear();
  fiber.open.clear();
  fiber.state = State::kReady;
  auto top = reinterpret_cast<uintptr_t>(fiber.stack.get() + kStackBytes) / 16 * 16;
  auto* words = reinterpret_cast<void**>(top) - 2;  // a return address, then as after a call
  words[0] = reinterpret_cast<void*>(&fiber_main);
  words[1] = nullptr;
  fiber.context = words - 6;  // six registers of any value
  std::fill_n(words - 6, 6, nullptr);
}

void resume(int thread) {
  machine.current = thread;
  threadIdx.x = thread;
  emulator_switch(&machine.scheduler, machine.fibers[thread].context);
}

// Run a warp's lanes, in a changing order, until each is at a barrier or done.
void run_warp(int first, int lanes) {
  while (true) {
    const unsigned from = machine.random(), step = machine.random() | 1;
    for (unsigned i = 0; i < kLanes; ++i) {
      const int lane = (from + i * step) % kLanes;
      if (lane < lanes && machine.fibers[first + lane].state == State::kReady) resume(first + lane);
    }
    void* arguments[kLanes];
    int waiting = 0;
    for (int lane = 0; lane < lanes; ++lane) {
      Fiber& fiber = machine.fibers[first + lane];
      if (fiber.state == State::kAtWarp) arguments[waiting++] = fiber.argument;
    }
    if (waiting == 0) return;
    if (waiting != kLanes) fail("a warp-wide instruction that not all lanes of the warp reach");
    for (int lane = 0; lane < lanes; ++lane) {
      Fiber& fiber = machine.fibers[first + lane];
      if (fiber.operation != machine.fibers[first].operation) {
        fail("lanes of a warp at different warp-wide instructions");
      }
      fiber.state = State::kReady;
    }
    machine.fibers[first].operation(arguments);
  }
}

void run_block(int threads) {
  for (int i = 0; i < threads; ++i) start(machine.fibers[i]);
  std::vector<int> warps((threads + kLanes - 1) / kLanes);
  std::iota(warps.begin(), warps.end(), 0);
  while (true) {
    std::shuffle(warps.begin(), warps.end(), machine.random);
    for (const int warp : warps) {
      run_warp(warp * kLanes, std::min(kLanes, threads - warp * kLanes));
    }
    int at_barrier = 0;
    for (int i = 0; i < threads; ++i) {
      at_barrier += machine.fibers[i].state == State::kAtBarrier;
    }
    if (at_barrier == 0) return;
    if (at_barrier != threads) fail("a barrier that not all threads of the block reach");
    for (int i = 0; i < threads; ++i) machine.fibers[i].state = State::kReady;
  }
}

}  // namespace

void run(int64_t blocks_x, int64_t blocks_y, int threads, size_t shared_bytes,
         void (*thread)(const void*), const void* argument) {
  machine.random.seed(++machine.seed);
  if (machine.fibers.size() < static_cast<size_t>(threads)) machine.fibers.resize(threads);
  machine.thread = thread;
  machine.argument = argument;
  for (int64_t y = 0; y < blocks_y; ++y) {
    for (int64_t x = 0; x < blocks_x; ++x) {
      blockIdx = {static_cast<unsigned>(x), static_cast<unsigned>(y)};
      machine.shared.reset(new char[shared_bytes]);
      std::memset(machine.shared.get(), 0xFF, shared_bytes);
      run_block(threads);
    }
  }
  machine.shared.reset();
}

void set_seed(uint64_t seed) { machine.seed = seed << 32; }

void* shared_memory() { return machine.shared.get(); }

void barrier() { pause_as(State::kAtBarrier); }

void copy_async(void* to, const void* from, int bytes) {
  check_aligned(to, 16);
  check_aligned(from, 16);
  if (bytes < 0 || bytes > 16) fail("a copy of less than 0 or more than 16 bytes");
  const Copy copy = {to, from, bytes};
  if (machine.random() % 2) {
    copy.perform();
  } else {
    self().open.push_back(copy);
  }
}

void commit_copies() {
  self().groups.push_back(std::move(self().open));
  self().open.clear();
}

void wait_for_copies(int pending) {
  auto& groups = self().groups;
  for (; groups.size() > static_cast<size_t>(pending); groups.pop_front()) {
    for (const Copy& copy : groups.front()) copy.perform();
  }
}

void with_warp(void (*operation)(void* const (&)[kLanes]), void* argument) {
  self().operation = operation;
  self().argument = argument;
  pause_as(State::kAtWarp);
}

bool left_out(const char* file, unsigned line) {
  static const char* const asked = std::getenv("LORA_EXT_EMULATOR_WITHOUT");
  if (asked == nullptr) return false;
  const std::string path(file);
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(line) == asked;
}

void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s (block %u, %u, thread %u)\n", what, blockIdx.x, blockIdx.y,
               threadIdx.x);
  std::abort();
}

void check_aligned(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) fail("a misaligned address");
}

}  // namespace emulator
