// The module lora_ext._C. Loading it registers the CPU kernels (cpu/register.cpp); its
// functions tell how it was built and which way products go.
#undef TORCH_TARGET_VERSION  // pybind11 as torch 2.11 carries it refuses to be included next to it
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include <chrono>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/isa.h"
#include "cpu/route.h"
#include "cpu/split.h"

namespace {

namespace py = pybind11;
using namespace lora_ext::cpu;

const Routes* lines_of_this_machine() {
  static const Routes lines[] = {routes<float>(), routes<double>(), routes<BFloat16>(),
                                 routes<Float16>()};
  return lines;
}

const Routes& line_of(const std::string& dtype) {
  for (const Routes* line = lines_of_this_machine(); line < lines_of_this_machine() + 4; ++line) {
    if (dtype == line->dtype) return *line;
  }
  throw std::invalid_argument("dtype must be float32, float64, bfloat16 or float16, got " + dtype);
}

// The dtypes whose base product is ours.
py::list own_products() {
  py::list own;
  for (const char* dtype : {"float32", "float64", "bfloat16", "float16"}) {
    if (!line_of(dtype).library_base) own.append(dtype);
  }
  return own;
}

py::dict ways() {
  py::dict result;
  for (int product = 0; product < kProducts; ++product) {
    py::list names;
    for (int way = 0; way < kWays; ++way) {
      if (goes(static_cast<Way>(way), static_cast<Product>(product))) names.append(kWayNames[way]);
    }
    result[kProductNames[product]] = names;
  }
  return result;
}

py::dict route(const std::string& dtype) {
  const Routes& line = line_of(dtype);
  py::dict result;
  result["isa"] = line.isa;
  result["cpu"] = line.cpu;
  result["dtype"] = line.dtype;
  result["library_base"] = line.library_base;
  result["strip_rows"] = line.strip_rows;
  result["dot_rows"] = line.dot_rows;
  result["dot_depth"] = line.dot_depth;
  result["stream_rows"] = line.stream_rows;
  result["library_dweight"] = line.library_dweight;
  result["library_shrink"] = line.library_shrink;
  result["library_expand"] = line.library_expand;
  result["library_gradient"] = line.library_gradient;
  result["pairs"] = line.pairs;
  return result;
}

const char* way(const std::string& product, const std::string& dtype, int64_t M, int64_t depth,
                int64_t R) {
  const Way chosen = way_of(line_of(dtype), product_named(product), {M, depth, R});
  return kWayNames[static_cast<int>(chosen)];
}

py::tuple tiles(int64_t rows, int64_t cols, int64_t threads) {
  const Tiling tiling = tiles_for(rows, cols, kStripCols, kLeastRows, threads);
  return py::make_tuple(tiling.rows, tiling.cols);
}

// The interpreter is held from the look at the state to its change, so no Python thread begins a
// draw in between. One that let go of it just before may be on its way to the generator's own lock,
// which PyTorch's stable ABI does not give: `wait_us` is for it to arrive.
bool step_generator(const py::object& generator, const py::object& before, const py::object& after,
                    double wait_us) {
  using clock = std::chrono::steady_clock;
  const auto until = clock::now() + std::chrono::duration<double, std::micro>(wait_us);
  while (wait_us > 0 && clock::now() < until) continue;
  const auto bytes_of = [](const py::object& state) {
    return reinterpret_cast<const void*>(state.attr("data_ptr")().cast<uintptr_t>());
  };
  const py::object now = generator.attr("get_state")();
  const auto count = before.attr("numel")().cast<size_t>();
  if (now.attr("numel")().cast<size_t>() != count ||
      std::memcmp(bytes_of(now), bytes_of(before), count) != 0) {
    return false;
  }
  generator.attr("set_state")(after);
  return true;
}

py::dict build_info() {
  py::dict info;
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
  module.def("step_generator", &step_generator, py::arg("generator"), py::arg("before"),
             py::arg("after"), py::arg("wait_us"),
             "Change the state of a torch.Generator from `before` to `after`; return False, and "
             "change nothing, where it is not `before` any more.");
  module.def("ways", &ways,
             "Return {product: the ways it can go}, for force_way (csrc/cpu/route.h).");
  module.def("route", &route, py::arg("dtype"),
             "Return the line of the table of routes for this machine and a dtype.");
  module.def("way", &way, py::arg("product"), py::arg("dtype"), py::arg("M"), py::arg("depth"),
             py::arg("R"),
             "Return the way that a product of M rows and rank R, summed over depth, takes, its "
             "layout allowing.");
  module.def(
      "force_way", &force_way, py::arg("product"), py::arg("way"),
      "For measuring: make a product go one way in all calls of this process that can go it; "
      "None undoes it.");
  module.def("force_pairs", &force_pairs, py::arg("pairs"),
             "For measuring and for tests: have bfloat16 multiplied by pairs or widened to float "
             "in all calls of this process; None undoes it. Panels that pack_weight made before "
             "are then refused.");
  module.def("takes_pairs", &takes_pairs,
             "Return whether products of bfloat16 take pairs, by the table or as forced.");
  module.def("even_part", &even_part, py::arg("size"), py::arg("most"), py::arg("least"),
             py::arg("multiple"), py::arg("threads"),
             "Return the size of the parts that a size is split into (csrc/cpu/split.h).");
  module.def("tiles", &tiles, py::arg("rows"), py::arg("cols"), py::arg("threads"),
             "Return rows and columns of the tiles that a large product is cut into.");
}
