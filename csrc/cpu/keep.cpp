// Dropout's mask as bits, (rows, ceil(cols / 8)) uint8: element k of a row is bit k % 8, the least
// significant first, of byte k / 8; bits past the end are 0.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "checks.h"
#include "cpu/tensors.h"
#include "operators.h"

namespace lora_ext {
namespace cpu {
namespace {

Tensor empty_bits(const Tensor& like, int64_t rows, int64_t cols) {
  return empty(like, {rows, ceil_div(cols, 8)}, aoti_torch_dtype_uint8());
}

// body(row, its bits) for all rows, in parallel.
template <typename F>
void for_each_row(const Tensor& bits, const F& body) {
  constexpr int64_t kLeastBytes = 1 << 12;  // worth a thread
  const int64_t rows = bits.size(0), bytes = std::max<int64_t>(bits.size(1), 1);
  auto* to = static_cast<uint8_t*>(bits.mutable_data_ptr());
  const int64_t least = ceil_div(kLeastBytes, bytes);
  for_each_part(rows, even_part(rows, rows, least, 1, num_threads()), [&](int64_t from, int64_t n) {
    for (int64_t row = from; row < from + n; ++row) body(row, to + row * bytes);
  });
}

// PyTorch's CPU generator, MT19937, as `torch.Generator.get_state` gives it.
struct GeneratorState {
  uint64_t seed;
  int32_t left, seeded;  // words left before the next twist, plus one
  uint64_t next;
  uint64_t words[kTwisterWords];
};

// Draws as that generator does, and puts its state back.
class Generator {
 public:
  explicit Generator(GeneratorState* state)
      : state_(*state), place_(kTwisterWords + 1 - state->left) {
    std::copy_n(state_.words, kTwisterWords, words_);
  }
  ~Generator() {
    std::copy_n(words_, kTwisterWords, state_.words);
    state_.left = static_cast<int32_t>(kTwisterWords + 1 - place_);
    state_.next = static_cast<uint64_t>(place_);
  }

  // `count` bytes, 1 with a probability of threshold / 2^53, else 0.
  void bernoulli(int64_t count, int64_t threshold, uint8_t* kept) {
    const MaskOps& ops = blocks().mask;
    while (count > 0) {
      const int64_t n = std::min((kTwisterWords - place_) / 2, count);
      ops.bernoulli(words_ + place_, n, threshold, kept);
      place_ += 2 * n;
      kept += n;
      if ((count -= n) == 0) return;
      if (place_ == kTwisterWords) {
        twist();
        continue;
      }
      const uint32_t last = words_[place_];
      twist();
      const uint32_t both[] = {last, words_[place_++]};
      ops.bernoulli(both, 1, threshold, kept++);
      --count;
    }
  }

 private:
  void twist() {
    blocks().mask.twist(words_);
    place_ = 0;
  }

  GeneratorState& state_;
  int64_t place_;
  uint32_t words_[kTwisterWords];
};

}  // namespace
}  // namespace cpu

Tensor draw_keep(const Tensor& seed, int64_t rows, int64_t cols, double p, int64_t first_column) {
  const Operand operand(seed);
  STD_TORCH_CHECK(operand.dim == 1 && operand.size(0) == 2 && operand.dtype == ScalarType::Long,
                  "seed must have shape (2,) and dtype Long, got ",
                  text_of(operand.sizes, operand.dim), " and ",
                  torch::headeronly::toString(operand.dtype));
  STD_TORCH_CHECK(rows >= 0 && cols >= 0, "rows and cols must not be negative, got ", rows, " and ",
                  cols);
  STD_TORCH_CHECK(p >= 0 && p <= 1, "p must be from 0 to 1, got ", p);
  check_memory("seed", operand);
  const auto* given = static_cast<const int64_t*>(operand.data());
  const int64_t seeds[] = {given[0], given[operand.stride(0)]};
  const cpu::Scratch<uint32_t> columns(cols);
  cpu::blocks().mask.columns(first_column, cols, seeds, columns.get());
  // Of 2^32 values the smallest p * 2^32 are dropped.
  const double dropped = std::min(std::nearbyint(std::ldexp(p, 32)), std::ldexp(1.0, 32) - 1);
  const auto threshold = static_cast<int32_t>(static_cast<int64_t>(dropped) - (int64_t{1} << 31));
  const Tensor bits = cpu::empty_bits(seed, rows, cols);
  cpu::for_each_row(bits, [&](int64_t row, uint8_t* to) {
    const uint32_t hash = cpu::mix(cpu::mix((row & 0xFFFFFFFF) ^ seeds[0]) ^ row >> 32 ^ seeds[1]);
    cpu::blocks().mask.draw(hash, columns.get(), cols, threshold, to);
  });
  return bits;
}

Tensor draw_bernoulli(const Tensor& state, int64_t rows, int64_t cols, double p) {
  const Operand operand(state);
  constexpr auto kBytes = static_cast<int64_t>(sizeof(cpu::GeneratorState));
  STD_TORCH_CHECK(operand.dim == 1 && operand.size(0) >= kBytes && operand.stride(0) == 1 &&
                      operand.dtype == ScalarType::Byte,
                  "state must be a CPU generator's, ", kBytes, " bytes or more, got ",
                  text_of(operand.sizes, operand.dim));
  STD_TORCH_CHECK(rows >= 0 && cols >= 0, "rows and cols must not be negative, got ", rows, " and ",
                  cols);
  STD_TORCH_CHECK(p >= 0 && p <= 1, "p must be from 0 to 1, got ", p);
  check_memory("state", operand);
  cpu::GeneratorState given;
  std::memcpy(&given, operand.data(), kBytes);
  STD_TORCH_CHECK(given.seeded == 1 && given.left >= 1 && given.left <= cpu::kTwisterWords,
                  "state must be one of MT19937, got ", given.left, " words left");
  const auto threshold = static_cast<int64_t>(std::ceil(std::ldexp(p, 53)));
  const Tensor bits = cpu::empty_bits(state, rows, cols);
  auto* to = static_cast<uint8_t*>(bits.mutable_data_ptr());
  const cpu::Scratch<uint8_t> kept(cols);
  {
    cpu::Generator generator(&given);
    for (int64_t row = 0; row < rows; ++row, to += bits.size(1)) {
      generator.bernoulli(cols, threshold, kept.get());
      cpu::blocks().mask.pack(kept.get(), 1, cols, to);
    }
  }
  if (rows * cols > 0) std::memcpy(state.mutable_data_ptr(), &given, kBytes);
  return bits;
}

Tensor pack_keep(const Tensor& mask) {
  const Operand operand(mask);
  STD_TORCH_CHECK(operand.dim == 2, "mask must have shape (M, in_features), got ",
                  text_of(operand.sizes, operand.dim));
  STD_TORCH_CHECK(operand.dtype == ScalarType::Bool || operand.dtype == ScalarType::Byte,
                  "mask must have dtype Bool or Byte, got ",
                  torch::headeronly::toString(operand.dtype));
  check_memory("mask", operand);
  const cpu::View<const uint8_t> from = cpu::matrix<uint8_t>(operand);
  const Tensor bits = cpu::empty_bits(mask, from.rows, from.cols);
  cpu::for_each_row(bits, [&](int64_t row, uint8_t* to) {
    cpu::blocks().mask.pack(from.data + row * from.row_stride, from.col_stride, from.cols, to);
  });
  return bits;
}

}  // namespace lora_ext
