// Which way each product goes. Every threshold and every "ours or PyTorch's" of the CPU kernels is
// here: sizes of blocks for all, and a table by instruction set and dtype. The measurements behind
// them are in benchmarks/results/cpu_notes.md; `python -m benchmarks.routes` measures this machine.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <string>

#include "cpu/blocks.h"

namespace lora_ext::cpu {

// ---- sizes of blocks, for caches of 32 KB and 512 KB ----

// How many words of the summed dimension are worked on at a time: one panel of them (24 KB) stays
// in a first-level cache while the rows of the left factor pass. Longer sums also round more.
inline constexpr int64_t kDepth = 384;
// A large product goes by strips of columns and in each by tiles of rows. A tile's sums (192 x 256
// floats, 192 KB) stay in a second-level cache. Up to kLoneRows rows are one tile: each block of
// the right factor then is in cache once.
inline constexpr int64_t kStripCols = 256, kStripRows = 192, kLoneRows = 256;
// Parts of rows that are worth packing a strip for again, and that fill a tile's registers.
inline constexpr int64_t kLeastRows = 24;
// Rows of a block of h, t, or y += h @ B. Of up to kShrinkCols columns, kShrinkRows rows of x or dy
// are read from end to end before the next: there reading them is most of the time, and the
// hardware asks ahead along a row.
inline constexpr int64_t kRowBlock = 96, kShrinkRows = 16, kShrinkCols = 16;
// A right factor that up to kInPlaceUses rows of the left one meet is not worth packing.
inline constexpr int64_t kInPlaceUses = 32;
// dA and dB sum over all rows of x and dy. Up to kInPlaceRank columns of h or t read them in place,
// kInPlaceDepth rows by kInPlaceCols columns at a time; for more, and where a word is not an
// element, they are packed, kPackedCols at a time.
inline constexpr int64_t kInPlaceRank = 128, kInPlaceDepth = 96, kInPlaceCols = 512;
inline constexpr int64_t kPackedCols = 128;
// A leg of up to so many steps is taken along by the sums of another, see Carried.
inline constexpr int64_t kCarriedSteps = 64;
// Up to so many rows, dA and dB are one product, its right factor h or t.
inline constexpr int64_t kFewRows = 32;
// A matrix of more bytes is read from the last cache or from memory at each use.
inline constexpr int64_t kFarBytes = 3 << 20;
// Up to so many rows y is dot products with a weight of codes in place, and dx sums of its rows.
inline constexpr int64_t kCodesDotRows = 16, kCodesStreamRows = 12;
// Above so many threads a weight is packed once for all of them, so many elements of it at a time.
inline constexpr int64_t kPackAloneThreads = 4, kSharedPanels = 8 << 20;

// ---- the table ----

inline constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

// Who makes a product, and how.
enum class Way : int8_t {
  kStrips,   // ours, by strips of columns, each packed
  kDots,     // ours, few rows: y by dot products with the weight's rows in place
  kStream,   // ours, few rows: dx and t by sums of the weight's and B's rows in place
  kLibrary,  // PyTorch's
};

enum class Product : int8_t {
  kY,         // x @ weight.T
  kDx,        // dy @ weight
  kShrink,    // h = x @ A, t = dy @ B.T
  kExpand,    // h @ B and t @ A.T, where they are added to a product of PyTorch's
  kGradient,  // dA, dB
  kDweight,   // dy.T @ x
};
inline constexpr int kProducts = 6;
inline constexpr const char* kProductNames[kProducts] = {"y",      "dx",       "shrink",
                                                         "expand", "gradient", "dweight"};
inline constexpr int kWays = 4;
inline constexpr const char* kWayNames[kWays] = {"strips", "dots", "stream", "library"};

struct Routes {
  const char* isa;       // Blocks::name
  const char* cpu;       // what the CPU must be or have, "" for nothing: see route.cpp
  const char* dtype;     // of x and the weight
  bool library_base;     // PyTorch's product beats our strips at x @ weight.T and dy @ weight,
  int64_t strip_rows;    // but for dx of up to so many rows
  int64_t dot_rows;      // up to so many rows y is made by dot products
  int64_t dot_depth;     // where K is so many times the rows: each ends in a sum over lanes
  int64_t stream_rows;   // up to so many rows dx and t are sums of rows in place
  bool library_dweight;  // PyTorch's product beats our strips at dy.T @ x
  // From so high a rank on, PyTorch makes h and t; adds h @ B and t @ A.T; makes dA and dB, but not
  // of so few rows that dx streams.
  int64_t library_shrink, library_expand, library_gradient;
  bool pairs = false;  // of bfloat16: our products multiply pairs, and do not widen to float
};

// The line of the table for this machine and a storage dtype.
template <typename T>
const Routes& routes();

// Whether products of bfloat16 take pairs: by the table, or as forced.
bool takes_pairs();

// What decides about a product of a call. M rows, R rank; `depth` is what the product sums over.
struct Sizes {
  int64_t M, depth, R;
  bool panels = false;  // the weight is in panels
  bool dense = true;    // the factor read in place has dense rows
  bool masked = false;  // dropout's mask is on what the product reads
};

// Whether a product can go a way at all, in some layout.
bool goes(Way way, Product product);
// The product of a name. Throws for one that is not known.
Product product_named(const std::string& name);

// The ways of x @ weight.T and dy @ weight, of M rows, where the weight is of codes; `whole` is
// whether its rows are whole blocks and A has dense rows.
constexpr Way way_of_codes(int64_t M) { return M <= kCodesDotRows ? Way::kDots : Way::kStrips; }
constexpr Way dx_way_of_codes(int64_t M, bool whole) {
  return M <= kCodesStreamRows && whole ? Way::kStream : Way::kStrips;
}

// The way that a product takes.
Way way_of(const Routes& line, Product product, const Sizes& sizes);

// For measuring: make a product go one way in all calls of this process that can go it; with null,
// by the table again. Throws for a name that is not known.
void force_way(const std::string& product, const char* way);
// For measuring and for tests: have bfloat16 multiplied by pairs or not; without a value, by the
// table again. Panels that pack_weight made before are then of the wrong kind.
void force_pairs(std::optional<bool> pairs);

}  // namespace lora_ext::cpu
