// The norms of DoRA's adapted rows on the CPU: |weight + scale * (A @ B).T|, (N,), where the
// adapted weight is never in memory.
#include <cmath>

#include "checks.h"
#include "cpu/tensors.h"
#include "operators.h"

namespace lora_ext {
namespace cpu {
namespace {

constexpr int64_t kRows = 16;  // of the weight at a time

template <typename T, typename F>
void norms(View<const T> weight, View<const F> A_t, View<const F> B_t, double scale,
           Acc<T>* result) {
  using A = Acc<T>;
  const int64_t K = weight.cols, R = A_t.rows, ld = round_up_to_panel<A>(K);
  const Scratch<A> low(R * ld);
  blocks().storage<F>().lay_out(A_t, low.get(), ld);
  const int64_t least = ceil_div(1 << 16, std::max<int64_t>(K, 1));  // elements worth a thread
  const int64_t part = even_part(weight.rows, weight.rows, least, kRows, num_threads());
  for_each_part(weight.rows, part, [&](int64_t from, int64_t count) {
    const StorageOps<T>& of = blocks().storage<T>();
    const Scratch<A> rows(kRows * ld), left(kRows * R);
    for (int64_t n = from; n < from + count; n += kRows) {
      const int64_t some = std::min(kRows, from + count - n);
      of.lay_out(weight.block(n, 0, some, K), rows.get(), ld);
      blocks().storage<F>().load(B_t.block(n, 0, some, R), left.get(), R);
      for (int64_t i = 0; i < some * R; ++i) left.get()[i] *= static_cast<A>(scale);
      for (int64_t i = 0; i < some; ++i) {
        const A squares = of.squares(rows.get() + i * ld, left.get() + i * R, R, low.get(), ld);
        result[n + i] = std::sqrt(squares);
      }
    }
  });
}

}  // namespace
}  // namespace cpu

Tensor dora_norm(const Tensor& weight, const Tensor& A, const Tensor& B, double scale) {
  const Operand of_weight(weight), of_A(A), of_B(B);
  check_dim("weight", of_weight, 2, "(N, K)");
  check_dim("A", of_A, 2, "(K, R)");
  const int64_t N = of_weight.size(0), K = of_weight.size(1), R = of_A.size(1);
  check_shape("A", of_A, {K, R});
  check_shape("B", of_B, {R, N});
  const Checks checks("weight", of_weight);
  checks.place("weight", of_weight);
  for (const auto& [name, operand] : {std::pair("A", of_A), std::pair("B", of_B)}) {
    checks.adapter_dtype(name, operand);
    checks.place(name, operand);
  }
  check_is("B", of_B, of_A.dtype);
  const bool is_double = of_weight.dtype == ScalarType::Double;
  const Tensor result =
      empty(weight, {N}, is_double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32());
  cpu::with_storage_type("weight", of_weight.dtype, [&](auto storage) {
    using T = decltype(storage);
    cpu::with_adapter_type<T>(of_A.dtype, [&](auto adapter) {
      using F = decltype(adapter);
      cpu::norms(cpu::matrix<T>(of_weight), cpu::matrix<F>(of_A).transposed(),
                 cpu::matrix<F>(of_B).transposed(), scale,
                 static_cast<cpu::Acc<T>*>(result.mutable_data_ptr()));
    });
  });
  return result;
}

}  // namespace lora_ext
