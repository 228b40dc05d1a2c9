// Products of few elements of a matrix, those that dropout drops, by rows of the other factor laid
// out in a cache: what sparse ones read 12 KB of the weight for, an element, is there 1 KB away.
#pragma once

#include <cstdint>

namespace lora_ext::cpu {

// A few elements of a row: what each holds, and where the factor's row that it meets begins.
template <typename A>
struct Few {
  const int32_t* at;
  A* values;
  int64_t count;
};

// All on rows of `width` elements, dense and one after another.
template <typename A>
struct SparseOps {
  int64_t width;
  // sums += values @ the rows that they meet
  void (*combine)(Few<A> few, const A* rows, A* sums);
  // values += left @ the rows that they meet, transposed
  void (*sample)(const A* left, const A* rows, Few<A> few);
  // z = scale * (y - sums), y += factor * z + bias
  void (*rescale)(const A* sums, A scale, const A* factor, const A* bias, A* y, A* z);
};

}  // namespace lora_ext::cpu
