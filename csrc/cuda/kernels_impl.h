// The kernels: what a block computes of a launch. kernels.cu launches them, tile.h is a block's
// share of a product and epilogue.h what becomes of its sums.
#pragma once

#include "cuda/epilogue.h"
#include "cuda/kernels.h"
#include "cuda/tile.h"

namespace lora_ext::cuda {
namespace {

constexpr Order kDepthInner = Order::kDepthInner, kRowsInner = Order::kRowsInner;

struct Place {
  int64_t row, col;
};

// Where block blockIdx.x has its tile in `out`: down kGroup tiles of rows, then the next column of
// tiles. Blocks that run together then share both factors: of x (8192, 4096) and weight
// (4096, 4096) in 16 bits, 108 wide tiles read 8 + 14 MiB, and 64 + 2 down all rows.
constexpr int64_t kGroup = 8;
template <typename Tile>
__device__ Place place_of_block(const Result& out) {
  const int64_t down = (out.rows + Tile::kBlockM - 1) / Tile::kBlockM;
  const int64_t across = (out.cols + Tile::kBlockN - 1) / Tile::kBlockN;
  const int64_t first = blockIdx.x / (kGroup * across) * kGroup,
                in_group = blockIdx.x - first * across;
  const int64_t rows = down - first < kGroup ? down - first : kGroup;
  return {(first + in_group % rows) * Tile::kBlockM, in_group / rows * Tile::kBlockN};
}

struct LinearArguments {
  Factor left, right;          // x and weight; dy and weight.T
  Factor low_left, low_right;  // h and B.T; t and A
  Bits keep;                   // dx's, on the low-rank part
  double alpha;
  const void* bias;
  int64_t bias_stride;
  Result out;
};

// out = left @ right.T + alpha * keep * (low_left @ low_right.T) + bias, the low-rank part first:
// alpha and the mask then meet a sum in full precision, and one set of sums serves both products. A
// block has one tile.
template <typename Tile, Order kRight, Order kLowRight>
__device__ void linear_tile(const LinearArguments& a, const Bits& keep) {
  const auto [row, col] = place_of_block<Tile>(a.out);
  Epilogue<typename Tile::Storage, Tile> epilogue(a.out, row, col);
  epilogue.read(a.bias, a.bias_stride);  // it needs no result of the products
  Tile sums;
  add_product<kDepthInner, kLowRight>(sums, a.low_left, a.low_right, row, col, 0, a.low_left.depth);
  const auto alpha = static_cast<float>(a.alpha);
  sums.for_each([&](int, int, float& sum) { sum *= alpha; });
  if (keep.data != nullptr) {
    sums.for_each([&, row = row, col = col](int i, int j, float& sum) {
      const bool inside = row + i < a.out.rows && col + j < a.out.cols;
      if (inside && (bits_from(keep, row + i, col + j) & 1) == 0) sum = 0;
    });
  }
  add_product<kDepthInner, kRight>(sums, a.left, a.right, row, col, 0, a.left.depth);
  epilogue.write(sums);
}

// y (M, N) = x @ weight.T + alpha * h @ B + bias
template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1) lora_linear_fwd_kernel(LinearArguments a) {
  linear_tile<Tile, kDepthInner, kRowsInner>(a, {});
}

// dx (M, K) = dy @ weight + alpha * keep * (t @ A.T)
template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1) lora_linear_bwd_dx_kernel(LinearArguments a) {
  linear_tile<Tile, kRowsInner, kDepthInner>(a, a.keep);
}

struct ProductArguments {
  Factor left, right;
  Bits keep;  // on left
  double scale;
  int64_t depth_of_part;  // a multiple of every kBlockK
  int64_t out_part;       // elements of out from one part to the next
  Result out;
};

template <typename Out, typename Tile>
__device__ void write(const Tile& sums, int64_t row, int64_t col, const Result& out) {
  Epilogue<Out, Tile> epilogue(out, row, col);
  epilogue.read(nullptr, 0);
  epilogue.write(sums);
}

// out = scale * left @ right.T for few columns (h, t, dA, dB.T). Part blockIdx.y of the summed
// dimension writes its own sums, of float, and lora_linear_sum_parts_kernel adds them up.
template <typename Tile, Order kLeft, Order kRight, bool kMasked>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    lora_linear_product_kernel(ProductArguments a) {
  const auto [row, col] = place_of_block<Tile>(a.out);
  const int64_t begin = blockIdx.y * a.depth_of_part, end = begin + a.depth_of_part;
  Tile sums;
  add_product<kLeft, kRight, kMasked>(sums, a.left, a.right, row, col, begin,
                                      end < a.left.depth ? end : a.left.depth, a.keep);
  const auto scale = static_cast<float>(a.scale);
  sums.for_each([&](int, int, float& sum) { sum *= scale; });
  if (a.out.is_float) {
    a.out.data = static_cast<float*>(a.out.data) + blockIdx.y * a.out_part;
    write<float>(sums, row, col, a.out);
  } else {
    write<typename Tile::Storage>(sums, row, col, a.out);
  }
}

struct SumPartsArguments {
  const void* parts;  // (n_parts, rows, cols), dense
  int64_t n_parts;
  double scale;
  Result out;
};

constexpr int kThreads = 128;  // of the kernels whose threads have an element each

// out = scale * sum of the parts, in their order; a thread has one element.
template <typename T>
__global__ void __launch_bounds__(kThreads) lora_linear_sum_parts_kernel(SumPartsArguments a) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t count = a.out.rows * a.out.cols;
  if (i >= count) return;
  const auto* parts = static_cast<const float*>(a.parts);
  float sum = 0;
  for (int64_t part = 0; part < a.n_parts; ++part) sum += parts[part * count + i];
  sum *= static_cast<float>(a.scale);
  const int64_t at = i / a.out.cols * a.out.row_stride + i % a.out.cols * a.out.col_stride;
  if (a.out.is_float) {
    static_cast<float*>(a.out.data)[at] = sum;
  } else {
    assign(static_cast<T*>(a.out.data)[at], sum);
  }
}

struct MaskArguments {
  const void* from;
  int64_t row_stride, col_stride;  // of `from`
  Bits keep;
  double scale;
  Result out;
};

// out = scale * keep * from, or out += scale * keep * from; a thread has one element.
template <typename T>
__global__ void __launch_bounds__(kThreads) lora_linear_mask_kernel(MaskArguments a) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= a.out.rows * a.out.cols) return;
  const int64_t row = i / a.out.cols, col = i % a.out.cols;
  T& to = static_cast<T*>(a.out.data)[row * a.out.row_stride + col * a.out.col_stride];
  T value = 0;
  if (a.keep.data == nullptr || (bits_from(a.keep, row, col) & 1) != 0) {
    const T from = static_cast<const T*>(a.from)[row * a.row_stride + col * a.col_stride];
    value = static_cast<T>(a.scale) * from;
  }
  to = a.out.add ? to + value : value;
}

}  // namespace
}  // namespace lora_ext::cuda
