// The block operation dot_codes (see blocks.h): dot products of few rows with a weight's rows of
// codes, without a decoded copy. Part of blocks_impl.h.
#pragma once

#include <cstdint>

#include "cpu/blocks.h"
#include "cpu/codes_impl.h"
#include "cpu/few_rows_impl.h"
#include "cpu/vectors.h"

namespace lora_ext::cpu {
namespace {

// kLeft rows, reordered, against columns [from, to) of kRows rows of codes, which are whole blocks.
// The codes go from memory to the sums: what they stand for is in registers alone.
template <typename Code, int kLeft, int kRows>
void dot_codes_tile(View<const float> left, const Codes& codes, int64_t row, int64_t from,
                    int64_t to, DotsTo<float> out) {
  constexpr int64_t lanes = kLanes<float>;
  constexpr int count = kLeft * kRows, near = kNear<float>;
  const int64_t block = Code::kHasBlocks ? int64_t{1} << codes.block_bits : to - from;
  FloatVector acc[kLeft][kRows] = {};
  for (int64_t k = from; k < to; k += block) {
    Code values[kRows];
    const uint8_t* at[kRows];
#pragma GCC unroll 4
    for (int j = 0; j < kRows; ++j) {
      const int64_t element = (row + j) * codes.width + k;
      const int64_t scale = Code::kHasBlocks ? element >> codes.block_bits : row + j;
      values[j] = Code(codes.values, codes.scale[scale]);
      at[j] = Code::address(codes, element);
    }
    const float* x = left.data + (k - from);
    for (int64_t i = 0; i < block; i += lanes, x += lanes) {
      FloatVector v[kRows];
#pragma GCC unroll 4
      for (int j = 0; j < kRows; ++j) v[j] = values[j].reordered_at(at[j] + Code::bytes_of(i));
#pragma GCC unroll 8
      for (int r = 0; r < kLeft; ++r) {
        const FloatVector factor = read<FloatVector>(x + r * left.row_stride);
#pragma GCC unroll 4
        for (int j = 0; j < kRows; ++j) acc[r][j] += factor * v[j];
      }
    }
  }
  float sums[(count + near - 1) / near * near];
#pragma GCC unroll 8
  for (int begin = 0; begin < count; begin += near) {
    FloatVector some[near];
#pragma GCC unroll 4
    for (int i = 0; i < near; ++i) {
      const int at = begin + i;
      some[i] = at < count ? acc[at / kRows][at % kRows] : FloatVector{};
    }
    sum_lanes<float>(some, sums + begin);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kLeft; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kRows; ++j) out.put(i, j, sums[i * kRows + j]);
  }
}

// kLeft rows, some columns, against all the rows of codes asked for.
template <typename Code, int kLeft, int kRows>
void dot_codes_rows(View<const float> left, const Codes& codes, int64_t row, int64_t rows,
                    int64_t from, int64_t to, DotsTo<float> out) {
  int64_t j = 0;
  for (; j + kRows <= rows; j += kRows) {
    dot_codes_tile<Code, kLeft, kRows>(left, codes, row + j, from, to, out.at(0, j));
  }
  if constexpr (kRows > 1) {
    if (j < rows) {
      dot_codes_rows<Code, kLeft, 1>(left, codes, row + j, rows - j, from, to, out.at(0, j));
    }
  }
}

// The same for up to kLeft rows. The sums and what they are made of fill 16 registers, or 32.
template <typename Code, int kLeft>
void dot_codes_of(View<const float> left, const Codes& codes, int64_t row, int64_t rows,
                  int64_t from, int64_t to, DotsTo<float> out) {
  constexpr int kSums = kVectorBytes == 64 ? 16 : 4;
  constexpr int kRows = kSums / kLeft > 4 ? 4 : kSums / kLeft > 1 ? kSums / kLeft : 1;
  if (left.rows == kLeft) {
    dot_codes_rows<Code, kLeft, kRows>(left, codes, row, rows, from, to, out);
  } else if constexpr (kLeft > 1) {
    dot_codes_of<Code, kLeft - 1>(left, codes, row, rows, from, to, out);
  }
}

template <typename Code>
void dot_whole_blocks(View<const float> left, const Codes& codes, int64_t row, int64_t rows,
                      float* out, int64_t ld) {
  // So many elements of `left` at a time stay in a first-level cache; but each time costs the sums
  // over lanes again.
  constexpr int64_t most = kVectorBytes == 64 ? 8 : 6, held = 8192, lanes = kLanes<float>;
  alignas(64) float reordered[held];
  const int64_t block = Code::kHasBlocks ? int64_t{1} << codes.block_bits : lanes;
  const int64_t tiles = (left.rows + most - 1) / most;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t i = left.rows * tile / tiles, count = left.rows * (tile + 1) / tiles - i;
    const int64_t step = held / count / block * block;
    for (int64_t k = 0; k < left.cols; k += step) {
      const int64_t cols = left.cols - k < step ? left.cols - k : step;
      for (int64_t r = 0; r < count; ++r) {
        const float* x = left.data + (i + r) * left.row_stride + k;
        for (int64_t at = 0; at < cols; at += lanes) {
          write(reordered + r * cols + at, Code::reordered(read<FloatVector>(x + at)));
        }
      }
      dot_codes_of<Code, most>({reordered, count, cols, cols, 1}, codes, row, rows, k, k + cols,
                               {out + i * ld, ld, 1, k > 0});
    }
  }
}

// Rows that end within a block or a vector: decoded, some columns of a few at a time.
template <typename T>
void dot_decoded(View<const float> left, const Codes& codes, int64_t row, int64_t rows, float* out,
                 int64_t ld) {
  constexpr int64_t kRows = 4, kCols = 1024;
  float decoded[kRows * kCols];
  for (int64_t j = 0; j < rows; j += kRows) {
    const int64_t n = rows - j < kRows ? rows - j : kRows;
    for (int64_t k = 0; k == 0 || k < left.cols; k += kCols) {
      const int64_t cols = left.cols - k < kCols ? left.cols - k : kCols;
      decode<T>(codes, {row + j, k, n, cols}, decoded, kCols);
      dot<float>(left.block(0, k, left.rows, cols), {decoded, n, cols, kCols, 1}, out + j, ld,
                 k > 0);
    }
  }
}

template <typename T>
void dot_codes(View<const float> left, const Codes& codes, int64_t row, int64_t rows, float* out,
               int64_t ld) {
  const int64_t whole = codes.values != nullptr ? int64_t{1} << codes.block_bits : kLanes<float>;
  if (kVectorBytes == 16 || left.cols % whole != 0 || left.cols == 0 || whole > 512) {
    dot_decoded<T>(left, codes, row, rows, out, ld);
  } else if (codes.values != nullptr) {
    dot_whole_blocks<Nibbles<T>>(left, codes, row, rows, out, ld);
  } else {
    dot_whole_blocks<Bytes<T>>(left, codes, row, rows, out, ld);
  }
}

}  // namespace
}  // namespace lora_ext::cpu
