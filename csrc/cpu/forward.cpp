// Forward on the CPU: y = x @ weight.T + bias + scale * h @ B, h = (keep * x) @ A.
//
// Three ways to the base product and the low-rank part (see route.h):
// - few rows: dot products with the weight's rows in place, the low-rank part added to each block
// of
//   columns before it is stored;
// - strips of ours, the low-rank part as R more steps of the summed dimension: one pass over y;
// - PyTorch's GEMM makes the whole base product first, and a pass over row blocks of y adds the
//   low-rank part.
#include "checks.h"
#include "cpu/low_rank.h"
#include "operators.h"

namespace lora_ext {
namespace cpu {
namespace {

template <typename T, typename P>
class Forward {
  using A = Acc<T>;

 public:
  // `made` is h where there is one already: `h` holds it, rounded, as well.
  Forward(const Call& call, const Tensor& y, const Tensor& h,
          std::optional<Hidden<T, P>> made = std::nullopt)
      : call_(call), y_(y), h_(h), y_view_(result<T>(y)), h_view_(result<T>(h)) {
    if (!made) {
      shrink_.emplace(matrix<T>(call.x), bits_of(call.low.keep), call.low.A, false);
      made.emplace(shrink_->by_library() ? Hidden<T, P>::of(read_only(h_view_))
                                         : Hidden<T, P>::in(call.M, call.R, &h));
    }
    hidden_ = std::move(made);
    if (call.bias) bias_ = dense_bias();
  }

  void run() const {
    const Way way = base_way();
    if (way == Way::kLibrary) return onto_library();
    make_h();
    if (way == Way::kDots) return by_dots();
    by_strips();
  }

 private:
  Way base_way() const {
    const Weight& weight = call_.weight;
    if (!weight.data) return Way::kStrips;
    if (is_of_codes(weight.format)) return way_of_codes(call_.M);
    const bool panels = weight.format == Format::kPanels;
    const bool dense = !panels && has_dense_rows(matrix<T>(weight.data));
    return way_of(routes<T>(), Product::kY, {call_.M, call_.K, call_.R, panels, dense});
  }

  bool makes_h_by_rows() const { return shrink_ && !shrink_->by_library(); }

  void make_h() const {
    if (!shrink_) return;
    if (shrink_->by_library()) {
      return mm_out(*call_.x.tensor, in_base_dtype<T>(call_.low.A, h_), h_);
    }
    for_each_row_block(call_.M, [&](int64_t row, int64_t rows) { make_h(row, rows); });
  }

  void make_h(int64_t row, int64_t rows) const {
    make_hidden(*shrink_, *hidden_, row, h_view_.block(row, 0, rows, call_.R));
  }

  Packed<P> B_factor() const {
    return with_adapter<T>(call_.low.B,
                           [&](auto view) { return Packed<P>(Right<P>(view, call_.M)); });
  }

  Leg<P> low_leg(const Packed<P>& B) const { return {hidden_->left(), B.right(), call_.low.scale}; }

  // The bias without gaps, in place or copied.
  const T* dense_bias() {
    const auto* data = static_cast<const T*>(call_.bias.data());
    const int64_t step = call_.bias.stride(0);
    if (step == 1) return data;
    bias_copy_ = Scratch<T>(call_.N);
    for (int64_t j = 0; j < call_.N; ++j) bias_copy_.get()[j] = data[j * step];
    return bias_copy_.get();
  }

  void by_dots() const {
    const int64_t M = call_.M, K = call_.K, N = call_.N;
    const Packed<P> B = B_factor();
    const Leg<P> low = low_leg(B);
    const Out<T> y = {y_view_, bias_};
    const bool of_codes = is_of_codes(call_.weight.format);
    const Codes codes = of_codes ? codes_of(call_.weight, N, K) : Codes{};
    const View<const T> weight = of_codes ? View<const T>{} : matrix<T>(call_.weight.data);
    const FewRows<T, P> x(matrix<T>(call_.x), of_codes);
    const int64_t part = even_part(N, kStripCols, 32, 16, num_threads());
    for_each_part(N, part, [&](int64_t col, int64_t cols) {
      const Scratch<A> sum(M * cols);
      if (of_codes) {
        blocks().storage<T>().dot_codes(x.widened(), codes, col, cols, sum.get(), cols);
      } else {
        x.dot(weight.block(col, 0, cols, K), sum.get(), cols);
      }
      product<A>(low.block(0, M, col, cols), Out<A>{{sum.get(), M, cols, cols, 1}, nullptr, true});
      const Out<T> to = y.block(0, M, col, cols);
      blocks().storage<T>().store(sum.get(), cols, A(1), to.bias, false, to.to);
    });
  }

  void by_strips() const {
    const Packed<P> B = B_factor();
    const Leg<P> low = low_leg(B);
    const Out<T> y = {y_view_, bias_};
    if (!call_.weight.data) return wide_product<T, P>({&low, 1}, y);
    const Leg<P> legs[] = {low,
                           {Left<P>(matrix<T>(call_.x)),
                            weight_factor<T, P>(call_.weight, call_.K, call_.N, true, call_.M)}};
    wide_product<T, P>(legs, y);
  }

  void onto_library() const {
    const Tensor weight_t = transposed(*call_.weight.data.tensor);
    if (call_.bias) {
      addmm_out(*call_.bias.tensor, *call_.x.tensor, weight_t, 1, 1, y_);
    } else {
      mm_out(*call_.x.tensor, weight_t, y_);
    }
    const Sizes sizes = {call_.M, call_.R, call_.R};
    if (way_of(routes<T>(), Product::kExpand, sizes) == Way::kLibrary) {
      make_h();
      return addmm_out(y_, h_, in_base_dtype<T>(call_.low.B, y_), 1, call_.low.scale, y_);
    }
    const Packed<P> B = B_factor();
    const Leg<P> low = low_leg(B);
    if (!makes_h_by_rows()) make_h();
    for_each_row_block(call_.M, [&](int64_t row, int64_t rows) {
      if (makes_h_by_rows()) make_h(row, rows);
      expand<T, P>(low.block(row, rows, 0, call_.N), y_view_.block(row, 0, rows, call_.N));
    });
  }

  const Call& call_;
  const Tensor &y_, &h_;
  const View<T> y_view_, h_view_;
  std::optional<Shrink<T, P>> shrink_;
  std::optional<Hidden<T, P>> hidden_;
  Scratch<T> bias_copy_;
  const T* bias_ = nullptr;
};

// The layers' A next to one another in one matrix, of what products accumulate in: transposed in
// memory where they all are.
template <typename T>
Tensor side_by_side(std::span<const Call> calls, int64_t R) {
  const int64_t K = calls[0].K;
  const bool columns = std::all_of(calls.begin(), calls.end(),
                                   [](const Call& call) { return call.low.A.stride(0) == 1; });
  const int32_t dtype =
      std::is_same_v<Acc<T>, double> ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  const Tensor& like = *calls[0].x.tensor;
  Tensor all = columns ? empty(like, {R, K}, dtype) : empty(like, {K, R}, dtype);
  auto* to = static_cast<Acc<T>*>(all.mutable_data_ptr());
  for (const Call& call : calls) {
    with_adapter<T>(call.low.A, [&](auto view) {
      using TA = std::remove_cvref_t<decltype(*view.data)>;
      blocks().storage<TA>().load(columns ? view.transposed() : view, to, columns ? K : R);
    });
    to += columns ? call.R * K : call.R;
  }
  return columns ? transposed(all) : all;
}

// h of all layers, (M, R) for R the sum of their ranks, by one product over x.
template <typename T, typename P>
Hidden<T, P> shrink_together(std::span<const Call> calls, const Tensor& h) {
  const int64_t M = h.size(0), R = h.size(1);
  const Tensor A_all = side_by_side<T>(calls, R);
  const Operand operand(A_all);
  const Shrink<T, P> shrink(matrix<T>(calls[0].x), {}, operand, false);
  const View<T> to = result<T>(h);
  if (shrink.by_library()) {
    mm_out(*calls[0].x.tensor, in_base_dtype<T>(operand, h), h);
    return Hidden<T, P>::of(read_only(to));
  }
  Hidden<T, P> hidden = Hidden<T, P>::in(M, R, &h);
  for_each_row_block(M, [&](int64_t row, int64_t rows) {
    make_hidden(shrink, hidden, row, to.block(row, 0, rows, R));
  });
  return hidden;
}

template <typename T, typename P>
void forward_of_group(std::span<const Call> calls, const std::vector<Tensor>& ys, const Tensor& h) {
  const auto masked = [](const Call& call) { return static_cast<bool>(call.low.keep); };
  const bool together =
      calls.size() > 1 && calls[0].M > kFewRows && std::none_of(calls.begin(), calls.end(), masked);
  std::optional<Hidden<T, P>> hidden;
  if (together) hidden.emplace(shrink_together<T, P>(calls, h));
  int64_t col = 0;
  for (size_t i = 0; i < calls.size(); ++i) {
    const int64_t R = calls[i].R;
    const Tensor own_h = calls.size() == 1 ? h : columns_of(h, col, R);
    std::optional<Hidden<T, P>> made;
    if (together) made.emplace(hidden->columns(col, R));
    Forward<T, P>(calls[i], ys[i], own_h, std::move(made)).run();
    col += R;
  }
}

}  // namespace
}  // namespace cpu

std::tuple<Tensor, Tensor> linear_fwd(const Tensor& x, const std::optional<Tensor>& weight,
                                      const std::optional<Tensor>& bias, const Tensor& A,
                                      const Tensor& B, double scale, const std::string& format,
                                      const std::optional<Tensor>& keep,
                                      const std::optional<Tensor>& weight_scale) {
  const Call call = check_forward(x, weight, bias, A, B, scale, format, keep, weight_scale);
  const NoGradGuard no_grad;
  const Tensor y = empty(x, {call.M, call.N}), h = empty(x, {call.M, call.R});
  cpu::with_types("x", call.x.dtype, [&](auto storage, auto word) {
    cpu::Forward<decltype(storage), decltype(word)>(call, y, h).run();
  });
  return {y, h};
}

std::tuple<std::vector<Tensor>, Tensor> linears_fwd(
    const Tensor& x, const std::vector<Tensor>& weights,
    const std::vector<std::optional<Tensor>>& biases, const std::vector<Tensor>& As,
    const std::vector<Tensor>& Bs, const std::vector<double>& scales,
    const std::vector<std::string>& formats, const std::vector<std::optional<Tensor>>& keeps,
    const std::vector<std::optional<Tensor>>& weight_scales) {
  const size_t count = weights.size();
  STD_TORCH_CHECK(count > 0, "weights must have an element, got none");
  check_count("biases", biases.size(), count);
  check_count("As", As.size(), count);
  check_count("Bs", Bs.size(), count);
  check_count("scales", scales.size(), count);
  check_count("formats", formats.size(), count);
  check_count("keeps", keeps.size(), count);
  check_count("weight_scales", weight_scales.size(), count);
  const std::vector<std::optional<Tensor>> bases(weights.begin(), weights.end());
  std::vector<Call> calls;
  int64_t R = 0;
  for (size_t i = 0; i < count; ++i) {
    calls.push_back(check_forward(x, bases[i], biases[i], As[i], Bs[i], scales[i], formats[i],
                                  keeps[i], weight_scales[i]));
    R += calls.back().R;
  }
  const NoGradGuard no_grad;
  std::vector<Tensor> ys;
  for (const Call& call : calls) ys.push_back(empty(x, {call.M, call.N}));
  const Tensor h = empty(x, {calls[0].M, R});
  cpu::with_types("x", calls[0].x.dtype, [&](auto storage, auto word) {
    cpu::forward_of_group<decltype(storage), decltype(word)>(calls, ys, h);
  });
  return {ys, h};
}

}  // namespace lora_ext
