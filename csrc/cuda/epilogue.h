// What becomes of a tile's sums: bias and what is there already are added, and they are written.
#pragma once

#include "cuda/kernels.h"
#include "cuda/primitives.h"

namespace lora_ext::cuda {

// Where results go. With `add` they are added to what is there.
struct Result {
  void* data;
  int64_t rows, cols;
  int64_t row_stride, col_stride;
  bool is_float, add;
};

// The results of a tile at (row, col) of `out`, of dtype Out, in two phases: first all that is read
// is asked for, so that its loads are under way together, and last all is written. In between the
// sums go through shared memory, 16 rows of a warp at a time: a lane then has neighbours in a row,
// and reads and writes 16 bytes of them at once, or 4 where `out` is aligned to no more.
template <typename Out, typename Tile>
class Epilogue {
 public:
  __device__ Epilogue(const Result& out, int64_t row, int64_t col)
      : out_(out),
        row_(row + Tile::warp_row()),
        col_(col + Tile::warp_col() + lane() % kAcross * kChunk),
        piece_(piece_of(out)) {}

  // Phase 1; `bias` is null for none.
  __device__ void read(const void* bias, int64_t bias_stride) {
    using T = typename Tile::Storage;
#pragma unroll
    for (int e = 0; e < kChunk; ++e) {
      const bool inside = bias != nullptr && col_ + e < out_.cols;
      bias_[e] = inside ? widen(static_cast<const T*>(bias)[(col_ + e) * bias_stride]) : 0;
    }
    if (!out_.add) return;
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
#pragma unroll
      for (int n = 0; n < kPerLane; ++n) {
        move(slab, n, [&](auto bytes, int e, Out* at) {
          copy_piece<decltype(bytes)::value>(&base_[slab][n][e], at);
        });
      }
    }
  }

  // Phase 2, all threads of the block together. The tiles in shared memory are done with.
  __device__ void write(const Tile& sums) {
    barrier();
    float* rows = static_cast<float*>(shared_memory()) + threadIdx.x / 32 * 16 * Tile::kPitch;
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
      sums.put(slab, rows);
      warp_barrier();
      write_slab(slab, rows);
      warp_barrier();
    }
  }

  static constexpr int kBytes = Tile::kThreads / 32 * 16 * Tile::kPitch * int(sizeof(float));

 private:
  static constexpr int kChunk = 16 / sizeof(Out), kAcross = Tile::kWarpN / kChunk;
  static constexpr int kSlabs = Tile::kWarpM / 16, kPerLane = 16 * kAcross / 32;
  static_assert(kPerLane * 32 == 16 * kAcross, "a lane has as many chunks as the others");

  template <int kValue>
  struct Bytes {
    static constexpr int value = kValue;
  };

  static __device__ int lane() { return threadIdx.x % 32; }
  static __device__ int row_of(int n) { return (n * 32 + lane()) / kAcross; }

  // What every row of `out` can be moved in: 16 or 4 bytes, or with 0 one element after the other.
  static __device__ int piece_of(const Result& out) {
    const uint64_t at = reinterpret_cast<uint64_t>(out.data) | out.row_stride * sizeof(Out);
    return out.col_stride != 1 ? 0 : at % 16 == 0 ? 16 : at % 4 == 0 ? 4 : 0;
  }

  // copy(bytes, e, at) for each piece, from element e on, of chunk n of a slab that `out` has.
  template <typename F>
  __device__ void move(int slab, int n, const F& copy) {
    const int64_t i = row_ + 16 * slab + row_of(n), rest = out_.cols - col_;
    if (i >= out_.rows || rest <= 0) return;
    Out* at = static_cast<Out*>(out_.data) + i * out_.row_stride + col_ * out_.col_stride;
    if (piece_ == 16 && rest >= kChunk) {
      copy(Bytes<16>(), 0, at);
      return;
    }
    constexpr int kPair = 4 / sizeof(Out);
#pragma unroll
    for (int pair = 0; pair < kChunk; pair += kPair) {
      if (piece_ != 0 && pair + kPair <= rest) {
        copy(Bytes<4>(), pair, at + pair);
        continue;
      }
#pragma unroll
      for (int e = pair; e < pair + kPair; ++e) {
        if (e < rest) copy(Bytes<sizeof(Out)>(), e, at + e * out_.col_stride);
      }
    }
  }

  __device__ void write_slab(int slab, const float* rows) {
#pragma unroll
    for (int n = 0; n < kPerLane; ++n) {
      const float* from = rows + row_of(n) * Tile::kPitch + lane() % kAcross * kChunk;
      alignas(16) float sums[kChunk] = {};
      alignas(16) Out values[kChunk];
#pragma unroll
      for (int e = 0; e < kChunk; e += 4) copy_piece<16>(sums + e, from + e);
#pragma unroll
      for (int e = 0; e < kChunk; ++e) {
        const float base = out_.add ? widen(base_[slab][n][e]) : 0;
        assign(values[e], sums[e] + bias_[e] + base);
      }
      move(slab, n,
           [&](auto bytes, int e, Out* at) { copy_piece<decltype(bytes)::value>(at, &values[e]); });
    }
  }

  const Result& out_;
  const int64_t row_, col_;
  const int piece_;
  float bias_[kChunk] = {};
  alignas(16) Out base_[kSlabs][kPerLane][kChunk];
};

}  // namespace lora_ext::cuda
