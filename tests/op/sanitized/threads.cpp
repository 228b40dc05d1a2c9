// Threads for the kernels under ThreadSanitizer, in the place of libtorch's: OpenMP, which is not
// instrumented, would hide what orders them.
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <thread>
#include <vector>

namespace {
constexpr int64_t kThreads = 4;
}

extern "C" AOTITorchError torch_get_num_threads(uint32_t* threads) {
  *threads = kThreads;
  return 0;
}

extern "C" AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain_size,
                                             ParallelFunc body, void* context) {
  const int64_t part = std::max((end - begin + kThreads - 1) / kThreads, grain_size);
  std::vector<std::thread> threads;
  for (int64_t i = begin; i < end; i += part) {
    threads.emplace_back([=] { body(i, std::min(i + part, end), context); });
  }
  for (std::thread& thread : threads) thread.join();
  return 0;
}
