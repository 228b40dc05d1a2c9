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

// Split (rows, cols) into strips of columns, and those into parts of rows where the strips alone do
// not come out even among the threads. body(row, n_rows, col, n_cols).
template <typename F>
void for_each_strip(int64_t rows, int64_t cols, const F& body) {
  if (rows == 0 || cols == 0) return;
  const auto parts = [](int64_t size, int64_t most) { return (size + most - 1) / most; };
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t across = parts(cols, kStripCols);
  int64_t down = 1;
  while (down * across % threads != 0 && rows / (down + 1) >= kStripRows) ++down;
  const int64_t part_rows = parts(rows, down);
  down = parts(rows, part_rows);
  torch::stable::parallel_for(0, down * across, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t row = part / across * part_rows, col = part % across * kStripCols;
      body(row, std::min(part_rows, rows - row), col, std::min(kStripCols, cols - col));
    }
  });
}

// The same for blocks of rows alone.
template <typename F>
void for_each_row_block(int64_t rows, const F& body) {
  constexpr int64_t kRows = 96;
  torch::stable::parallel_for(0, (rows + kRows - 1) / kRows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      body(block * kRows, std::min(kRows, rows - block * kRows));
    }
  });
}

}  // namespace lora_ext::cpu
