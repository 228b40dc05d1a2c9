// The module lora_ext._C. Loading it registers the CPU kernels (cpu/register.cpp); its one function
// tells how it was built.
#undef TORCH_TARGET_VERSION  // pybind11 as torch 2.11 carries it refuses to be included beside it
#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include "cpu/isa.h"
#include "cpu/route.h"
#include "cpu/split.h"

namespace {

using namespace lora_ext::cpu;

// The dtypes whose base product is ours.
pybind11::list own_products() {
  pybind11::list own;
  for (const Routes* line :
       {&routes<float>(), &routes<double>(), &routes<BFloat16>(), &routes<Float16>()}) {
    if (!line->library_base) own.append(line->dtype);
  }
  return own;
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["torch"] = TORCH_VERSION;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "g++ " __VERSION__;
#endif
  info["cuda"] = LORA_EXT_BUILT_CUDA;
  info["cpu_isa"] = blocks().name;
  info["own_products"] = own_products();
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
