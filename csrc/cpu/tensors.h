// Between torch's tensors and the views that the kernels work on.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <optional>

#include "cpu/products.h"
#include "tensor_utils.h"

namespace lora_ext::cpu {

using lora_ext::empty;
using lora_ext::NoGradGuard;
using lora_ext::transposed;
using torch::headeronly::ScalarType;

template <typename T>
View<T> matrix(const Tensor& tensor) {
  return {static_cast<T*>(tensor.data_ptr()), tensor.size(0), tensor.size(1), tensor.stride(0),
          tensor.stride(1)};
}

// PyTorch's own operators, called into memory of ours, at their CPU kernels: no autograd, no
// autocast and no dispatcher, which costs 2 us a call.
inline void mm_out(const Tensor& left, const Tensor& right, const Tensor& out) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), left.get(), right.get()));
}

inline void linear_out(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                       const Tensor& out) {
  const Tensor weight_t = transposed(weight);
  if (!bias.has_value()) return mm_out(x, weight_t, out);
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), bias->get(), x.get(), weight_t.get(), 1, 1));
}

// The panels of a weight that pack_weight laid out, from column `col` on; none without one.
template <typename A>
Panels<const A> panels_of(const std::optional<Tensor>& packed, int64_t depth, int64_t col) {
  if (!packed.has_value()) return {};
  return Panels<const A>::packed(static_cast<const A*>(packed->data_ptr()), depth).from(0, col);
}

// Throw unless `packed` is what pack_weight makes of the weight, as a factor (depth, cols).
void check_packed(const Tensor& packed, const Tensor& weight, int64_t depth, int64_t cols);

// Call f with A or B as a view. Over a half base it may be float.
template <typename T, typename F>
auto with_adapter(const Tensor& adapter, const F& f) {
  if constexpr (sizeof(T) == 2) {
    if (adapter.scalar_type() == ScalarType::Float) return f(matrix<const float>(adapter));
  }
  return f(matrix<const T>(adapter));
}

// Call f with a value of the storage type.
template <typename F>
void with_storage_type(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    case ScalarType::Half:
      return f(Float16{});
    default:
      STD_TORCH_CHECK(false, "x must have dtype float32, float64, bfloat16 or float16, got ",
                      torch::headeronly::toString(dtype));
  }
}

// The size of the parts that `size` is split into: at most `most`, a multiple of `multiple`, and as
// many for each thread unless they would fall below `least`.
inline int64_t even_part(int64_t size, int64_t most, int64_t least, int64_t multiple) {
  const auto up = [](int64_t value, int64_t by) { return (value + by - 1) / by; };
  const int64_t threads = torch::stable::get_num_threads();
  int64_t parts = std::max<int64_t>(up(size, most), 1);
  if (const int64_t even = up(parts, threads) * threads; size >= even * least) parts = even;
  return std::max(up(up(size, parts), multiple), int64_t{1}) * multiple;
}

// body(begin, size) for parts of [0, size), in parallel.
template <typename F>
void for_each_part(int64_t size, int64_t part, const F& body) {
  torch::stable::parallel_for(0, (size + part - 1) / part, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i * part, std::min(part, size - i * part));
  });
}

// Split (rows, cols) into strips of columns, and where there are too few of them for the threads
// into parts of rows as well: each packs the strip anew, which 24 rows are worth.
// body(row, n_rows, col, n_cols).
template <typename F>
void for_each_strip(int64_t rows, int64_t cols, const F& body) {
  constexpr int64_t kLeastRows = 24;
  if (rows == 0 || cols == 0) return;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t strip = even_part(cols, kStripCols, 64, kPanel<float>);
  const int64_t across = (cols + strip - 1) / strip;
  int64_t down = 1;
  while (down * across % threads != 0 && rows / (down + 1) >= kLeastRows) ++down;
  const int64_t part = (rows + down - 1) / down;
  for_each_part(across * down, 1, [&](int64_t index, int64_t) {
    const int64_t row = index / across * part, col = index % across * strip;
    if (row < rows) body(row, std::min(part, rows - row), col, std::min(strip, cols - col));
  });
}

// The same for blocks of rows alone.
template <typename F>
void for_each_row_block(int64_t rows, const F& body) {
  for_each_part(rows, even_part(rows, 96, 6, 6), body);
}

}  // namespace lora_ext::cpu
