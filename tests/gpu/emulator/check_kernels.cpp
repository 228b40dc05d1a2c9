// The kernels of csrc/cuda in the emulator, without torch, in memory of exactly their operands'
// size, so that the sanitizers see an access past it: check_kernels SEEDS. Each product is held
// against sums in double, and its bits have to be the same under every order of threads. It ends at
// the first problem that fails.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <tuple>
#include <vector>

#include "cuda/kernels.h"
#include "cuda/primitives.h"

using namespace lora_ext::cuda;

namespace {

enum class Layout { kDense, kPadded, kShifted, kTransposed };

// A matrix of T (or, is_float, of float: a result), and the memory it has: what is between rows is
// NaN.
template <typename T>
class Values {
 public:
  Values(int64_t rows, int64_t cols, Layout layout = Layout::kDense, bool is_float = false)
      : matrix{nullptr, rows, cols, cols, 1, is_float} {
    const int64_t shift = layout == Layout::kShifted;
    if (layout == Layout::kPadded) matrix.row_stride = (cols + 15) / 8 * 8;
    if (layout == Layout::kTransposed) {
      matrix.row_stride = 1;
      matrix.col_stride = rows;
    }
    const int64_t last = (rows - 1) * matrix.row_stride + (cols - 1) * matrix.col_stride;
    size_ = rows && cols ? (shift + last + 1) * bytes() : 0;
    memory_ = static_cast<char*>(std::malloc(size_));
    if (size_) std::memset(memory_, 0xFF, size_);
    matrix.data = memory_ + shift * bytes();
  }
  ~Values() { std::free(memory_); }
  Values(const Values&) = delete;
  Values& operator=(const Values&) = delete;

  void fill(double scale) {
    static std::mt19937 random(1);
    std::normal_distribution<double> normal(0, scale);
    for (int64_t i = 0; i < matrix.rows; ++i) {
      for (int64_t j = 0; j < matrix.cols; ++j) set(i, j, normal(random));
    }
  }
  double get(int64_t i, int64_t j) const {
    const int64_t at = i * matrix.row_stride + j * matrix.col_stride;
    return matrix.is_float ? static_cast<float*>(matrix.data)[at]
                           : widen(static_cast<T*>(matrix.data)[at]);
  }
  void set(int64_t i, int64_t j, double value) {
    const int64_t at = i * matrix.row_stride + j * matrix.col_stride;
    assign(static_cast<T*>(matrix.data)[at], value);
  }
  bool operator==(const Values& other) const {
    return std::memcmp(memory_, other.memory_, size_) == 0;
  }

  Matrix matrix;

 private:
  size_t bytes() const { return matrix.is_float ? 4 : sizeof(T); }

  char* memory_;
  size_t size_;
};

// Dropout's mask in memory of exactly its size, its rows `gap` bytes apart; bits past the end of a
// row are ones.
class Mask {
 public:
  Mask(int64_t rows, int64_t cols, int64_t gap)
      : row_stride_((cols + 7) / 8 + gap), memory_(rows * row_stride_ - (rows ? gap : 0), 0xFF) {
    static std::mt19937 random(2);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t k = 0; k < cols; ++k) {
        if (random() % 3 == 0) memory_[i * row_stride_ + k / 8] &= ~(1 << k % 8);
      }
    }
    memory_.shrink_to_fit();
  }
  Bits bits() const { return {memory_.data(), row_stride_}; }
  double operator()(int64_t i, int64_t k) const {
    return memory_[i * row_stride_ + k / 8] >> k % 8 & 1;
  }

 private:
  int64_t row_stride_;
  std::vector<uint8_t> memory_;
};

enum class Base { kWeight, kOnto, kNone };

struct Problem {
  int64_t M, K, N, R;
  int multiprocessors;
  Layout layout = Layout::kDense;
  bool gradient_is_float = false;  // of A and of B
  Base base = Base::kWeight;
  int64_t gap = -1;  // dropout's mask has its rows so far apart; below 0 there is none
};

template <typename T>
constexpr DType kDType = std::is_same_v<T, Half>       ? DType::kHalf
                         : std::is_same_v<T, BFloat16> ? DType::kBFloat16
                         : std::is_same_v<T, float>    ? DType::kFloat
                                                       : DType::kDouble;
template <typename T>
constexpr double kRounding = std::is_same_v<T, Half> ? 0x1p-11 : 0x1p-8;
constexpr double kSumRounding = 0x1p-24;

int failures = 0;

// out == sum over the terms of left[i] . right[j], each scaled, up to rounding.
template <typename T>
class Exact {
 public:
  Exact(int64_t rows, int64_t cols)
      : rows_(rows), cols_(cols), sum_(rows * cols), all_(rows * cols) {}

  template <typename Left, typename Right>
  void add(int64_t depth, double scale, const Left& left, const Right& right) {
    for (int64_t i = 0; i < rows_; ++i) {
      for (int64_t j = 0; j < cols_; ++j) {
        for (int64_t k = 0; k < depth; ++k) {
          const double term = scale * left(i, k) * right(j, k);
          sum_[i * cols_ + j] += term;
          all_[i * cols_ + j] += std::abs(term);
        }
      }
    }
  }
  template <typename Kept>
  void keep(const Kept& kept) {
    for (int64_t i = 0; i < rows_ * cols_; ++i) {
      if (!kept(i / cols_, i % cols_)) sum_[i] = all_[i] = 0;
    }
  }
  void add_matrix(const Values<T>& base) {
    for (int64_t i = 0; i < rows_ * cols_; ++i) {
      sum_[i] += base.get(i / cols_, i % cols_);
      all_[i] += std::abs(sum_[i]);
    }
  }
  void hold(const char* name, const Values<T>& out) const {
    for (int64_t i = 0; i < rows_; ++i) {
      for (int64_t j = 0; j < cols_; ++j) {
        const double want = sum_[i * cols_ + j], got = out.get(i, j);
        const double bound = 1.01 * kRounding<T> * std::abs(want) +
                             16 * kSumRounding * all_[i * cols_ + j] + 0x1p-25;
        if (std::abs(got - want) <= bound) continue;
        std::fprintf(stderr, "%s[%ld, %ld] is %g, not %g\n", name, long(i), long(j), got, want);
        ++failures;
        return;
      }
    }
  }

 private:
  int64_t rows_, cols_;
  std::vector<double> sum_, all_;
};

template <typename T>
void check(const Problem& p, int seeds) {
  const auto [M, K, N, R] = std::tuple(p.M, p.K, p.N, p.R);
  const double alpha = 1.7;
  const bool onto = p.base == Base::kOnto, masked = p.gap >= 0;
  const Mask mask(masked ? M : 0, K, std::max<int64_t>(p.gap, 0));
  const Bits keep = masked ? mask.bits() : Bits{};
  const auto kept = [&](int64_t i, int64_t k) { return masked ? mask(i, k) : 1.0; };
  Values<T> x(M, K, p.layout), weight(N, K, p.layout), bias(1, N), dy(M, N, p.layout),
      A(K, R, p.layout), B(R, N, p.layout), base_y(M, N), base_dx(M, K);
  for (auto* values : {&x, &weight, &bias, &A, &B, &dy, &base_y, &base_dx}) values->fill(0.5);

  struct Results {
    Values<T> h, y, t, dx, dA, dB;
  };
  const auto results = [&] {
    return new Results{{M, R},
                       {M, N},
                       {M, R},
                       {M, K},
                       {K, R, Layout::kDense, p.gradient_is_float},
                       {R, N, Layout::kDense, p.gradient_is_float}};
  };
  std::unique_ptr<Results> first;
  for (int seed = 0; seed < seeds; ++seed) {
    emulator::set_seed(seed);
    std::unique_ptr<Results> r(results());
    if (onto) {
      for (int64_t i = 0; i < M; ++i) {
        for (int64_t j = 0; j < N; ++j) r->y.set(i, j, base_y.get(i, j));
        for (int64_t j = 0; j < K; ++j) r->dx.set(i, j, base_dx.get(i, j));
      }
    }
    std::vector<std::unique_ptr<char[]>> scratch;
    const Context context = {kDType<T>, nullptr, p.multiprocessors, [&](int64_t bytes) {
                               scratch.emplace_back(new char[bytes]);
                               std::memset(scratch.back().get(), 0xFF, bytes);
                               return scratch.back().get();
                             }};
    const Matrix base = p.base == Base::kNone ? Matrix() : weight.matrix;
    const Bias base_bias = {p.base == Base::kNone ? nullptr : bias.matrix.data, 1};
    forward_h(context, x.matrix, keep, A.matrix, r->h.matrix);
    forward_y(context, x.matrix, base, base_bias, r->h.matrix, B.matrix, alpha, r->y.matrix, onto);
    backward_t(context, dy.matrix, B.matrix, r->t.matrix);
    backward_dx(context, dy.matrix, base, r->t.matrix, A.matrix, keep, alpha, r->dx.matrix, onto);
    backward_adapter(context, x.matrix, keep, r->t.matrix, alpha, r->dA.matrix);
    backward_adapter(context, dy.matrix, {}, r->h.matrix, alpha, r->dB.matrix.transposed());
    if (first != nullptr) {
      if (!(first->h == r->h && first->y == r->y && first->t == r->t && first->dx == r->dx &&
            first->dA == r->dA && first->dB == r->dB)) {
        std::fprintf(stderr, "seed %d gives other bits\n", seed);
        ++failures;
        return;
      }
      continue;
    }
    first = std::move(r);
  }

  const auto as_is = [](const Values<T>& v) {
    return [&](int64_t i, int64_t k) { return v.get(i, k); };
  };
  const auto turned = [](const Values<T>& v) {
    return [&](int64_t i, int64_t k) { return v.get(k, i); };
  };
  const auto one = [](int64_t, int64_t) { return 1.0; };
  const auto kept_x = [&](int64_t i, int64_t k) { return kept(i, k) ? x.get(i, k) : 0; };
  const auto kept_xT = [&](int64_t k, int64_t i) { return kept_x(i, k); };
  Exact<T> h(M, R), y(M, N), t(M, R), dx(M, K), dA(K, R), dB(R, N);
  h.add(K, 1, kept_x, turned(A));
  h.hold("h", first->h);
  const bool whole = p.base == Base::kWeight;
  y.add(whole ? K : 0, 1, as_is(x), as_is(weight));
  y.add(R, alpha, as_is(first->h), turned(B));
  if (whole) y.add(1, 1, one, turned(bias));
  if (onto) y.add_matrix(base_y);
  y.hold("y", first->y);
  t.add(N, 1, as_is(dy), as_is(B));
  t.hold("t", first->t);
  dx.add(R, alpha, as_is(first->t), as_is(A));
  dx.keep(kept);
  dx.add(whole ? N : 0, 1, as_is(dy), turned(weight));
  if (onto) dx.add_matrix(base_dx);
  dx.hold("dx", first->dx);
  dA.add(M, alpha, kept_xT, turned(first->t));
  dA.hold("dA", first->dA);
  dB.add(M, alpha, turned(first->h), turned(dy));
  dB.hold("dB", first->dB);
}

// The mask alone, exactly; without one where gap is below 0.
template <typename T>
void check_mask(int64_t rows, int64_t cols, Layout layout, int64_t gap, bool add) {
  const Mask mask(rows, cols, std::max<int64_t>(gap, 0));
  Values<T> from(rows, cols, layout), out(rows, cols, Layout::kPadded), before(rows, cols);
  for (auto* values : {&from, &before}) values->fill(0.5);
  for (int64_t i = 0; add && i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) out.set(i, j, before.get(i, j));
  }
  const Context context = {kDType<T>, nullptr, 4, {}};
  apply_mask(context, from.matrix, gap < 0 ? Bits{} : mask.bits(), 0.5, out.matrix, add);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) {
      T want = gap < 0 || mask(i, j) ? from.get(i, j) / 2 : 0;
      if (add) want += static_cast<T>(before.get(i, j));
      if (out.get(i, j) == want) continue;
      std::fprintf(stderr, "masked[%ld, %ld] is %g, not %g\n", long(i), long(j), out.get(i, j),
                   double(want));
      ++failures;
      return;
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  const int seeds = count > 1 ? std::atoi(arguments[1]) : 1;
  const Problem halves[] = {
      {37, 96, 88, 8, 100},                              // narrow tiles, tails, chunks of 8
      {70, 45, 35, 5, 100, Layout::kPadded},             // chunks cut short
      {19, 41, 33, 3, 100, Layout::kShifted},            // no chunk is aligned
      {19, 24, 40, 17, 100, Layout::kTransposed, true},  // the other dimension is contiguous
      {130, 136, 132, 16, 1},                            // wide tiles, a row past the first
      {66, 8, 40, 100, 100, Layout::kDense, false, Base::kOnto},  // onto a base; R > K
      {3, 560, 8, 2, 100, Layout::kDense, true},                  // h in parts
      {600, 8, 40, 3, 100},  // a second group of tiles, cut short
      {1, 1, 1, 1, 100},
      {0, 8, 8, 2, 100},
      {37, 45, 24, 8, 100, Layout::kDense, false, Base::kNone, 0},      // masked; no base
      {130, 136, 132, 16, 1, Layout::kPadded, true, Base::kWeight, 3},  // wide tiles; x in chunks
      {3, 560, 8, 2, 100, Layout::kShifted, false, Base::kOnto, 0},     // h in parts
      {300, 41, 8, 3, 100, Layout::kTransposed, false, Base::kWeight, 0},  // dA in parts
  };
  for (const Problem& p : halves) {
    check<Half>(p, seeds);
    check<BFloat16>(p, seeds);
    if (failures) return 1;
  }
  for (const bool add : {false, true}) {
    check_mask<float>(37, 45, Layout::kDense, 0, add);
    check_mask<double>(5, 24, Layout::kTransposed, 3, add);
    check_mask<float>(3, 9, Layout::kPadded, -1, add);
    check_mask<float>(0, 8, Layout::kPadded, 0, add);
  }
  return failures ? 1 : 0;
}
