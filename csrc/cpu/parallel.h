// Work in parts, by PyTorch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "cpu/split.h"

namespace lora_ext::cpu {

inline int64_t num_threads() { return torch::stable::get_num_threads(); }

// body(begin, size) for parts of [0, size), in parallel.
template <typename F>
void for_each_part(int64_t size, int64_t part, const F& body) {
  if (size <= part) {  // as parallel_for would, less its call
    if (size > 0) body(0, size);
    return;
  }
  torch::stable::parallel_for(0, ceil_div(size, part), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i * part, std::min(part, size - i * part));
  });
}

}  // namespace lora_ext::cpu
