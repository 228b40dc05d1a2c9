// The module lora_ext._C. Loading it registers the CPU kernels; its one function tells how it was
// built.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/version.h>

#include <string>

#include "cpu/isa.h"
#include "lora_linear.h"

STABLE_TORCH_LIBRARY_IMPL(lora_ext, CPU, library) {
  library.impl("lora_linear_fwd", TORCH_BOX(&lora_ext::lora_linear_fwd_cpu));
  library.impl("lora_linear_bwd", TORCH_BOX(&lora_ext::lora_linear_bwd_cpu));
}

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["torch"] = TORCH_VERSION;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "g++ " __VERSION__;
#endif
  info["cpu_isa"] = lora_ext::cpu::blocks().name;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "C++ kernels of lora_ext.";
  module.def("build_info", &build_info,
             "Return the torch version and compiler that this was built with, and the instruction "
             "set that the CPU kernels use on this machine.");
}
