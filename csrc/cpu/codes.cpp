// Weights of codes: what the codes stand for, and a weight's as the block operations take them.
#include "cpu/tensors.h"

namespace lora_ext::cpu {
namespace {

// Quantiles of a normal distribution, by Dettmers et al., "QLoRA", arXiv:2305.14314, appendix E.
constexpr float kNf4Values[16] = {-1.0f,
                                  -0.6961928009986877f,
                                  -0.5250730514526367f,
                                  -0.39491748809814453f,
                                  -0.28444138169288635f,
                                  -0.18477343022823334f,
                                  -0.09105003625154495f,
                                  0.0f,
                                  0.07958029955625534f,
                                  0.16093020141124725f,
                                  0.24611230194568634f,
                                  0.33791524171829224f,
                                  0.44070982933044434f,
                                  0.5626170039176941f,
                                  0.7229568362236023f,
                                  1.0f};
// A sign, two bits of exponent and one of mantissa, scaled to 1, as bitsandbytes numbers them.
constexpr float kFp4Values[16] = {0.0f,      1.0f / 192, 2.0f / 3,  1.0f,        1.0f / 3,  0.5f,
                                  1.0f / 6,  0.25f,      -0.0f,     -1.0f / 192, -2.0f / 3, -1.0f,
                                  -1.0f / 3, -0.5f,      -1.0f / 6, -0.25f};

}  // namespace

Codes codes_of(const Weight& weight, int64_t N, int64_t K) {
  Codes codes;
  codes.data = static_cast<const uint8_t*>(weight.data.data());
  codes.scale = static_cast<const float*>(weight.scale.data());
  codes.width = K;
  if (weight.format == Format::kInt8) return codes;
  codes.values = weight.format == Format::kNf4 ? kNf4Values : kFp4Values;
  codes.block_bits = block_bits_of(weight, N * K);
  return codes;
}

}  // namespace lora_ext::cpu
