// What both devices' operators do with torch's tensors.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <array>
#include <cstdint>
#include <initializer_list>

// Where a C function of torch's fails, throw with torch's own words, so that out of memory stays
// recognisable; headers before torch 2.13 know only which call failed.
#ifdef STABLE_TORCH_ERROR_CODE_CHECK
#define LORA_EXT_CHECK(call)             \
  do {                                   \
    STABLE_TORCH_ERROR_CODE_CHECK(call); \
  } while (false)
#else
#define LORA_EXT_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace lora_ext {

using torch::stable::Tensor;

// Uninitialised memory of like's device. Not by new_empty: going through the dispatcher, with boxed
// arguments, costs a microsecond a tensor.
inline Tensor empty(const Tensor& like, int64_t dim, const int64_t* sizes, const int64_t* strides,
                    int32_t dtype) {
  int32_t device_type, device_index;
  LORA_EXT_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  LORA_EXT_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle result;
  LORA_EXT_CHECK(
      aoti_torch_empty_strided(dim, sizes, strides, dtype, device_type, device_index, &result));
  return Tensor(result);
}

// The same, dense.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, int32_t dtype) {
  std::array<int64_t, 2> strides{};
  int64_t step = 1;
  for (size_t i = sizes.size(); i-- > 0; step *= sizes.begin()[i]) strides[i] = step;
  return empty(like, static_cast<int64_t>(sizes.size()), sizes.begin(), strides.data(), dtype);
}

// The same, of like's dtype.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes) {
  int32_t dtype;
  LORA_EXT_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return empty(like, sizes, dtype);
}

// Of like's dtype, its rows dense or its columns. No view of another tensor, which would cost a
// microsecond, and as much again in autograd.
inline Tensor empty_matrix(const Tensor& like, int64_t rows, int64_t cols, bool dense_columns) {
  if (!dense_columns) return empty(like, {rows, cols});
  const std::array<int64_t, 2> sizes{rows, cols}, strides{1, rows};
  int32_t dtype;
  LORA_EXT_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return empty(like, 2, sizes.data(), strides.data(), dtype);
}

// A view, whatever grad mode is on.
inline Tensor transposed(const Tensor& matrix) {
  const std::array<int64_t, 2> sizes{matrix.size(1), matrix.size(0)},
      strides{matrix.stride(1), matrix.stride(0)};
  AtenTensorHandle result;
  LORA_EXT_CHECK(aoti_torch_as_strided(matrix.get(), sizes.data(), strides.data(), &result));
  return Tensor(result);
}

// Some columns of a matrix, a view.
inline Tensor columns_of(const Tensor& matrix, int64_t col, int64_t cols) {
  const std::array<int64_t, 2> sizes{matrix.size(0), cols},
      strides{matrix.stride(0), matrix.stride(1)};
  AtenTensorHandle result;
  LORA_EXT_CHECK(aoti_torch__reinterpret_tensor(matrix.get(), 2, sizes.data(), strides.data(),
                                                col * strides[1], &result));
  return Tensor(result);
}

class NoGradGuard {
 public:
  NoGradGuard() : enabled_(aoti_torch_grad_mode_is_enabled()) {
    aoti_torch_grad_mode_set_enabled(false);
  }
  ~NoGradGuard() { aoti_torch_grad_mode_set_enabled(enabled_); }
  NoGradGuard(const NoGradGuard&) = delete;
  NoGradGuard& operator=(const NoGradGuard&) = delete;

 private:
  bool enabled_;
};

}  // namespace lora_ext
