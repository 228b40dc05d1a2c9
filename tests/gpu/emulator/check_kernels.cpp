// The kernels of csrc/cuda in the emulator, without torch, in memory of exactly their operands'
// size, so that the sanitizers see an access past it: check_kernels SEEDS. Each product is held
// against sums in double, and its bits have to be the same under every order of threads. It ends at
// the first problem that fails.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cuda/kernels.h"
#include "cuda/primitives.h"
#include "operands.h"

using namespace lora_ext::cuda;

namespace {

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
