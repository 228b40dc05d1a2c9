// The module lora_ext._C. Loading it registers the CPU kernels (cpu/register.cpp); its one function
// tells how it was built.
#undef TORCH_TARGET_VERSION  // pybind11 as torch 2.11 carries it refuses to be included beside it
#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include "cpu/isa.h"

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["torch"] = TORCH_VERSION;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "g++ " __VERSION__;
#endif
  info["cuda"] = LORA_EXT_BUILT_CUDA;
  info["cpu_isa"] = lora_ext::cpu::blocks().name;
  pybind11::list own;
  if (!lora_ext::cpu::library_product_is_faster<float>()) own.append("float32");
  if (!lora_ext::cpu::library_product_is_faster<double>()) own.append("float64");
  if (!lora_ext::cpu::library_product_is_faster<lora_ext::cpu::BFloat16>()) own.append("bfloat16");
  if (!lora_ext::cpu::library_product_is_faster<lora_ext::cpu::Float16>()) own.append("float16");
  info["own_products"] = own;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "C++ kernels of lora_ext.";
  module.def(
      "build_info", &build_info,
      "Return the torch version and compiler that this was built with, the CUDA toolkit "
      "and architectures of lora_ext._cuda or none, the instruction set that the CPU kernels "
      "use on this machine, and the dtypes whose base product is theirs there.");
}
