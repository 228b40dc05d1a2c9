// A block's share of a product: out = left @ right.T for one tile of rows and columns, the factors
// streamed through a ring of tiles in shared memory.
#pragma once

#include <cstring>

#include "cuda/kernels.h"
#include "cuda/primitives.h"

namespace lora_ext::cuda {

// Which dimension of a factor lies contiguous in its shared tile, and in memory where a tile is to
// be copied 16 bytes at a time: the summed one (x, weight), or the other.
enum class Order { kDepthInner, kRowsInner };

// One side of left @ right.T, (rows, depth), summed over depth.
struct Factor {
  const void* data;
  int64_t rows, depth;
  int64_t row_stride, depth_stride;  // in elements
  bool in_chunks;                    // 16-byte chunks along the inner dimension are aligned
};

// The bits of a row of x from element k to the end of k's byte, that of k the lowest.
__device__ inline unsigned bits_from(const Bits& keep, int64_t row, int64_t k) {
  return keep.data[row * keep.row_stride + k / 8] >> k % 8;
}

// How a factor's (kRows, kDepth) tile lies in shared memory. The pitch is a chunk more than a row:
// 16-byte reads of 8 neighbouring rows then fall into different banks.
template <typename T, Order kOrder, int kRows, int kDepth>
struct SharedTile {
  static constexpr int kChunk = 16 / sizeof(T);
  static constexpr bool kDepthInner = kOrder == Order::kDepthInner;
  static constexpr int kInner = kDepthInner ? kDepth : kRows;
  static constexpr int kOuter = kDepthInner ? kRows : kDepth;
  static constexpr int kAcross = kInner / kChunk;
  static constexpr int kPitch = kInner + kChunk;
  static constexpr int kElements = kOuter * kPitch;

  static __device__ int offset(int row, int k) {
    return kDepthInner ? row * kPitch + k : k * kPitch + row;
  }

  // All threads of the block together. What lies past the factor's rows or past `end` is zero.
  template <int kThreads>
  static __device__ void load(T* tile, const Factor& from, int64_t row, int64_t k, int64_t end) {
    if (from.in_chunks) {
      for (int i = threadIdx.x; i < kOuter * kAcross; i += kThreads) {
        const Chunk chunk(from, i, row, k, end);
        copy_async(tile + chunk.to, static_cast<const T*>(from.data) + chunk.from,
                   chunk.valid * int(sizeof(T)));
      }
    } else {
      const int64_t step = kDepthInner ? from.depth_stride : from.row_stride;
#pragma unroll 1  // one chunk at a time, but its loads together: each takes 500 cycles or so
      for (int i = threadIdx.x; i < kOuter * kAcross; i += kThreads) {
        const Chunk chunk(from, i, row, k, end);
        T values[kChunk];
#pragma unroll
        for (int e = 0; e < kChunk; ++e) {
          assign(values[e], 0);
          if (e < chunk.valid) values[e] = static_cast<const T*>(from.data)[chunk.from + e * step];
        }
#pragma unroll
        for (int e = 0; e < kChunk; ++e) tile[chunk.to + e] = values[e];
      }
    }
  }

  // The mask of the chunks that `load` has one thread bring, for a factor that is x or x.T: its
  // inner dimension goes along x's rows, so that a chunk's bits are in one byte.
  template <int kThreads>
  class Kept {
   public:
    // Read the bits for the tile at (row, k).
    __device__ void load(const Bits& keep, const Factor& from, int64_t row, int64_t k,
                         int64_t end) {
#pragma unroll
      for (int n = 0; n < kChunks; ++n) {
        const Chunk chunk(from, threadIdx.x + n * kThreads, row, k, end);
        bits_[n] = chunk.valid ? bits_from(keep, chunk.outer, chunk.inner) : 0;
      }
    }

    // Zero what they leave out of the thread's own chunks, which are there.
    __device__ void apply(T* tile) const {
#pragma unroll
      for (int n = 0; n < kChunks; ++n) {
        const int i = threadIdx.x + n * kThreads;
        void* at = tile + i / kAcross * kPitch + i % kAcross * kChunk;
        void* chunk = __builtin_assume_aligned(at, 16);
        uint32_t words[4];
        std::memcpy(words, chunk, 16);
#pragma unroll
        for (int w = 0; w < 4; ++w) words[w] &= kept_word(w, bits_[n]);
        std::memcpy(chunk, words, 16);
      }
    }

   private:
    static constexpr int kChunks = kOuter * kAcross / kThreads;
    static_assert(kChunks * kThreads == kOuter * kAcross, "a thread has as many as the others");

    // What word w of a chunk keeps, all ones for an element whose bit is 1.
    static __device__ uint32_t kept_word(int w, unsigned bits) {
      if constexpr (sizeof(T) == 2) {
        const unsigned pair = bits >> 2 * w;
        return (pair & 1) * 0xFFFFu | (pair >> 1 & 1) * 0xFFFF0000u;
      } else {
        return (bits >> w * 4 / sizeof(T) & 1) * 0xFFFFFFFFu;
      }
    }

    unsigned bits_[kChunks] = {};
  };

 private:
  // Chunk i of the tile: its place there, that of its first element in the factor, and how many of
  // its elements the factor has.
  struct Chunk {
    int to, valid;
    int64_t outer, inner, from;

    __device__ Chunk(const Factor& factor, int i, int64_t row, int64_t k, int64_t end) {
      const int tile_outer = i / kAcross, tile_inner = i % kAcross * kChunk;
      row += kDepthInner ? tile_outer : tile_inner;
      k += kDepthInner ? tile_inner : tile_outer;
      outer = kDepthInner ? row : k;
      inner = kDepthInner ? k : row;
      const bool inside = kDepthInner ? row < factor.rows : k < end;
      const int64_t rest = kDepthInner ? end - k : factor.rows - row;
      to = tile_outer * kPitch + tile_inner;
      valid = !inside || rest <= 0 ? 0 : rest < kChunk ? static_cast<int>(rest) : kChunk;
      from = valid ? row * factor.row_stride + k * factor.depth_stride : 0;
    }
  };
};

// The sums of one thread: warps of (kWarpM, kWarpN) results, by matrix instructions.
template <typename T, int kM, int kN, int kWarpRows, int kWarpCols>
class MatrixTile {
 public:
  using Storage = T;
  static constexpr int kBlockM = kM, kBlockN = kN, kBlockK = 32, kStages = 3;
  static constexpr int kWarpM = kWarpRows, kWarpN = kWarpCols;
  static constexpr int kThreads = kM / kWarpM * (kN / kWarpN) * 32;

  // sums += left tile @ right tile.T
  template <typename Left, typename Right>
  __device__ void add_product(const T* left, const T* right) {
#pragma unroll
    for (int k = 0; k < kBlockK; k += 16) {
      uint32_t rows[kWarpM / 16][4], cols[kWarpN / 16][4];
#pragma unroll
      for (int i = 0; i < kWarpM / 16; ++i) load<Left>(rows[i], left, warp_row() + 16 * i, k);
#pragma unroll
      for (int j = 0; j < kWarpN / 16; ++j) load<Right>(cols[j], right, warp_col() + 16 * j, k);
#pragma unroll
      for (int i = 0; i < kWarpM / 16; ++i) {
#pragma unroll
        for (int j = 0; j < kWarpN / 8; ++j) {
          const auto& c = cols[j / 2];
          multiply_add(sums_[i][j], rows[i], c[j % 2], c[j % 2 + 2], T());
        }
      }
    }
  }

  // change(row, col, sum) for each of this thread's results, by their place in the tile.
  template <typename F>
  __device__ void for_each(const F& change) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kWarpM / 16; ++i) {
#pragma unroll
      for (int j = 0; j < kWarpN / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          change(warp_row() + 16 * i + lane / 4 + e / 2 * 8,
                 warp_col() + 8 * j + lane % 4 * 2 + e % 2, sums_[i][j][e]);
        }
      }
    }
  }

  // Write 16 rows of the warp's sums, from row 16 * slab of them on, to a (16, kPitch) matrix.
  static constexpr int kPitch = kWarpN + 8;  // two rows of a warp's pairs fall into other banks
  __device__ void put(int slab, float* to) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kWarpM / 16; ++i) {
      if (i != slab) continue;
#pragma unroll
      for (int j = 0; j < kWarpN / 8; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          alignas(8) const float pair[] = {sums_[i][j][2 * half], sums_[i][j][2 * half + 1]};
          copy_piece<8>(to + (lane / 4 + half * 8) * kPitch + 8 * j + lane % 4 * 2, pair);
        }
      }
    }
  }

  // Where the warp's results begin in the tile.
  static __device__ int warp_row() { return threadIdx.x / 32 / (kN / kWarpN) * kWarpM; }
  static __device__ int warp_col() { return threadIdx.x / 32 % (kN / kWarpN) * kWarpN; }

 private:
  // Rows row..row+15 at depths k..k+15: 8 x 8 quarters in the order of multiply_add's `left`. As
  // `right`, quarters 0 and 2 are the first 8 columns, 1 and 3 the next.
  template <typename Tile>
  static __device__ void load(uint32_t (&to)[4], const T* tile, int row, int k) {
    const int lane = threadIdx.x % 32, in_quarter = lane % 8;
    const int quarter_row = lane / 8 % 2 * 8, quarter_k = lane / 16 * 8;
    if constexpr (Tile::kDepthInner) {
      load_matrices<false>(to, tile + Tile::offset(row + quarter_row + in_quarter, k + quarter_k));
    } else {
      load_matrices<true>(to, tile + Tile::offset(row + quarter_row, k + quarter_k + in_quarter));
    }
  }

  float sums_[kWarpM / 16][kWarpN / 8][4] = {};
};

template <typename Tile, Order kLeft, Order kRight>
struct Ring {
  using T = typename Tile::Storage;
  using Left = SharedTile<T, kLeft, Tile::kBlockM, Tile::kBlockK>;
  using Right = SharedTile<T, kRight, Tile::kBlockN, Tile::kBlockK>;
  static constexpr int kSlot = Left::kElements + Right::kElements;
  static constexpr int kBytes = Tile::kStages * kSlot * int(sizeof(T));
};

// sums += left @ right.T over depths begin..end, for the tile at (row, col). With kMasked `left` is
// x or x.T, and of it only what `keep` keeps.
template <Order kLeft, Order kRight, bool kMasked = false, typename Tile>
__device__ void add_product(Tile& sums, const Factor& left, const Factor& right, int64_t row,
                            int64_t col, int64_t begin, int64_t end, const Bits& keep = {}) {
  using Ring = Ring<Tile, kLeft, kRight>;
  using Left = typename Ring::Left;
  using Right = typename Ring::Right;
  constexpr int kAhead = Tile::kStages - 1;
  auto* ring = static_cast<typename Tile::Storage*>(shared_memory());
  const int64_t steps = (end - begin + Tile::kBlockK - 1) / Tile::kBlockK;
  const auto slot = [&](int64_t step) { return ring + step % Tile::kStages * Ring::kSlot; };
  const auto load = [&](int64_t step) {
    if (step < steps) {
      const int64_t k = begin + step * Tile::kBlockK;
      Left::template load<Tile::kThreads>(slot(step), left, row, k, end);
      Right::template load<Tile::kThreads>(slot(step) + Left::kElements, right, col, k, end);
    }
    commit_copies();  // an empty group too: waiting counts groups
  };
  // The mask is put on a tile in shared memory, each thread on what it has copied there itself, so
  // that copies stay asynchronous. Its bits are read one step ahead.
  typename Left::template Kept<Tile::kThreads> kept;
  // Loads run ahead, written once: a second place for them costs nvcc 3 s an architecture.
#pragma unroll 1
  for (int64_t step = -kAhead; step < steps; ++step) {
    wait_for_copies<kAhead - 1>();
    if (kMasked && step >= 0) kept.apply(slot(step));
    barrier();  // all see this step's tiles, and are done with the slot that is filled next
    load(step + kAhead);
    if (kMasked && step >= -1) {
      kept.load(keep, left, row, begin + (step + 1) * Tile::kBlockK, end);
    }
    if (step >= 0) {
      sums.template add_product<Left, Right>(slot(step), slot(step) + Left::kElements);
    }
  }
}

}  // namespace lora_ext::cuda
