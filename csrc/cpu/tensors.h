// Between torch's tensors and the views that the kernels work on.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "call.h"
#include "cpu/product.h"
#include "tensor_utils.h"

namespace lora_ext::cpu {

// An argument, a matrix.
template <typename T>
View<const T> matrix(const Operand& operand) {
  return {static_cast<const T*>(operand.data()), operand.size(0), operand.size(1),
          operand.stride(0), operand.stride(1)};
}

// A result, a matrix.
template <typename T>
View<T> result(const Tensor& tensor) {
  return {static_cast<T*>(tensor.mutable_data_ptr()), tensor.size(0), tensor.size(1),
          tensor.stride(0), tensor.stride(1)};
}

template <typename T>
View<const T> read_only(const View<T>& view) {
  return {view.data, view.rows, view.cols, view.row_stride, view.col_stride};
}

inline Bits bits_of(const Operand& keep) {
  if (!keep) return {};
  return {static_cast<const uint8_t*>(keep.data()), keep.stride(0)};
}

// Whether `dot` and `combine_rows` take a matrix as their right factor.
template <typename T>
bool has_dense_rows(const View<T>& matrix) {
  return matrix.col_stride == 1 || matrix.cols == 1;
}

// PyTorch's own operators, called into memory of ours, at their CPU kernels: no autograd, no
// autocast and no dispatcher, which costs 2 us a call.

inline void mm_out(const Tensor& left, const Tensor& right, const Tensor& out) {
  LORA_EXT_CHECK(aoti_torch_cpu_mm_out(out.get(), left.get(), right.get()));
}

// out = beta * self + alpha * left @ right; with a beta of 0 self is not read.
inline void addmm_out(const Tensor& self, const Tensor& left, const Tensor& right, double beta,
                      double alpha, const Tensor& out) {
  if (std::isnan(alpha)) {  // MKL takes it for zero
    LORA_EXT_CHECK(aoti_torch_cpu_fill__Scalar(out.get(), alpha));
    return;
  }
  LORA_EXT_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), self.get(), left.get(), right.get(), beta, alpha));
}

// Call f with A, B or the memory of their gradients as a view. Over a half base it may be float.
template <typename T, typename F>
auto with_adapter_type(ScalarType dtype, const F& f) {
  if constexpr (sizeof(T) == 2) {
    if (dtype == ScalarType::Float) return f(float{});
  }
  return f(T{});
}
template <typename T, typename F>
auto with_adapter(const Operand& adapter, const F& f) {
  return with_adapter_type<T>(adapter.dtype,
                              [&](auto t) { return f(matrix<decltype(t)>(adapter)); });
}

// A or B in the base's dtype, for PyTorch's operators: float over a half base is rounded.
template <typename T>
Tensor in_base_dtype(const Operand& adapter, const Tensor& base) {
  if constexpr (sizeof(T) == 2) {
    if (adapter.dtype == ScalarType::Float) {
      const View<const float> from = matrix<float>(adapter);
      const Tensor rounded = empty(base, {from.rows, from.cols});
      const Scratch<float> dense(from.rows * from.cols);
      blocks().storage<float>().load(from, dense.get(), from.cols);
      blocks().storage<T>().store(dense.get(), from.cols, 1, nullptr, false, result<T>(rounded));
      return rounded;
    }
  }
  return *adapter.tensor;
}

// Call f with a value of the storage type.
template <typename F>
void with_storage_type(const char* name, ScalarType dtype, const F& f) {
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
      STD_TORCH_CHECK(false, name, " must have dtype float32, float64, bfloat16 or float16, got ",
                      torch::headeronly::toString(dtype));
  }
}

// The same with a value of the word that its products take: what they accumulate in, or pairs.
template <typename F>
void with_types(const char* name, ScalarType dtype, const F& f) {
  with_storage_type(name, dtype, [&](auto storage) {
    using T = decltype(storage);
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (takes_pairs()) return f(storage, Pair{});
    }
    f(storage, Acc<T>{});
  });
}

// A weight of codes as the block operations take it.
Codes codes_of(const Weight& weight, int64_t N, int64_t K);

// The weight as a right factor (depth, cols), by a left one of `uses` rows: weight.T with
// `transposed`, or weight. Throws unless panels are what pack_weight makes of one of that size and
// dtype.
template <typename T, typename P>
Right<P> weight_factor(const Weight& weight, int64_t depth, int64_t cols, bool transposed,
                       int64_t uses);

}  // namespace lora_ext::cpu
