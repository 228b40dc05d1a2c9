// Matrices of every storage type, and what they are held to: loops in double.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu/blocks.h"

namespace lora_ext::cpu {
namespace {

#if defined(__aarch64__)  // g++ 12 has no _Float16 in C++ there
using Half = __fp16;
#else
using Half = _Float16;
#endif

double value_of(float v) { return v; }
double value_of(double v) { return v; }
double value_of(BFloat16 v) {
  const uint32_t bits = uint32_t{v.bits} << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
double value_of(Float16 v) {
  Half f;
  std::memcpy(&f, &v, 2);
  return static_cast<float>(f);
}

void assign(double v, float* to) { *to = static_cast<float>(v); }
void assign(double v, double* to) { *to = v; }
void assign(double v, BFloat16* to) {
  const float f = static_cast<float>(v);
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  to->bits = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
void assign(double v, Float16* to) {
  const Half f = static_cast<Half>(static_cast<float>(v));
  std::memcpy(to, &f, 2);
}

template <typename T>
constexpr double kUnit = std::is_same_v<T, double>     ? 0x1p-53
                         : std::is_same_v<T, float>    ? 0x1p-24
                         : std::is_same_v<T, BFloat16> ? 0x1p-9
                                                       : 0x1p-11;

std::mt19937 generator(1);

enum class Layout { kRows, kColumns, kNeither };
constexpr Layout kLayouts[] = {Layout::kRows, Layout::kColumns, Layout::kNeither};

// A matrix with its memory. What surrounds the elements is infinite: read, it shows.
template <typename T>
struct Matrix {
  std::vector<T> memory;
  View<T> view;

  Matrix(int64_t rows, int64_t cols, Layout layout = Layout::kRows, int64_t spare = 3) {
    const int64_t step = layout == Layout::kNeither ? 2 : 1;
    const bool by_rows = layout != Layout::kColumns;
    const int64_t ld = step * (by_rows ? cols : rows) + spare;
    memory.resize((by_rows ? rows : cols) * ld + 1);
    for (T& element : memory) assign(std::numeric_limits<double>::infinity(), &element);
    view = {memory.data() + 1, rows, cols, by_rows ? ld : step, by_rows ? step : ld};
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols; ++j) assign(normal(generator), &at(i, j));
    }
  }
  T& at(int64_t i, int64_t j) { return view.data[i * view.row_stride + j * view.col_stride]; }
  double operator()(int64_t i, int64_t j) { return value_of(at(i, j)); }
  View<const T> read() const {
    return {view.data, view.rows, view.cols, view.row_stride, view.col_stride};
  }
};

using Element = std::function<double(int64_t, int64_t)>;

int n_wrong = 0;
bool ends_at_the_first = false;

void wrong(const std::string& what, int64_t rows, int64_t cols, int64_t depth) {
  if (++n_wrong < 20) {
    std::printf("%s: rows %ld, cols %ld, depth %ld\n", what.c_str(), rows, cols, depth);
  }
  if (ends_at_the_first) std::exit(1);
}

// out (rows, cols) must be want up to `units` of T's rounding of what is summed, and memory next
// to its rows may not have changed.
template <typename T>
void compare(const std::string& what, Matrix<T>& out, const Element& want, const Element& size,
             double unit, int64_t depth) {
  const auto [data, rows, cols, row_stride, col_stride] = out.view;
  bool right = true;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) {
      const double value = want(i, j), error = std::fabs(out(i, j) - value);
      right = right && error <= unit * size(i, j) + 2 * kUnit<T> * std::fabs(value);
    }
    // The spare elements behind a dense row.
    if (col_stride == 1) right = right && std::isinf(value_of(data[i * row_stride + cols]));
  }
  if (!right) wrong(what, rows, cols, depth);
}

// The product of two matrices: element, and sum of magnitudes. Each is summed once, from operands
// that may not change: two thirds of the time would go into sums that several results share.
struct Product {
  struct Sums {
    double value, size;
  };

  Element left, right;
  int64_t depth;
  mutable std::vector<std::vector<Sums>> rows = {};

  double operator()(int64_t i, int64_t j) const { return sums(i, j).value; }
  double size(int64_t i, int64_t j) const { return sums(i, j).size; }

 private:
  const Sums& sums(int64_t i, int64_t j) const {
    while (static_cast<int64_t>(rows.size()) <= i) rows.emplace_back();
    std::vector<Sums>& row = rows[i];
    while (static_cast<int64_t>(row.size()) <= j) {
      Sums sums = {};
      for (int64_t k = 0; k < depth; ++k) {
        const double term = left(i, k) * right(k, row.size());
        sums.value += term;
        sums.size += std::fabs(term);
      }
      row.push_back(sums);
    }
    return row[j];
  }
};

}  // namespace
}  // namespace lora_ext::cpu
