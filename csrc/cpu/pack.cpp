// A frozen weight laid out once for all calls: the panels that a product would pack each time, of
// the whole matrix. They cost no less memory than the weight: 4 bytes an element, 8 of double, and
// 2 of bfloat16 by pairs.
#include "checks.h"
#include "cpu/tensors.h"
#include "operators.h"

namespace lora_ext {
namespace cpu {
namespace {

// Panels of pairs are kept as the elements of these.
template <typename P>
using PanelElement = std::conditional_t<kIsPair<P>, BFloat16, P>;

template <typename P>
ScalarType dtype_of_panels() {
  if constexpr (kIsPair<P>) return ScalarType::BFloat16;
  return std::is_same_v<P, double> ? ScalarType::Double : ScalarType::Float;
}

template <typename P>
int64_t size_of_panels(int64_t depth, int64_t cols) {
  constexpr int64_t elements = sizeof(P) / sizeof(PanelElement<P>);
  return elements * words_of<P>(depth) * round_up_to_panel<P>(cols);
}

}  // namespace

template <typename T, typename P>
Right<P> weight_factor(const Weight& weight, int64_t depth, int64_t cols, bool transposed,
                       int64_t uses) {
  if (weight.format == Format::kPlain) {
    const View<const T> plain = matrix<T>(weight.data);
    return Right<P>(transposed ? plain.transposed() : plain, uses);
  }
  if constexpr (std::is_same_v<Acc<P>, float>) {
    if (is_of_codes(weight.format)) {
      return Right<P>::of_codes(
          transposed ? codes_of(weight, cols, depth) : codes_of(weight, depth, cols), depth, cols,
          transposed, T{});
    }
  }
  const Operand& panels = weight.data;
  const int64_t size = size_of_panels<P>(depth, cols);
  STD_TORCH_CHECK(panels.dtype == dtype_of_panels<P>() && panels.dim == 1 &&
                      panels.size(0) == size && panels.stride(0) == 1,
                  "weight must be the panels that pack_weight makes of a weight of this size, ",
                  size, " elements of dtype ", torch::headeronly::toString(dtype_of_panels<P>()),
                  ", got shape ", text_of(panels.sizes, panels.dim), " of dtype ",
                  torch::headeronly::toString(panels.dtype));
  const auto* data = static_cast<const P*>(panels.data());
  return {Panels<const P>::packed(data, words_of<P>(depth)), depth, cols,
          size * static_cast<int64_t>(sizeof(PanelElement<P>)) > kFarBytes};
}

template Right<float> weight_factor<float, float>(const Weight&, int64_t, int64_t, bool, int64_t);
template Right<double> weight_factor<double, double>(const Weight&, int64_t, int64_t, bool,
                                                     int64_t);
template Right<float> weight_factor<BFloat16, float>(const Weight&, int64_t, int64_t, bool,
                                                     int64_t);
template Right<Pair> weight_factor<BFloat16, Pair>(const Weight&, int64_t, int64_t, bool, int64_t);
template Right<float> weight_factor<Float16, float>(const Weight&, int64_t, int64_t, bool, int64_t);

}  // namespace cpu

Tensor pack_weight(const Tensor& weight, bool transposed) {
  const Operand operand(weight);
  STD_TORCH_CHECK(operand.dim == 2, "weight must have shape (out_features, in_features), got ",
                  text_of(operand.sizes, operand.dim));
  check_memory("weight", operand);
  const NoGradGuard no_grad;
  std::optional<Tensor> panels;
  cpu::with_types("weight", operand.dtype, [&](auto storage, auto word) {
    using T = decltype(storage);
    using P = decltype(word);
    const auto plain = cpu::matrix<T>(operand);
    const auto factor = transposed ? plain.transposed() : plain;
    panels = empty(weight, {cpu::size_of_panels<P>(factor.rows, factor.cols)},
                   cpu::kIsPair<P>             ? aoti_torch_dtype_bfloat16()
                   : std::is_same_v<P, double> ? aoti_torch_dtype_float64()
                                               : aoti_torch_dtype_float32());
    constexpr int64_t kPack = 0;  // in place for no number of uses
    cpu::fill_panels(cpu::Right<P>(factor, 1, kPack), static_cast<P*>(panels->mutable_data_ptr()));
  });
  return *panels;
}

}  // namespace lora_ext
