// The backward operators on the CPU: of one layer, and of several layers of one x.
#include <optional>
#include <span>
#include <vector>

#include "checks.h"
#include "cpu/layer_backward.h"
#include "operators.h"

namespace lora_ext {
namespace cpu {
namespace {

template <typename T, typename P>
void backward_of_group(std::span<const BackwardCall> calls, std::span<const Gradients> out,
                       const Tensor& dx) {
  std::vector<Backward<T, P>> layers;
  layers.reserve(calls.size());
  bool by_strips = true;
  for (size_t i = 0; i < calls.size(); ++i) {
    Backward<T, P>& layer = layers.emplace_back(calls[i]);
    layer.all_but_dx(out[i]);
    by_strips = by_strips && calls[0].needs.dx && layer.dx_way() == Way::kStrips;
  }
  if (!calls[0].needs.dx) return;
  if (!by_strips) {
    for (size_t i = 0; i < layers.size(); ++i) layers[i].dx(dx, i > 0);
    return;
  }
  std::vector<Leg<P>> legs;
  for (Backward<T, P>& layer : layers) layer.add_low_leg(&legs);
  for (const Backward<T, P>& layer : layers) layer.add_base_leg(&legs);
  wide_product<T, P>(legs, Out<T>{result<T>(dx)});
}

}  // namespace
}  // namespace cpu

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_bwd(
    const Tensor& dy, const std::optional<Tensor>& x, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& A, const std::optional<Tensor>& B, const std::optional<Tensor>& h,
    double scale, const std::vector<bool>& needs, const std::string& format,
    const std::optional<Tensor>& keep, const std::optional<Tensor>& weight_scale) {
  const BackwardCall call =
      check_backward(dy, x, weight, A, B, h, scale, needs, format, keep, weight_scale);
  const NoGradGuard no_grad;
  const Gradients out(call);
  cpu::with_types("dy", call.dy.dtype, [&](auto storage, auto word) {
    cpu::Backward<decltype(storage), decltype(word)>(call).run(out);
  });
  return out.tuple();
}

std::vector<Tensor> linears_bwd(const std::vector<Tensor>& dys, const std::optional<Tensor>& x,
                                const std::vector<std::optional<Tensor>>& weights,
                                const std::vector<std::optional<Tensor>>& As,
                                const std::vector<std::optional<Tensor>>& Bs,
                                const std::vector<std::optional<Tensor>>& hs,
                                const std::vector<double>& scales, const std::vector<bool>& needs,
                                const std::vector<std::string>& formats,
                                const std::vector<std::optional<Tensor>>& keeps,
                                const std::vector<std::optional<Tensor>>& weight_scales) {
  const size_t count = dys.size();
  STD_TORCH_CHECK(count > 0 && count <= cpu::kMostLegs / 2, "dys must have 1 to ",
                  cpu::kMostLegs / 2, " elements, got ", count);
  check_count("weights", weights.size(), count);
  check_count("As", As.size(), count);
  check_count("Bs", Bs.size(), count);
  check_count("hs", hs.size(), count);
  check_count("scales", scales.size(), count);
  STD_TORCH_CHECK(needs.size() == 1 + 4 * count, "needs must have ", 1 + 4 * count,
                  " elements: dx, and for each layer dweight, dbias, dA and dB; got ",
                  needs.size());
  check_count("formats", formats.size(), count);
  check_count("keeps", keeps.size(), count);
  check_count("weight_scales", weight_scales.size(), count);
  std::vector<BackwardCall> calls;
  std::vector<Gradients> out;
  const NoGradGuard no_grad;
  for (size_t i = 0; i < count; ++i) {
    const std::vector<bool> own = {needs[0], needs[1 + 4 * i], needs[2 + 4 * i], needs[3 + 4 * i],
                                   needs[4 + 4 * i]};
    calls.push_back(check_backward(dys[i], x, weights[i], As[i], Bs[i], hs[i], scales[i], own,
                                   formats[i], keeps[i], weight_scales[i]));
    BackwardCall all_but_dx = calls.back();
    all_but_dx.needs.dx = false;
    out.emplace_back(all_but_dx);
    const bool fits = calls[i].M == calls[0].M && calls[i].dy.dtype == calls[0].dy.dtype &&
                      (!needs[0] || calls[i].K == calls[0].K);
    STD_TORCH_CHECK(fits, "dys must be of layers of one x: rows, dtype and in_features the same");
  }
  const BackwardCall& first = calls[0];
  const Tensor dx = needs[0] ? empty(dys[0], {first.M, first.K}) : empty(dys[0], {0});
  cpu::with_types("dys", first.dy.dtype, [&](auto storage, auto word) {
    cpu::backward_of_group<decltype(storage), decltype(word)>(calls, out, dx);
  });
  std::vector<Tensor> gradients = {dx};
  for (const Gradients& layer : out) {
    for (const Tensor& gradient : {layer.dweight, layer.dbias, layer.dA, layer.dB}) {
      gradients.push_back(gradient.defined() ? gradient : empty(dys[0], {0}));
    }
  }
  return gradients;
}

}  // namespace lora_ext
