#include "cpu/isa.h"

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string_view>

namespace lora_ext::cpu {
namespace {

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

const Blocks& choose() {
  const char* variable = std::getenv("LORA_EXT_CPU_ISA");
  const std::string_view cap = variable != nullptr ? variable : "";
  STD_TORCH_CHECK(variable == nullptr || cap == "baseline" || cap == "avx2" || cap == "avx512" ||
                      cap == "avx512_bf16",
                  "LORA_EXT_CPU_ISA must be baseline, avx2, avx512 or avx512_bf16, got ", cap);
#if defined(__x86_64__)
  if ((cap == "" || cap == "avx512_bf16") && has_avx512_bf16()) return kAvx512Bf16Blocks;
  if (cap != "baseline" && cap != "avx2" && has_avx512()) return kAvx512Blocks;
  if (cap != "baseline" && has_avx2()) return kAvx2Blocks;
#endif
  return kBaselineBlocks;
}

}  // namespace

const Blocks& blocks() {
  static const Blocks& chosen = choose();
  return chosen;
}

}  // namespace lora_ext::cpu
