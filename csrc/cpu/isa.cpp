#include "cpu/isa.h"

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string_view>

namespace lora_ext::cpu {
namespace {

const Blocks& choose() {
  const char* variable = std::getenv("LORA_EXT_CPU_ISA");
  const std::string_view cap = variable != nullptr ? variable : "avx512";
  STD_TORCH_CHECK(cap == "baseline" || cap == "avx2" || cap == "avx512",
                  "LORA_EXT_CPU_ISA must be baseline, avx2 or avx512, got ", cap);
#if defined(__x86_64__)
  if (cap == "avx512" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return kAvx512Blocks;
  }
  if (cap != "baseline" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    return kAvx2Blocks;
  }
#endif
  return kBaselineBlocks;
}

}  // namespace

const Blocks& blocks() {
  static const Blocks& chosen = choose();
  return chosen;
}

}  // namespace lora_ext::cpu
