// The backward of one layer, with t = dy @ B.T:
//   dx = dy @ weight + scale * keep * (t @ A.T)     dA = scale * (keep * x).T @ t
//   dB = scale * h.T @ dy     dweight = dy.T @ x     dbias = sum of dy over its rows
// Only what `needs` asks for is computed. The products with the weight go the ways of the forward.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "checks.h"
#include "cpu/low_rank.h"

namespace lora_ext::cpu {

template <typename T, typename P>
class Backward {
  using A = Acc<T>;

 public:
  explicit Backward(const BackwardCall& call)
      : call_(call), dy_(matrix<T>(call.dy)), keep_(bits_of(call.low.keep)) {}

  void run(const Gradients& out) {
    all_but_dx(out);
    if (call_.needs.dx) dx(out.dx, false);
  }

  // Makes t too, where dx will read it.
  void all_but_dx(const Gradients& out) {
    if (call_.needs.dB) dB(out.dB);
    if (call_.needs.dbias) dbias(out.dbias);
    if (call_.needs.dweight) dweight(out.dweight);
    if (!call_.needs.dx && !call_.needs.dA) return;
    make_t();
    if (call_.needs.dA) dA(out.dA);
  }

  Way dx_way() const {
    const Weight& weight = call_.weight;
    const bool plain = weight.data && weight.format == Format::kPlain;
    if (weight.data && is_of_codes(weight.format)) {
      const bool dense_A = call_.low.A.stride(1) == 1 || call_.R == 1;
      return dx_way_of_codes(call_.M, dense_A && call_.K % columns_of_codes() == 0);
    }
    const bool dense = plain && has_dense_rows(matrix<T>(weight.data));
    return way_of(routes<T>(), Product::kDx,
                  {call_.M, call_.N, call_.R, !plain, dense, keep_.data != nullptr});
  }

  // dx, with `add` on top of what `out` holds.
  void dx(const Tensor& out, bool add) {
    const View<T> to = result<T>(out);
    switch (dx_way()) {
      case Way::kStream:
        return with_adapter<T>(call_.low.A, [&](auto view) {
          if (has_dense_rows(view)) return dx_of_few_rows(view, to, add);
          Scratch<A> copy;  // an A with dense columns, as PEFT's is: small next to the weight
          dx_of_few_rows(widened(view, &copy), to, add);
        });
      case Way::kLibrary:
        return dx_onto_library(out, to, add);
      default:
        std::vector<Leg<P>> legs;
        add_low_leg(&legs);
        add_base_leg(&legs);
        wide_product<T, P>(legs, Out<T>{to, nullptr, add});
    }
  }

  // The legs of dx.
  void add_low_leg(std::vector<Leg<P>>* legs) { legs->push_back(low_leg()); }
  void add_base_leg(std::vector<Leg<P>>* legs) const {
    if (!call_.weight.data) return;
    legs->push_back(
        {Left<P>(dy_), weight_factor<T, P>(call_.weight, call_.N, call_.K, false, call_.M)});
  }

 private:
  // Columns of a weight of codes that combine_codes takes at a time.
  int64_t columns_of_codes() const {
    const int64_t block = codes_of(call_.weight, call_.N, call_.K).block_bits;
    return block == 0 ? 64 : int64_t{1} << block;
  }

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
      gradient<T, P>(Hidden<T, P>::of(matrix<T>(call_.h)), dy_, {}, call_.low.scale, view);
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
    const Leg<P> leg = {Left<P>(dy_.transposed()), Right<P>(matrix<T>(call_.x), call_.N)};
    wide_product<T, P>({&leg, 1}, Out<T>{result<T>(out)});
  }

  void make_t() {
    const Shrink<T, P> shrink(dy_, {}, call_.low.B, true);
    if (shrink.by_library()) {
      t_tensor_.emplace(empty(*call_.dy.tensor, {call_.M, call_.R}));
      const Tensor B = in_base_dtype<T>(call_.low.B, *call_.dy.tensor);
      mm_out(*call_.dy.tensor, transposed(B), *t_tensor_);
      t_.emplace(Hidden<T, P>::of(read_only(result<T>(*t_tensor_))));
      return;
    }
    t_.emplace(Hidden<T, P>::in(call_.M, call_.R, nullptr));
    for_each_row_block(call_.M,
                       [&](int64_t row, int64_t rows) { shrink.rows(row, t_->rows(row, rows)); });
  }

  void dA(const Tensor& out) {
    if (gradient_by_library(keep_.data != nullptr)) {
      return library_gradient(transposed(*call_.x.tensor), t_tensor(), out);
    }
    adapter_gradient(out, [&](auto view) {
      gradient<T, P>(*t_, matrix<T>(call_.x), keep_, call_.low.scale, view.transposed());
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

  Leg<P> low_leg() {
    with_adapter<T>(call_.low.A,
                    [&](auto view) { A_t_.emplace(Right<P>(view.transposed(), call_.M)); });
    return {t_->left(), A_t_->right(), call_.low.scale, keep_};
  }

  void dx_onto_library(const Tensor& out, View<T> to, bool add) {
    if (add) {
      addmm_out(out, *call_.dy.tensor, *call_.weight.data.tensor, 1, 1, out);
    } else {
      mm_out(*call_.dy.tensor, *call_.weight.data.tensor, out);
    }
    const Sizes sizes = {call_.M, call_.R, call_.R, false, true, keep_.data != nullptr};
    if (way_of(routes<T>(), Product::kExpand, sizes) == Way::kLibrary) {
      const Tensor A_t = transposed(in_base_dtype<T>(call_.low.A, out));
      return addmm_out(out, t_tensor(), A_t, 1, call_.low.scale, out);
    }
    const Leg<P> low = low_leg();
    for_each_row_block(call_.M, [&](int64_t row, int64_t rows) {
      expand<T, P>(low.block(row, rows, 0, call_.K), to.block(row, 0, rows, call_.K));
    });
  }

  // dx of so few rows that the weight and A are read in place, from end to end.
  template <typename TA>
  void dx_of_few_rows(View<const TA> A_view, View<T> out, bool add) const {
    const int64_t M = call_.M, K = call_.K, N = call_.N, R = call_.R;
    const bool of_codes = is_of_codes(call_.weight.format), masked = keep_.data != nullptr;
    const Left<P> left(dy_);
    const Scratch<P> copy(of_codes || left.in_place() ? 0 : M * words_of<P>(N));
    Scratch<A> wide_dy;  // codes meet floats
    const View<const A> floats = of_codes ? widened(dy_, &wide_dy) : View<const A>{};
    const View<const P> dy = of_codes ? View<const P>{} : left.block(0, 0, M, N, copy.get());
    const Scratch<A> t(M * R);  // scaled: `dot` takes no scale
    t_->with_view([&](auto view) {
      Scratch<A> wide;
      const View<const A> sums = widened(view, &wide);
      blocks().storage<A>().store(sums.data, sums.row_stride, static_cast<A>(call_.low.scale),
                                  nullptr, false, {t.get(), M, R, R, 1});
    });
    const Codes codes = of_codes ? codes_of(call_.weight, N, K) : Codes{};
    const View<const T> weight = of_codes ? View<const T>{} : matrix<T>(call_.weight.data);
    const int64_t multiple = of_codes ? columns_of_codes() : 16;
    const int64_t part = even_part(K, std::max<int64_t>(K, 1), 256, multiple, num_threads());
    for_each_part(K, part, [&](int64_t col, int64_t cols) {
      const Scratch<A> sum(M * cols), apart(masked ? M * cols : 0);
      if (of_codes) {
        blocks().storage<T>().combine_codes(floats, codes, col, cols, sum.get(), cols);
      } else {
        combine(dy, weight.block(0, col, N, cols), sum.get());
      }
      blocks().storage<TA>().dot({t.get(), M, R, R, 1}, A_view.block(col, 0, cols, R),
                                 masked ? apart.get() : sum.get(), cols, !masked);
      if (masked) {  // by itself, not with what is summed already
        blocks().storage<A>().keep(keep_.from(0, col), {apart.get(), M, cols, cols, 1});
        blocks().storage<A>().store(apart.get(), cols, A(1), nullptr, true,
                                    {sum.get(), M, cols, cols, 1});
      }
      blocks().storage<T>().store(sum.get(), cols, A(1), nullptr, add, out.block(0, col, M, cols));
    });
  }

  // out = left @ right
  static void combine(View<const P> left, View<const T> right, A* out) {
    if constexpr (kIsPair<P>) {
      blocks().pairs->combine_rows(left, right, out, right.cols);
    } else {
      blocks().storage<T>().combine_rows(left, right, out, right.cols);
    }
  }

  // t in the base's dtype, for PyTorch's products.
  const Tensor& t_tensor() {
    if (!t_tensor_) {
      t_tensor_.emplace(empty(*call_.dy.tensor, {call_.M, call_.R}));
      const auto made = t_->rows(0, call_.M);
      const View<T> to = result<T>(*t_tensor_);
      if constexpr (kIsPair<P>) {
        for (int64_t i = 0; i < to.rows; ++i) {
          std::copy_n(made.data + i * made.row_stride, to.cols, to.data + i * to.row_stride);
        }
      } else {
        blocks().storage<T>().store(made.data, made.row_stride, A(1), nullptr, false, to);
      }
    }
    return *t_tensor_;
  }

  const BackwardCall& call_;
  const View<const T> dy_;
  const Bits keep_;
  std::optional<Tensor> t_tensor_;
  std::optional<Hidden<T, P>> t_;
  std::optional<Packed<P>> A_t_;
};

}  // namespace lora_ext::cpu
