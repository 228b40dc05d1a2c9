// Checks the operations on bfloat16 by pairs (PairOps in csrc/cpu/blocks.h), see check_blocks.cpp.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/blocks.h"
#include "matrices.h"

namespace lora_ext::cpu {
namespace {

// What a number of T becomes in a pair.
template <typename T>
double rounded(T v) {
  BFloat16 result;
  assign(value_of(v), &result);
  return value_of(result);
}

// The products of pairs made of matrices of T, of every layout.
template <typename T>
void check_pairs_from(const char* name, const PairLoadOps<T>& from, const PairOps& ops, int64_t M,
                      int64_t K, int64_t N) {
  const std::string of = std::string("pairs from ") + name + " ";
  const double unit = (static_cast<double>(K) + 8) * kUnit<float>;
  const Pair infinite = {{0x7f80}, {0x7f80}};
  const int64_t pairs = pairs_of(K);
  for (const Layout left : kLayouts) {
    for (const Layout right : kLayouts) {
      Matrix<T> x(M, K, left), w(K, N, right);
      std::vector<Pair> memory(M * pairs, infinite);
      std::vector<Pair> packed(pairs * round_up_to_panel<Pair>(N), infinite);
      View<const Pair> a = {memory.data(), M, pairs, pairs, 1};
      if (left == Layout::kColumns) {
        from.load_transposed(x.read(), memory.data(), M);
        a = {memory.data(), M, pairs, 1, M};
      } else {
        from.load(x.read(), memory.data(), pairs);
      }
      from.pack(w.read(), packed.data());
      const auto panels = Panels<const Pair>::packed(packed.data(), pairs);
      const Product product = {[&](int64_t i, int64_t k) { return rounded(x.at(i, k)); },
                               [&](int64_t k, int64_t j) { return rounded(w.at(k, j)); }, K};
      const Element size = [&](int64_t i, int64_t j) { return product.size(i, j) + 10; };
      Matrix<float> c(M, N), bias(1, N);
      ops.products.multiply(a, panels, N, c.view.data, c.view.row_stride, 1.5f, {bias.view.data, 0},
                            {}, {});
      compare<float>(
          of + "multiply", c,
          [&](int64_t i, int64_t j) { return 1.5 * product(i, j) + bias(0, j); }, size, 2 * unit,
          K);
      ops.products.multiply(a, panels, N, c.view.data, c.view.row_stride, 1.5f, {}, {},
                            {a, panels});
      compare<float>(
          of + "multiply, with another along", c,
          [&](int64_t i, int64_t j) { return 3 * product(i, j); }, size, 3 * unit, K);
      Matrix<BFloat16> y(M, N);
      Matrix<BFloat16> before = y;
      before.view.data = before.memory.data() + 1;
      ops.update(a, panels, 1.5f, y.view);
      compare<BFloat16>(
          of + "update", y,
          [&](int64_t i, int64_t j) { return before(i, j) + 1.5 * product(i, j); }, size, 2 * unit,
          K);
    }
  }
}

void check_pairs(const PairOps& ops, int64_t M, int64_t K, int64_t N) {
  check_pairs_from<BFloat16>("bfloat16", ops.from_bfloat16, ops, M, K, N);
  check_pairs_from<float>("float", ops.from_float, ops, M, K, N);
  const double unit = (static_cast<double>(K) + 8) * kUnit<float>;
  Matrix<BFloat16> x(M, K), w(K, N), wt(N, K);
  Matrix<float> out(M, N);
  const Element x_at = [&](int64_t i, int64_t k) { return x(i, k); };
  const Product dots = {x_at, [&](int64_t k, int64_t j) { return wt(j, k); }, K};
  for (const bool add : {false, true}) {
    ops.dot(x.read(), wt.read(), out.view.data, out.view.row_stride, 1.5f, add);
    compare<float>(
        add ? "dot of pairs, added" : "dot of pairs", out,
        [&](int64_t i, int64_t j) { return (add ? 3 : 1.5) * dots(i, j); },
        [&](int64_t i, int64_t j) { return dots.size(i, j) + 10; }, 4 * unit, K);
  }
  std::vector<Pair> left(M * pairs_of(K));
  ops.from_bfloat16.load(x.read(), left.data(), pairs_of(K));
  ops.combine_rows({left.data(), M, pairs_of(K), pairs_of(K), 1}, w.read(), out.view.data,
                   out.view.row_stride);
  const Product product = {x_at, [&](int64_t k, int64_t j) { return w(k, j); }, K};
  compare<float>(
      "combine_rows of pairs", out, [&](int64_t i, int64_t j) { return product(i, j); },
      [&](int64_t i, int64_t j) { return product.size(i, j) + 10; }, unit, K);
}

}  // namespace
}  // namespace lora_ext::cpu
