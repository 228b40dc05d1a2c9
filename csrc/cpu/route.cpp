#include "cpu/route.h"

#include <torch/headeronly/util/Exception.h>

#include <cstring>

#include "cpu/isa.h"

namespace lora_ext::cpu {
namespace {

// The first line that fits is taken. What each rests on:
constexpr Routes kTable[] = {
    // AVX2: our strips run at the rate of MKL's GEMM or above and take the low-rank part along. Of
    // a 16-bit dtype PyTorch's fallback reaches a tenth of it. Double is level. Dot products win to
    // 32 rows. dweight reads dy down its columns: MKL's is faster in float.
    {"avx2", "", "float32", false, 0, 32, 20, 4, true, kNever, kNever, kNever},
    {"avx2", "", "float64", true, 32, 32, 20, 4, true, kNever, kNever, kNever},
    {"avx2", "", "bfloat16", false, 0, 32, 20, 4, false, kNever, kNever, kNever},
    {"avx2", "", "float16", false, 0, 32, 20, 4, false, kNever, kNever, kNever},
    // AMD's CPUs multiply pairs at the rate of floats, which is twice as many elements. oneDNN's
    // dweight is faster, most for few rows: ours reads dy down its columns.
    {"avx512_bf16", "amd", "bfloat16", false, 0, 32, 20, 4, true, kNever, kNever, kNever, true},
    // AMX multiplies bfloat16 at 16 times the rate of float32, and only PyTorch's products use it.
    {"avx512", "amx-bf16", "bfloat16", true, 2, 2, 20, 4, true, 1, 1, 1},
    // Intel: MKL runs at the rate of the CPU, the products of rank R too, but up to 48 rows dot
    // products are faster. Without AMX, oneDNN's bfloat16 runs at half of MKL's float32, and strips
    // of ours beat it from 4 rows on.
    {"avx512", "intel", "float32", true, 2, 48, 20, 4, true, 1, 1, 1},
    {"avx512", "intel", "float64", true, 2, 2, 20, 4, true, 1, 1, 1},
    {"avx512", "intel", "bfloat16", false, 0, 8, 20, 16, false, kNever, kNever, kNever},
    // With AVX512-FP16 oneDNN multiplies float16; our products of rank R win while R is low.
    {"avx512", "avx512fp16", "float16", true, 2, 2, 20, 4, true, 64, 64, 64},
    // AMD: our strips run at 0.92 of the CPU's rate, MKL's GEMM at 0.83; 4 x 4 dot products win to
    // 64 rows. PyTorch makes float16 at a fifth of our rate, and dx at a thirtieth.
    {"avx512", "amd", "float32", false, 0, 64, 8, 4, true, kNever, kNever, kNever},
    {"avx512", "amd", "float16", false, 0, 64, 20, 16, false, kNever, kNever, kNever},
    {"avx512", "", "float16", false, 0, 2, 20, 4, false, kNever, kNever, kNever},
    // Others with AVX-512: PyTorch hands bfloat16 to oneDNN.
    {"avx512", "", "float32", true, 2, 2, 20, 4, true, kNever, kNever, kNever},
    {"avx512", "", "float64", true, 2, 2, 20, 4, true, kNever, kNever, kNever},
    {"avx512", "", "bfloat16", true, 2, 2, 20, 4, true, kNever, kNever, kNever},
    // Not timed: PyTorch's products, and ours for what streams a weight once.
    {"baseline", "", "float32", true, 0, 0, 20, 4, true, kNever, kNever, kNever},
    {"baseline", "", "float64", true, 0, 0, 20, 4, true, kNever, kNever, kNever},
    {"baseline", "", "bfloat16", true, 0, 0, 20, 4, true, kNever, kNever, kNever},
    {"baseline", "", "float16", true, 0, 0, 20, 4, true, kNever, kNever, kNever},
};

bool is_or_has(const char* cpu) {
  const auto asked = [&](const char* name) { return std::strcmp(cpu, name) == 0; };
  if (asked("")) return true;
#if defined(__x86_64__)
  if (asked("amd")) return __builtin_cpu_is("amd");
  if (asked("intel")) return __builtin_cpu_is("intel");
  if (asked("avx512fp16")) return __builtin_cpu_supports("avx512fp16");
  if (asked("amx-bf16")) return __builtin_cpu_supports("amx-bf16");
#endif
  return false;
}

// Whether a line is for the chosen blocks: with AVX512-BF16 what has no line of its own goes by
// AVX-512's.
bool is_for_these_blocks(const Routes& line) {
  if (std::strcmp(line.isa, blocks().name) == 0) return true;
  return std::strcmp(blocks().name, "avx512_bf16") == 0 && std::strcmp(line.isa, "avx512") == 0;
}

const Routes& find(const char* dtype) {
  for (const Routes& line : kTable) {
    if (is_for_these_blocks(line) && std::strcmp(line.dtype, dtype) == 0 && is_or_has(line.cpu)) {
      return line;
    }
  }
  STD_TORCH_CHECK(false, "route.cpp has no line for ", blocks().name, " and ", dtype);
}

constexpr Way kByTheTable = static_cast<Way>(-1);
Way forced[kProducts] = {kByTheTable, kByTheTable, kByTheTable,
                         kByTheTable, kByTheTable, kByTheTable};

std::optional<bool> forced_pairs;

Way by_the_table(const Routes& line, Product product, const Sizes& sizes) {
  const auto [M, depth, R, panels, dense, masked] = sizes;
  const auto library = [](bool yes) { return yes ? Way::kLibrary : Way::kStrips; };
  switch (product) {
    case Product::kY:
      if (M <= line.dot_rows && depth >= line.dot_depth * M) return Way::kDots;
      return library(line.library_base);
    case Product::kDx:
      if (M <= line.stream_rows) return Way::kStream;
      return library(line.library_base && M > line.strip_rows);
    case Product::kShrink:
      if (M <= line.stream_rows) return Way::kStream;
      return library(R >= line.library_shrink);
    case Product::kExpand:
      return library(R >= line.library_expand);
    case Product::kGradient:
      return library(M > line.stream_rows && R >= line.library_gradient);
    default:
      return library(line.library_dweight);
  }
}

bool can_go(Way way, Product product, const Sizes& sizes) {
  if (!goes(way, product)) return false;
  switch (way) {
    case Way::kDots:
      return sizes.dense && !sizes.panels;
    case Way::kStream:
      return sizes.dense && !sizes.panels && (product == Product::kDx || !sizes.masked);
    case Way::kLibrary:
      return !sizes.panels && (product == Product::kDx || !sizes.masked);
    default:
      return true;
  }
}

template <size_t kCount>
int index_of(const char* what, const std::string& name, const char* const (&names)[kCount]) {
  std::string all;
  for (size_t i = 0; i < kCount; ++i) {
    if (name == names[i]) return static_cast<int>(i);
    all += (i > 0 ? ", " : "") + std::string(names[i]);
  }
  STD_TORCH_CHECK(false, what, " must be one of ", all, ", got ", name);
}

}  // namespace

bool goes(Way way, Product product) {
  if (way == Way::kDots) return product == Product::kY;
  if (way == Way::kStream) return product == Product::kDx || product == Product::kShrink;
  return true;
}

Product product_named(const std::string& name) {
  return static_cast<Product>(index_of("product", name, kProductNames));
}

template <>
const Routes& routes<float>() {
  static const Routes& line = find("float32");
  return line;
}
template <>
const Routes& routes<double>() {
  static const Routes& line = find("float64");
  return line;
}
template <>
const Routes& routes<BFloat16>() {
  static const Routes& line = find("bfloat16");
  return line;
}
template <>
const Routes& routes<Float16>() {
  static const Routes& line = find("float16");
  return line;
}

bool takes_pairs() { return forced_pairs.value_or(routes<BFloat16>().pairs); }

Way way_of(const Routes& line, Product product, const Sizes& sizes) {
  const Way asked = forced[static_cast<int>(product)];
  if (asked != kByTheTable && can_go(asked, product, sizes)) return asked;
  const Way way = by_the_table(line, product, sizes);
  if (can_go(way, product, sizes)) return way;
  // What a few rows can't do, the many's way does.
  const Way instead = by_the_table(line, product, {kNever, 0, sizes.R});
  return can_go(instead, product, sizes) ? instead : Way::kStrips;
}

void force_way(const std::string& product, const char* way) {
  const Product of = product_named(product);
  Way asked = kByTheTable;
  if (way != nullptr) {
    asked = static_cast<Way>(index_of("way", way, kWayNames));
    STD_TORCH_CHECK(goes(asked, of), "way must be one that ", product, " goes, got ", way);
  }
  forced[static_cast<int>(of)] = asked;
}

void force_pairs(std::optional<bool> pairs) { forced_pairs = pairs; }

}  // namespace lora_ext::cpu
