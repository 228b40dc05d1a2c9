// Memory for one call.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace lora_ext::cpu {

// Uninitialised memory, aligned to a cache line. By malloc, which has small blocks in a cache of
// the thread's; aligned new passes that by (2 us of a training step of one row). Of no elements it
// takes none.
template <typename A>
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(int64_t count) {
    if (count <= 0) return;
    memory_.reset(std::malloc(count * sizeof(A) + kLine));
    if (memory_ == nullptr) throw std::bad_alloc();
  }
  A* get() const {
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    return reinterpret_cast<A*>((address + kLine - 1) / kLine * kLine);
  }

 private:
  static constexpr uintptr_t kLine = 64;
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> memory_;
};

}  // namespace lora_ext::cpu
