// Checks every block operation of one instruction set (csrc/cpu/blocks.h) by its meaning: against
// loops in double over the same numbers, at sizes around every block. Prints what is wrong.
//   check_blocks NAME [first]    0: all right, 1: something is wrong (with `first` it ends there),
//                                2: this CPU can't run it
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "check_pairs.h"
#include "cpu/blocks.h"
#include "matrices.h"

namespace lora_ext::cpu {
namespace {

// ---- what is stored as T and multiplied as A ----

template <typename T, typename A = Acc<T>>
void check_storage(const char* name, const StorageOps<T>& ops, const MultiplyOps<A>& products,
                   int64_t M, int64_t K, int64_t N) {
  const std::string of = std::string(name) + " ";
  const double unit = (static_cast<double>(K) + 8) * kUnit<A>;
  const int64_t wide = round_up_to_panel<A>(N);
  for (const Layout layout : kLayouts) {
    Matrix<T> x(M, K, layout), w(K, N, layout), y(M, N, layout);
    Matrix<A> a(M, K);
    ops.load(x.read(), a.view.data, a.view.row_stride);
    const Element x_at = [&](int64_t i, int64_t k) { return x(i, k); };
    const Element w_at = [&](int64_t k, int64_t j) { return w(k, j); };
    compare<A>(of + "load", a, x_at, x_at, 0, K);

    std::vector<A> packed(K * wide, std::numeric_limits<A>::infinity());
    ops.pack(w.read(), packed.data());
    const auto panels = Panels<const A>::packed(packed.data(), K);
    const Product product = {x_at, w_at, K};
    const Element size = [&](int64_t i, int64_t j) { return product.size(i, j) + 10; };
    Matrix<A> c(M, N), bias(1, N);
    products.multiply(a.read(), panels, N, c.view.data, c.view.row_stride, 1, {bias.view.data, 0},
                      {}, {});
    compare<A>(
        of + "multiply", c, [&](int64_t i, int64_t j) { return product(i, j) + bias(0, j); }, size,
        unit, K);
    Matrix<A> twice = c;
    twice.view.data = twice.memory.data() + 1;
    products.multiply(a.read(), panels, N, twice.view.data, twice.view.row_stride, 1,
                      {twice.view.data, twice.view.row_stride}, {}, {});
    compare<A>(
        of + "multiply, added to itself", twice,
        [&](int64_t i, int64_t j) { return 2 * product(i, j) + bias(0, j); }, size, 3 * unit, K);
    products.multiply(a.read(), panels, N, c.view.data, c.view.row_stride, A(1.5), {}, {},
                      {a.read(), panels});
    compare<A>(
        of + "multiply, with another along", c,
        [&](int64_t i, int64_t j) { return 3 * product(i, j); }, size, 3 * unit, K);

    ops.store(c.view.data, c.view.row_stride, A(1.5), nullptr, false, y.view);
    compare<T>(
        of + "store", y, [&](int64_t i, int64_t j) { return 1.5 * c(i, j); },
        [&](int64_t i, int64_t j) { return std::fabs(c(i, j)); }, kUnit<A>, K);
  }
  Matrix<T> y(M, N), x(M, K), w(K, N), wt(N, K);
  Matrix<A> a(M, K), out(M, N);
  std::vector<A> packed(K * wide);
  ops.pack(w.read(), packed.data());
  const Element a_at = [&](int64_t i, int64_t k) { return a(i, k); };
  const Product product = {a_at, [&](int64_t k, int64_t j) { return w(k, j); }, K};
  const Element size = [&](int64_t i, int64_t j) { return product.size(i, j) + 10; };
  Matrix<T> before = y;
  before.view.data = before.memory.data() + 1;
  ops.update(a.read(), Panels<const A>::packed(packed.data(), K), A(1.5), y.view);
  compare<T>(
      of + "update", y, [&](int64_t i, int64_t j) { return before(i, j) + 1.5 * product(i, j); },
      size, 2 * unit, K);
  ops.combine_rows(a.read(), w.read(), out.view.data, out.view.row_stride);
  compare<A>(
      of + "combine_rows", out, [&](int64_t i, int64_t j) { return product(i, j); }, size, unit, K);
  const Product dots = {a_at, [&](int64_t k, int64_t j) { return wt(j, k); }, K};
  for (const bool add : {false, true}) {
    ops.dot(a.read(), wt.read(), out.view.data, out.view.row_stride, add);
    compare<A>(
        of + (add ? "dot, added" : "dot"), out,
        [&](int64_t i, int64_t j) { return (add ? 2 : 1) * dots(i, j); },
        [&](int64_t i, int64_t j) { return dots.size(i, j) + 10; }, 3 * unit, K);
  }
}

// ---- a gated MLP's activation ----

struct Value {
  double value, derivative;
};

Value act_of(Act act, double x) {
  const double pi = std::acos(-1.0);
  switch (act) {
    case Act::kSilu: {
      const double s = 1 / (1 + std::exp(-x));
      return {x * s, s + x * s * (1 - s)};
    }
    case Act::kGelu: {
      const double below = 0.5 * std::erfc(-x / std::sqrt(2.0));
      return {x * below, below + x * std::exp(-x * x / 2) / std::sqrt(2 * pi)};
    }
    case Act::kGeluTanh: {
      const double c = std::sqrt(2 / pi), t = std::tanh(c * (x + 0.044715 * x * x * x));
      return {x * (1 + t) / 2, (1 + t) / 2 + x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x) / 2};
    }
    default:
      return {x > 0 ? x * x : 0, x > 0 ? 2 * x : 0};
  }
}

template <typename T>
void check_gated(const char* name, const StorageOps<T>& ops, int64_t M, int64_t N) {
  const double unit = 8 * kUnit<Acc<T>>;
  for (const Act act : {Act::kSilu, Act::kGelu, Act::kGeluTanh, Act::kRelu2}) {
    const std::string of = std::string(name) + " act " + std::to_string(static_cast<int>(act));
    for (const Layout layout : kLayouts) {
      Matrix<T> gate(M, N, layout), up(M, N, layout), d(M, N, layout);
      Matrix<T> hidden(M, N, layout), d_gate(M, N, layout), d_up(M, N, layout);
      for (int64_t j = 0; j < N; ++j) assign(std::pow(3.0, j % 5) * gate(0, j), &gate.at(0, j));
      ops.gated(act, gate.read(), up.read(), hidden.view);
      ops.gated_gradients(act, d.read(), gate.read(), up.read(), d_gate.view, d_up.view);
      const auto at = [&](int64_t i, int64_t j) { return act_of(act, gate(i, j)); };
      const Element size = [&](int64_t i, int64_t j) {
        const double most = std::fabs(gate(i, j)) + 1;
        return most * most * (std::fabs(up(i, j)) + 1) * (std::fabs(d(i, j)) + 1);
      };
      compare<T>(
          of, hidden, [&](int64_t i, int64_t j) { return at(i, j).value * up(i, j); }, size, unit,
          N);
      compare<T>(
          of + ", up", d_up, [&](int64_t i, int64_t j) { return at(i, j).value * d(i, j); }, size,
          unit, N);
      const Element to_gate = [&](int64_t i, int64_t j) {
        return at(i, j).derivative * d(i, j) * up(i, j);
      };
      compare<T>(of + ", gate", d_gate, to_gate, size, unit, N);
    }
  }
}

// ---- sums of rows of codes ----

void check_combine_codes(const StorageOps<float>& ops, int64_t M, bool bytes) {
  const int64_t N = 37, K = 192, col = 64, cols = 128, bits = 5;
  std::vector<uint8_t> data(N * K);
  std::vector<float> scale(N * K), values(16);
  std::normal_distribution<float> normal;
  for (uint8_t& byte : data) byte = static_cast<uint8_t>(generator());
  for (float& s : scale) s = normal(generator);
  for (float& v : values) v = normal(generator);
  const Codes codes = {data.data(), scale.data(), bytes ? nullptr : values.data(), bytes ? 0 : bits,
                       K};
  Matrix<float> left(M, N), out(M, cols);
  const Element weight = [&](int64_t n, int64_t j) {
    const int64_t at = n * K + col + j;
    if (bytes) return static_cast<double>(scale[n]) * static_cast<int8_t>(data[at]);
    const int code = at % 2 == 0 ? data[at / 2] >> 4 : data[at / 2] & 15;
    return static_cast<double>(scale[at >> bits]) * values[code];
  };
  ops.combine_codes(left.read(), codes, col, cols, out.view.data, out.view.row_stride);
  const Product product = {[&](int64_t i, int64_t n) { return left(i, n); }, weight, N};
  compare<float>(
      bytes ? "combine_codes of bytes" : "combine_codes", out,
      [&](int64_t i, int64_t j) { return product(i, j); },
      [&](int64_t i, int64_t j) { return product.size(i, j) + 10; }, (N + 8) * kUnit<float>, N);
}

void check(const Blocks& blocks) {
  for (const int64_t N : {1, 7, 16, 45}) {
    check_gated("float32", blocks.float32, 3, N);
    check_gated("float64", blocks.float64, 3, N);
    check_gated("bfloat16", blocks.bfloat16, 3, N);
    check_gated("float16", blocks.float16, 3, N);
  }
  for (int64_t M = 1; M <= 10; ++M) {
    check_combine_codes(blocks.float32, M, false);
    check_combine_codes(blocks.float32, M, true);
  }
  // Rows around a tile, depths around vectors and squares of them, columns around one and two
  // panels; last what has several of each: a wrong operation is found before, 2 s sooner.
  struct Size {
    int64_t M, K, N;
  };
  std::vector<Size> sizes = {{9, 1, 1}};
  for (const int64_t M : {1, 2, 3, 4, 8, 13}) {
    for (const int64_t K : {2, 15, 33, 80}) sizes.push_back({M, K, 3 * M + K % 32});
  }
  for (const int64_t N : {15, 16, 17, 32, 47, 64}) sizes.push_back({5, 31, N});
  sizes.push_back({70, 200, 100});
  for (const auto [M, K, N] : sizes) {
    check_storage("float32", blocks.float32, blocks.in_float, M, K, N);
    check_storage("float64", blocks.float64, blocks.in_double, M, K, N);
    check_storage("bfloat16", blocks.bfloat16, blocks.in_float, M, K, N);
    check_storage("float16", blocks.float16, blocks.in_float, M, K, N);
    if (blocks.pairs != nullptr) check_pairs(*blocks.pairs, M, K, N);
  }
}

bool can_run(std::string_view name) {
#if defined(__x86_64__) && !defined(LOWERED)
  if (name == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  if (name == "avx512") return __builtin_cpu_supports("avx512vl");
  if (name == "avx512_bf16") return __builtin_cpu_supports("avx512bf16");
#endif
  return true;
}

}  // namespace
}  // namespace lora_ext::cpu

int main(int count, char** arguments) {
  using namespace lora_ext::cpu;
  ends_at_the_first = count > 2;
  std::vector<const Blocks*> all = {&kBaselineBlocks};
#if defined(__x86_64__)
  for (const Blocks* blocks : {&kAvx2Blocks, &kAvx512Blocks, &kAvx512Bf16Blocks}) {
    all.push_back(blocks);
  }
#endif
  for (const Blocks* blocks : all) {
    if (std::string_view(blocks->name) != arguments[1]) continue;
    if (!can_run(blocks->name)) return 2;
    check(*blocks);
    return n_wrong > 0 ? 1 : 0;
  }
  std::printf("no instruction set %s\n", arguments[1]);
  return 1;
}
