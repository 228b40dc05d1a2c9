// Operands of the emulated kernels, in memory of exactly their size, and results held to sums in
// double.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <type_traits>
#include <vector>

#include "cuda/kernels.h"
#include "cuda/primitives.h"

namespace lora_ext::cuda {
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

}  // namespace
}  // namespace lora_ext::cuda
