// Backward on the CPU, with t = dy @ B.T:
//   dx = dy @ weight + scale * keep * (t @ A.T)     dA = scale * (keep * x).T @ t
//   dB = scale * h.T @ dy     dweight = dy.T @ x     dbias = sum of dy over its rows
// Only what `needs` asks for is computed. The products with the weight go the ways of the forward.
#include <optional>

#include "cpu/low_rank.h"
#include "operators.h"

namespace lora_ext {
namespace cpu {
namespace {

template <typename T>
class Backward {
  using A = Acc<T>;

 public:
  explicit Backward(const BackwardCall& call)
      : call_(call), dy_(matrix<T>(call.dy)), keep_(bits_of(call.low.keep)) {}

  void run(const Gradients& out) {
    if (call_.needs.dB) dB(out.dB);
    if (call_.needs.dbias) dbias(out.dbias);
    if (call_.needs.dweight) dweight(out.dweight);
    if (!call_.needs.dx && !call_.needs.dA) return;
    make_t();
    if (call_.needs.dA) dA(out.dA);
    if (call_.needs.dx) dx(out.dx);
  }

 private:
  bool gradient_by_library(bool masked) const {
    const Sizes sizes = {call_.M, call_.M, call_.R, false, true, masked};
    return way_of(routes<T>(), Product::kGradient, sizes) == Way::kLibrary;
  }

  // The gradient of an adapter, (rows, cols), by `own` into a view of its dtype, or by PyTorch as
  // scale * left @ right.
  template <typename F>
  void adapter_gradient(const Tensor& out, const F& own) const {
    with_adapter_type<T>(out.scalar_type(), [&](auto t) { own(result<decltype(t)>(out)); });
  }

  void dB(const Tensor& out) const {
    const Tensor& h = *call_.h.tensor;
    if (gradient_by_library(false)) return library_gradient(transposed(h), *call_.dy.tensor, out);
    adapter_gradient(out, [&](auto view) {
      gradient<T>(Hidden<T>::of(matrix<T>(call_.h)), dy_, {}, call_.low.scale, view);
    });
  }

  void dbias(Tensor out) const {
    const int64_t rows[] = {0};
    torch::stable::sum_out(out, *call_.dy.tensor, rows);
  }

  void dweight(const Tensor& out) const {
    const Sizes sizes = {call_.M, call_.M, 0};
    if (way_of(routes<T>(), Product::kDweight, sizes) == Way::kLibrary) {
      return mm_out(transposed(*call_.dy.tensor), *call_.x.tensor, out);
    }
    const Leg<A> leg = {Left<A>(dy_.transposed()), Right<A>(matrix<T>(call_.x), call_.N)};
    wide_product<T, A>({&leg, 1}, Out<T>{result<T>(out)});
  }

  void make_t() {
    const Shrink<T> shrink(dy_, {}, call_.low.B, true);
    if (shrink.by_library()) {
      t_tensor_.emplace(empty(*call_.dy.tensor, {call_.M, call_.R}));
      const Tensor B = in_base_dtype<T>(call_.low.B, *call_.dy.tensor);
      mm_out(*call_.dy.tensor, transposed(B), *t_tensor_);
      t_.emplace(Hidden<T>::of(read_only(result<T>(*t_tensor_))));
      return;
    }
    t_.emplace(Hidden<T>::sums(call_.M, call_.R, nullptr));
    for_each_row_block(call_.M,
                       [&](int64_t row, int64_t rows) { shrink.rows(row, t_->rows(row, rows)); });
  }

  void dA(const Tensor& out) {
    if (gradient_by_library(keep_.data != nullptr)) {
      return library_gradient(transposed(*call_.x.tensor), t_tensor(), out);
    }
    adapter_gradient(out, [&](auto view) {
      gradient<T>(*t_, matrix<T>(call_.x), keep_, call_.low.scale, view.transposed());
    });
  }

  // out = scale * left @ right, by PyTorch in the base's dtype.
  void library_gradient(const Tensor& left, const Tensor& right, const Tensor& out) const {
    if (out.scalar_type() == call_.dy.dtype) {
      return addmm_out(out, left, right, 0, call_.low.scale, out);
    }
    const Tensor rounded = empty(*call_.dy.tensor, {out.size(0), out.size(1)});
    addmm_out(rounded, left, right, 0, call_.low.scale, rounded);
    if constexpr (sizeof(T) == 2) {
      const View<float> to = result<float>(out);
      const Scratch<float> wide(to.rows * to.cols);
      blocks().storage<T>().load(read_only(result<T>(rounded)), wide.get(), to.cols);
      blocks().storage<float>().store(wide.get(), to.cols, 1, nullptr, false, to);
    }
  }

  void dx(const Tensor& out) {
    const Weight& weight = call_.weight;
    const View<T> to = result<T>(out);
    with_adapter<T>(call_.low.A, [&](auto A_view) {
      const bool plain = weight.data && weight.format == Format::kPlain;
      const bool dense = plain && has_dense_rows(matrix<T>(weight.data)) && has_dense_rows(A_view);
      const Way way = way_of(routes<T>(), Product::kDx,
                             {call_.M, call_.N, call_.R, !plain, dense, keep_.data != nullptr});
      if (way == Way::kStream) return dx_of_few_rows(A_view, to);
      if (way == Way::kLibrary) return dx_onto_library(A_view, out, to);
      const Packed<A> A_t(Right<A>(A_view.transposed(), call_.M));
      const Leg<A> low = low_leg(A_t);
      if (!weight.data) return wide_product<T, A>({&low, 1}, Out<T>{to});
      const Leg<A> legs[] = {
          low, {Left<A>(dy_), weight_factor<T>(weight, call_.N, call_.K, false, call_.M)}};
      wide_product<T, A>(legs, Out<T>{to});
    });
  }

  Leg<A> low_leg(const Packed<A>& A_t) const {
    return {t_->left(), A_t.right(), call_.low.scale, keep_};
  }

  template <typename TA>
  void dx_onto_library(View<const TA> A_view, const Tensor& out, View<T> to) {
    mm_out(*call_.dy.tensor, *call_.weight.data.tensor, out);
    const Sizes sizes = {call_.M, call_.R, call_.R, false, true, keep_.data != nullptr};
    if (way_of(routes<T>(), Product::kExpand, sizes) == Way::kLibrary) {
      const Tensor A_t = transposed(in_base_dtype<T>(call_.low.A, out));
      return addmm_out(out, t_tensor(), A_t, 1, call_.low.scale, out);
    }
    const Packed<A> A_t(Right<A>(A_view.transposed(), call_.M));
    const Leg<A> low = low_leg(A_t);
    for_each_row_block(call_.M, [&](int64_t row, int64_t rows) {
      expand<T>(low.block(row, rows, 0, call_.K), to.block(row, 0, rows, call_.K));
    });
  }

  // dx of so few rows that the weight and A are read in place, once, from end to end.
  template <typename TA>
  void dx_of_few_rows(View<const TA> A_view, View<T> out) const {
    const int64_t M = call_.M, K = call_.K, N = call_.N, R = call_.R;
    Scratch<A> copy;
    const View<const A> dy = widened(dy_, &copy);
    const Scratch<A> t(M * R);  // scaled: `dot` takes no scale
    t_->with_view([&](auto view) {
      Scratch<A> wide;
      const View<const A> sums = widened(view, &wide);
      blocks().storage<A>().store(sums.data, sums.row_stride, static_cast<A>(call_.low.scale),
                                  nullptr, false, {t.get(), M, R, R, 1});
    });
    const View<const T> weight = matrix<T>(call_.weight.data);
    const int64_t part = even_part(K, std::max<int64_t>(K, 1), 256, 16, num_threads());
    for_each_part(K, part, [&](int64_t col, int64_t cols) {
      const Scratch<A> sum(M * cols);
      blocks().storage<T>().combine_rows(dy, weight.block(0, col, N, cols), sum.get(), cols);
      blocks().storage<TA>().dot({t.get(), M, R, R, 1}, A_view.block(col, 0, cols, R), sum.get(),
                                 cols, true);
      blocks().storage<T>().store(sum.get(), cols, A(1), nullptr, false,
                                  out.block(0, col, M, cols));
    });
  }

  // t in the base's dtype, for PyTorch's products.
  const Tensor& t_tensor() {
    if (!t_tensor_) {
      t_tensor_.emplace(empty(*call_.dy.tensor, {call_.M, call_.R}));
      const View<A> sums = t_->rows(0, call_.M);
      blocks().storage<T>().store(sums.data, sums.row_stride, A(1), nullptr, false,
                                  result<T>(*t_tensor_));
    }
    return *t_tensor_;
  }

  const BackwardCall& call_;
  const View<const T> dy_;
  const Bits keep_;
  std::optional<Tensor> t_tensor_;
  std::optional<Hidden<T>> t_;
};

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
  cpu::with_storage_type("dy", call.dy.dtype,
                         [&](auto storage) { cpu::Backward<decltype(storage)>(call).run(out); });
  return out.tuple();
}

}  // namespace lora_ext
