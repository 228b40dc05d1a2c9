// A frozen weight laid out once for all calls: the panels that a product would pack anew each time,
// of the whole matrix. They cost no less memory than the weight: 4 bytes an element, 8 of double.
#include "cpu/tensors.h"
#include "lora_linear.h"

namespace lora_ext {
namespace cpu {
namespace {

template <typename T>
int64_t packed_size(int64_t depth, int64_t cols) {
  return depth * round_up_to_panel<Acc<T>>(cols);
}

ScalarType packed_dtype(ScalarType weight) {
  return weight == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace

void check_packed(const Tensor& packed, const Tensor& weight, int64_t depth, int64_t cols) {
  with_storage_type(weight.scalar_type(), [&](auto storage) {
    const int64_t size = packed_size<decltype(storage)>(depth, cols);
    const ScalarType dtype = packed_dtype(weight.scalar_type());
    STD_TORCH_CHECK(packed.scalar_type() == dtype && packed.dim() == 1 && packed.numel() == size &&
                        packed.is_contiguous(),
                    "packed must be what pack_weight makes of this weight, ", size,
                    " elements of dtype ", torch::headeronly::toString(dtype), ", got ",
                    packed.numel(), " of dtype ",
                    torch::headeronly::toString(packed.scalar_type()));
  });
}

}  // namespace cpu

Tensor pack_weight_cpu(const Tensor& weight, bool transposed) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight must have shape (out_features, in_features), got ",
                  weight.dim(), " dimensions");
  const NoGradGuard no_grad;
  std::optional<Tensor> result;
  cpu::with_storage_type(weight.scalar_type(), [&](auto storage) {
    using T = decltype(storage);
    using A = cpu::Acc<T>;
    const auto view = cpu::matrix<const T>(weight);
    const auto factor = transposed ? view.transposed() : view;
    result =
        empty(weight, {cpu::packed_size<T>(factor.rows, factor.cols)},
              std::is_same_v<A, double> ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32());
    const auto panels = cpu::Panels<A>::packed(static_cast<A*>(result->data_ptr()), factor.rows);
    constexpr int64_t kCols = 64;  // whole panels
    torch::stable::parallel_for(
        0, (factor.cols + kCols - 1) / kCols, 1, [&](int64_t begin, int64_t end) {
          for (int64_t col = begin * kCols; col < std::min(end * kCols, factor.cols);
               col += kCols) {
            const int64_t cols = std::min(kCols, factor.cols - col);
            cpu::blocks().storage<T>().pack(factor.block(0, col, factor.rows, cols),
                                            panels.from(0, col).data);
          }
        });
  });
  return *result;
}

}  // namespace lora_ext
