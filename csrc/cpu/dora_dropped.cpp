// DoRA over a dropped x on the CPU, from what the product of the whole x gives:
//   q = (dropped x) @ weight.T,  z = (y - q - p * low) / (1 - p),  y += (g - 1) * z + bias
// and of its gradient, where x is dropped: dx -= (factor * dy) @ weight. Sparse products, by rows
// of weight.T laid out in the second-level cache.
#include <torch/headeronly/util/Exception.h>

#include <cstring>
#include <vector>

#include "checks.h"
#include "cpu/tensors.h"
#include "operators.h"

namespace lora_ext {
namespace cpu {
namespace {

// Rows laid out at a time, of up to 1 KB: where sums of all rows wait meanwhile, and where not.
constexpr int64_t kForwardDepth = 384, kBackwardDepth = 768;
constexpr int64_t kMostRows = 1024;  // of sums that wait meanwhile
constexpr int64_t kLeastRows = 128;  // for which a thread lays a factor out once more

// f(column) for each element of columns [from, from + count) of a row of the mask that is dropped.
template <typename F>
void for_each_dropped(const uint8_t* row, int64_t from, int64_t count, const F& f) {
  for (int64_t k = 0; k < count; k += 64) {
    const int64_t bits = std::min<int64_t>(count - k, 64);
    uint64_t kept = 0;
    std::memcpy(&kept, row + (from + k) / 8, ceil_div(bits, 8));
    uint64_t dropped = ~kept;
    if (bits < 64) dropped &= (uint64_t{1} << bits) - 1;
    for (; dropped != 0; dropped &= dropped - 1) f(k + __builtin_ctzll(dropped));
  }
}

// The dropped elements of some rows and of `depth` columns from a multiple of 64 on; their values
// are 0 at first.
template <typename A>
class Dropped {
 public:
  const int64_t from, depth;

  Dropped(Bits keep, int64_t rows, int64_t from, int64_t depth)
      : from(from), depth(depth), keep_(keep), first_(rows + 1) {
    int64_t count = 0;
    for (int64_t row = 0; row < rows; ++row) {
      first_.get()[row] = count;
      for_each_dropped(bits(row), from, depth, [&](int64_t) { ++count; });
    }
    first_.get()[rows] = count;
    at_ = Scratch<int32_t>(count), values_ = Scratch<A>(count);
    std::fill_n(values_.get(), count, A{0});
    const auto width = static_cast<int32_t>(blocks().storage<A>().few_width);
    for (int64_t row = 0; row < rows; ++row) {
      int32_t* at = at_.get() + first_.get()[row];
      for_each_dropped(bits(row), from, depth,
                       [&](int64_t k) { *at++ = static_cast<int32_t>(k) * width; });
    }
  }

  Few<A> row(int64_t row) const {
    const int64_t first = first_.get()[row];
    return {at_.get() + first, values_.get() + first, first_.get()[row + 1] - first};
  }
  // f(column, its value), the first of the columns being 0, for those of a row.
  template <typename F>
  void for_each(int64_t row, const F& f) const {
    A* value = this->row(row).values;
    for_each_dropped(bits(row), from, depth, [&](int64_t k) { f(k, *value++); });
  }

 private:
  const uint8_t* bits(int64_t row) const { return keep_.data + row * keep_.row_stride; }

  Bits keep_;
  Scratch<int64_t> first_;
  Scratch<int32_t> at_;
  Scratch<A> values_;
};

// A row as A, zeros up to a width.
template <typename A, typename T>
void load_padded(View<const T> row, A* to, int64_t width) {
  blocks().storage<T>().load(row, to, width);
  std::fill(to + row.cols, to + width, A{0});
}

template <typename T, typename B>
struct Forward {
  using A = Acc<T>;
  View<const T> x, weight, h;
  View<const B> low;  // (R, N)
  Bits keep;
  View<const A> factor;  // (1, N), g - 1
  View<const T> bias;    // (1, N), or of no columns
  A low_scale, scale;    // p * the scale of h @ low, and 1 / (1 - p)
  View<T> y, z;

  void operator()(int64_t row, int64_t rows, int64_t col, int64_t cols) const {
    const StorageOps<T>& of = blocks().storage<T>();
    const int64_t K = x.cols, R = h.cols, width = of.few_width;
    const int64_t depth = even_part(K, kForwardDepth, 64, 64, 1);
    const Scratch<A> sums(rows * width), panel(std::max(std::min(depth, K), R) * width);
    const Scratch<A> of_factor(width), of_bias(width), dense(K), of_h(rows * R);
    const Scratch<int32_t> each(R);
    of.load(h.block(row, 0, rows, R), of_h.get(), R);
    for (int64_t i = 0; i < rows * R; ++i) of_h.get()[i] *= low_scale;
    for (int64_t r = 0; r < R; ++r) each.get()[r] = static_cast<int32_t>(r * width);
    std::vector<Dropped<A>> dropped;
    for (int64_t k = 0; k < K; k += depth) {
      dropped.emplace_back(keep.from(row, 0), rows, k, std::min(depth, K - k));
    }
    for (int64_t i = 0; i < rows; ++i) {
      of.load(x.block(row + i, 0, 1, K), dense.get(), K);
      for (const Dropped<A>& some : dropped) {
        some.for_each(i, [&](int64_t k, A& value) { value = dense.get()[some.from + k]; });
      }
    }
    for (int64_t n = col; n < col + cols; n += width) {
      const int64_t wide = std::min(width, col + cols - n);
      std::fill_n(sums.get(), rows * width, A{0});
      for (const Dropped<A>& some : dropped) {
        of.lay_out(weight.transposed().block(some.from, n, some.depth, wide), panel.get(), width);
        for (int64_t i = 0; i < rows; ++i) {
          of.combine_few(some.row(i), panel.get(), sums.get() + i * width);
        }
      }
      blocks().storage<B>().lay_out(low.block(0, n, R, wide), panel.get(), width);
      load_padded(factor.block(0, n, 1, wide), of_factor.get(), width);
      load_padded(bias.block(0, n, 1, bias.cols == 0 ? 0 : wide), of_bias.get(), width);
      for (int64_t i = 0; i < rows; ++i) {
        A* sum = sums.get() + i * width;
        of.combine_few({each.get(), of_h.get() + i * R, R}, panel.get(), sum);
        of.rescale(sum, scale, of_factor.get(), of_bias.get(), wide,
                   &y.data[(row + i) * y.row_stride + n], &z.data[(row + i) * z.row_stride + n]);
      }
    }
  }
};

template <typename T>
struct Backward {
  using A = Acc<T>;
  View<const T> dy, weight;
  Bits keep;
  View<const A> factor;  // (1, N)
  View<T> dx;

  void operator()(int64_t row, int64_t rows, int64_t from, int64_t depth) const {
    const StorageOps<T>& of = blocks().storage<T>();
    const int64_t N = dy.cols, width = of.few_width;
    const Scratch<A> panel(depth * width), of_factor(width), dense(depth);
    const Dropped<A> dropped(keep.from(row, 0), rows, from, depth);
    for (int64_t n = 0; n < N; n += width) {
      const int64_t wide = std::min(width, N - n);
      of.lay_out(weight.transposed().block(from, n, depth, wide), panel.get(), width);
      load_padded(factor.block(0, n, 1, wide), of_factor.get(), width);
      for (int64_t i = 0; i < rows; ++i) {
        const T* left = &dy.data[(row + i) * dy.row_stride + n];
        of.sample_few(left, wide, of_factor.get(), panel.get(), dropped.row(i));
      }
    }
    for (int64_t i = 0; i < rows; ++i) {
      const View<T> to = dx.block(row + i, from, 1, depth);
      if constexpr (std::is_same_v<T, A>) {  // 0.3 ms of 2.3 at 960,768,768 less than the other way
        dropped.for_each(i, [&](int64_t k, A& value) { to.data[k * to.col_stride] -= value; });
      } else {
        of.load(read_only(to), dense.get(), depth);
        dropped.for_each(i, [&](int64_t k, A& value) { dense.get()[k] -= value; });
        of.store(dense.get(), depth, 1, nullptr, false, to);
      }
    }
  }
};

// body(row, rows, col, cols) for blocks of a matrix: parts of columns, and of rows where there are
// more threads than those.
template <typename F>
void for_each_block(int64_t rows, int64_t cols, int64_t col_part, const F& body) {
  const int64_t across = ceil_div(cols, std::max<int64_t>(col_part, 1));
  const int64_t waiting = ceil_div(num_threads(), std::max<int64_t>(across, 1));
  const int64_t row_part = even_part(rows, kMostRows, kLeastRows, 1, waiting);
  for_each_part(across * ceil_div(rows, row_part), 1, [&](int64_t block, int64_t) {
    const int64_t row = block / across * row_part, col = block % across * col_part;
    body(row, std::min(row_part, rows - row), col, std::min(col_part, cols - col));
  });
}

// A vector over what y has in a row: g and the like are float, or double over double.
template <typename A>
View<const A> checked_row(const Checks& checks, const char* name, const Operand& vector, int64_t N,
                          ScalarType dtype) {
  check_shape(name, vector, {N});
  check_is(name, vector, dtype);
  checks.place(name, vector);
  return {static_cast<const A*>(vector.data()), 1, N, 0, vector.stride(0)};
}

ScalarType accumulator_of(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_matrix(const Checks& checks, const char* name, const Operand& matrix, int64_t rows,
                  int64_t cols) {
  check_shape(name, matrix, {rows, cols});
  checks.dtype(name, matrix);
  checks.place(name, matrix);
}

// A matrix whose rows are dense.
void check_rows(const Checks& checks, const char* name, const Operand& matrix, int64_t rows,
                int64_t cols) {
  check_matrix(checks, name, matrix, rows, cols);
  STD_TORCH_CHECK(matrix.stride(1) == 1 || cols <= 1, name,
                  " must have dense rows, got a stride of ", matrix.stride(1));
}

void check_keep(const Checks& checks, const Operand& keep, int64_t M, int64_t K) {
  check_shape("keep", keep, {M, ceil_div(K, 8)});
  check_is("keep", keep, ScalarType::Byte);
  checks.place("keep", keep);
  STD_TORCH_CHECK(keep.stride(1) == 1 || keep.size(1) <= 1, "keep must have dense rows");
}

}  // namespace
}  // namespace cpu

Tensor dora_dropped_fwd(Tensor y, const Tensor& x, const Tensor& weight,
                        const std::optional<Tensor>& bias, const Tensor& h, const Tensor& B,
                        const Tensor& keep, const Tensor& factor, double scale, double p) {
  const Operand of_y(y), of_x(x), of_weight(weight), of_bias(bias), of_h(h), of_B(B), of_keep(keep),
      of_factor(factor);
  check_dim("y", of_y, 2, "(M, N)");
  check_dim("x", of_x, 2, "(M, K)");
  check_dim("B", of_B, 2, "(R, N)");
  const int64_t M = of_y.size(0), N = of_y.size(1), K = of_x.size(1), R = of_B.size(0);
  const Checks checks("x", of_x);
  cpu::check_rows(checks, "y", of_y, M, N);
  cpu::check_matrix(checks, "x", of_x, M, K);
  cpu::check_matrix(checks, "weight", of_weight, N, K);
  cpu::check_matrix(checks, "h", of_h, M, R);
  check_shape("B", of_B, {R, N});
  checks.adapter_dtype("B", of_B);
  checks.place("B", of_B);
  cpu::check_keep(checks, of_keep, M, K);
  STD_TORCH_CHECK(p >= 0 && p < 1, "p must be from 0 to 1, and less, got ", p);
  const Tensor z = empty(y, {M, N});
  cpu::with_storage_type("x", of_x.dtype, [&](auto storage) {
    using T = decltype(storage);
    using A = cpu::Acc<T>;
    const auto row =
        cpu::checked_row<A>(checks, "factor", of_factor, N, cpu::accumulator_of(of_x.dtype));
    const auto of_each = of_bias ? cpu::checked_row<T>(checks, "bias", of_bias, N, of_x.dtype)
                                 : cpu::View<const T>{};
    cpu::with_adapter<T>(of_B, [&](auto low) {
      using L = std::remove_const_t<std::remove_pointer_t<decltype(low.data)>>;
      const cpu::Forward<T, L> forward{cpu::matrix<T>(of_x),
                                       cpu::matrix<T>(of_weight),
                                       cpu::matrix<T>(of_h),
                                       low,
                                       cpu::bits_of(of_keep),
                                       row,
                                       of_each,
                                       static_cast<A>(p * scale),
                                       static_cast<A>(1 / (1 - p)),
                                       cpu::result<T>(y),
                                       cpu::result<T>(z)};
      const int64_t width = cpu::blocks().storage<T>().few_width;
      cpu::for_each_block(M, N, cpu::even_part(N, N, width, width, cpu::num_threads()), forward);
    });
  });
  return z;
}

void dora_dropped_bwd(Tensor dx, const Tensor& dy, const Tensor& weight, const Tensor& keep,
                      const Tensor& factor) {
  const Operand of_dx(dx), of_dy(dy), of_weight(weight), of_keep(keep), of_factor(factor);
  check_dim("dx", of_dx, 2, "(M, K)");
  check_dim("dy", of_dy, 2, "(M, N)");
  const int64_t M = of_dx.size(0), K = of_dx.size(1), N = of_dy.size(1);
  const Checks checks("dy", of_dy);
  cpu::check_matrix(checks, "dx", of_dx, M, K);
  cpu::check_rows(checks, "dy", of_dy, M, N);
  cpu::check_matrix(checks, "weight", of_weight, N, K);
  cpu::check_keep(checks, of_keep, M, K);
  cpu::with_storage_type("dy", of_dy.dtype, [&](auto storage) {
    using T = decltype(storage);
    using A = cpu::Acc<T>;
    const cpu::Backward<T> backward{
        cpu::matrix<T>(of_dy), cpu::matrix<T>(of_weight), cpu::bits_of(of_keep),
        cpu::checked_row<A>(checks, "factor", of_factor, N, cpu::accumulator_of(of_dy.dtype)),
        cpu::result<T>(dx)};
    const int64_t part = cpu::even_part(K, cpu::kBackwardDepth, 64, 64, cpu::num_threads());
    cpu::for_each_block(M, K, part, backward);
  });
}

}  // namespace lora_ext
