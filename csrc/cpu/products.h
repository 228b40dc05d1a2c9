// The matrix products of the two operators, for the rows or columns that one thread has; built of
// the block operations of blocks.h. Each result element is summed by one thread in an order that
// depends on the sizes alone, so the same inputs give the same bits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

#include "cpu/isa.h"

namespace lora_ext::cpu {

// How much of the summed dimension is worked on at a time: one panel of it (24 KB) stays in a 32 KB
// first-level cache while the rows of the left factor pass.
inline constexpr int64_t kDepth = 384;
// A large product goes by strips of columns and in each by tiles of rows. A tile's sums (192 x 256
// floats, 192 KB) stay in a 512 KB second-level cache.
inline constexpr int64_t kStripCols = 256;
inline constexpr int64_t kStripRows = 192;

// A matrix that is read where it lies by up to kInPlaceRank columns of another, summed over its
// rows: so many rows of it at a time, which stay in a second-level cache.
inline constexpr int64_t kInPlaceRank = 16, kInPlaceDepth = 96;

// Uninitialised memory of one thread, aligned to a cache line. By malloc, which has small blocks in
// a cache of the thread's; aligned new passes that by (2 us of a training step of one row).
template <typename A>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : memory_(std::malloc(std::max<int64_t>(count, 1) * sizeof(A) + kLine)) {
    if (memory_ == nullptr) throw std::bad_alloc();
  }
  A* get() const {
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    return reinterpret_cast<A*>((address + kLine - 1) / kLine * kLine);
  }

 private:
  static constexpr uintptr_t kLine = 64;
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> memory_;
};

// Up to so many rows a factor is used too few times to pay for packing it, and what can be read
// where it lies is.
inline constexpr int64_t kFewRows = 32;

// A matrix as panels where it lies, if it can be read so and that is worth it for a left factor of
// `uses` rows; else none.
template <typename A, typename T>
Panels<const A> panels_where_it_lies(View<const T> matrix, int64_t uses) {
  if constexpr (std::is_same_v<T, A>) {
    if (uses <= kFewRows && matrix.col_stride == 1 && matrix.cols % kPanel<A> == 0) {
      return {matrix.data, matrix.row_stride, kPanel<A>};
    }
  }
  return {};
}

// A right-hand factor in panels, for a left factor of `uses` rows.
template <typename A>
class RightFactor {
 public:
  template <typename T>
  RightFactor(View<const T> matrix, int64_t uses) : panels_(panels_where_it_lies<A>(matrix, uses)) {
    if (panels_.data != nullptr) return;
    memory_ = Scratch<A>(matrix.rows * round_up_to_panel<A>(matrix.cols));
    blocks().storage<T>().pack(matrix, memory_.get());
    panels_ = Panels<const A>::packed(memory_.get(), matrix.rows);
  }
  Panels<const A> from(int64_t row, int64_t col) const { return panels_.from(row, col); }

 private:
  Scratch<A> memory_{0};
  Panels<const A> panels_;
};

// Whether a matrix is so large that each use reads it from the last cache or memory anew.
template <typename T>
bool is_far(View<const T> matrix) {
  return matrix.rows * matrix.cols * static_cast<int64_t>(sizeof(T)) > 3 << 20;
}

// The right-hand factor of a large product: in `panels` already (see pack_weight), or read where it
// lies, or packed by blocks of kDepth rows when the first tile of the left factor asks for them, so
// that it finds them in cache; the tiles after it find them packed.
//
// For one tile (up to kStripRows rows) reading a matrix that is `far` (see is_far) takes a good
// part of the time. Where the hardware does not foresee what comes next, panels or short pieces of
// long rows, that is asked for ahead: 64,3072,768 dx 4.2 -> 3.8 ms, packed before 3.5 -> 3.4; the
// columns of weight.T, long pieces, gained nothing, and matrices that are near lost 2 %.
template <typename T>
class BlockedFactor {
  using A = Acc<T>;

 public:
  BlockedFactor(View<const T> matrix, bool far, int64_t uses, Panels<const A> panels)
      : matrix_(matrix),
        width_(round_up_to_panel<A>(matrix.cols)),
        ready_(panels.data != nullptr ? panels : panels_where_it_lies<A>(matrix, uses)),
        keeps_blocks_(uses > kStripRows),
        looks_ahead_(far && !keeps_blocks_ && (ready_.data != nullptr || matrix.col_stride == 1)),
        memory_(ready_.data != nullptr
                    ? 0
                    : width_ * (keeps_blocks_ ? matrix.rows : std::min(kDepth, matrix.rows))) {}

  // Columns of a block: all, or so few that both they and the next ones stay in cache.
  int64_t block_cols() const {
    return looks_ahead_ && ready_.data == nullptr ? kAheadCols : matrix_.cols;
  }

  // Rows k to k + depth, k a multiple of kDepth, of columns `col` to `col` + `cols`; until the next
  // call.
  Panels<const A> block(int64_t k, int64_t depth, int64_t col, int64_t cols) {
    if (ready_.data != nullptr) return ready_.from(k, col);
    A* packed = memory_.get() + (keeps_blocks_ ? k * width_ : 0);
    if (k >= rows_packed_) {
      blocks().storage<T>().pack(matrix_.block(k, col, depth, cols), packed);
    }
    if (keeps_blocks_) rows_packed_ = std::max(rows_packed_, k + depth);
    return Panels<const A>::packed(packed, depth);
  }

  // What to ask for while that block is worked on.
  Ahead after(int64_t k, int64_t col) const {
    if (!looks_ahead_) return {};
    if (ready_.data != nullptr) {
      const Panels<const A> next = ready_.from(k, col + kPanel<A>);
      return ahead(next.data, next.row_stride, next.panel_stride);
    }
    const bool last = col + kAheadCols >= matrix_.cols;
    const View<const T> next =
        matrix_.block(last ? k + kDepth : k, last ? 0 : col + kAheadCols, 0, 0);
    return ahead(next.data, next.row_stride, kPanel<A>);
  }

 private:
  static constexpr int64_t kAheadCols = 4 * kPanel<A>;

  template <typename E>
  static Ahead ahead(const E* data, int64_t row_stride, int64_t panel_stride) {
    constexpr int64_t size = sizeof(E);
    return {reinterpret_cast<const char*>(data), row_stride * size, panel_stride * size};
  }

  const View<const T> matrix_;
  const int64_t width_;
  const Panels<const A> ready_;
  const bool keeps_blocks_, looks_ahead_;
  const Scratch<A> memory_;
  int64_t rows_packed_ = 0;
};

// A left-hand factor as values of A: the matrix itself where it already is that, else a copy made
// in `scratch`, which must hold its elements.
template <typename T>
View<const Acc<T>> as_left_factor(View<const T> matrix, Acc<T>* scratch) {
  if constexpr (std::is_same_v<T, Acc<T>>) {
    return matrix;
  } else if (matrix.row_stride == 1 && matrix.col_stride != 1) {
    return as_left_factor<T>(matrix.transposed(), scratch).transposed();
  } else {
    blocks().storage<T>().load(matrix, scratch, matrix.cols);
    return {scratch, matrix.rows, matrix.cols, matrix.cols, 1};
  }
}

// The addend of the part of a product that begins at step `k` of the summed dimension.
template <typename A>
Addend<A> sum_so_far(int64_t k, const A* sum, int64_t ld) {
  return k > 0 ? Addend<A>{sum, ld} : Addend<A>{};
}

// out (left.rows, R; dense rows of `ld`, R rounded up to a panel) = left @ right, for a right
// factor of few columns that is packed whole: h = x @ A, t = dy @ B.T. What pads a row becomes
// zero.
template <typename T>
void skinny_product(View<const T> left, const RightFactor<Acc<T>>& right, Acc<T>* out, int64_t ld) {
  using A = Acc<T>;
  const Scratch<A> scratch(left.rows * std::min(left.cols, kDepth));
  if (left.cols == 0) std::fill_n(out, left.rows * ld, A(0));
  for (int64_t k = 0; k < left.cols; k += kDepth) {
    const int64_t depth = std::min(kDepth, left.cols - k);
    const auto block = as_left_factor<T>(left.block(0, k, left.rows, depth), scratch.get());
    blocks().products<A>().multiply(block, right.from(k, 0), ld, out, ld, A(1),
                                    sum_so_far(k, out, ld), {});
  }
}

// A product of rank `rank` that is added to a larger one: so many more steps of the summed
// dimension.
template <typename A>
struct LowRank {
  const A* left;  // (rows, rank), dense rows of `ld`, scaled by alpha
  int64_t ld, rank;
  Panels<const A> right;
};

// out = left @ right + low.left @ low.right + bias, for a strip of columns that one thread has;
// `low` and `bias` may be null, `panels` are right's where it is packed already. `far` is of the
// whole right factor. `out` has dense rows.
template <typename T>
void product_strip(View<const T> left, View<const T> right, bool far, const T* bias, View<T> out,
                   const LowRank<Acc<T>>* low, Panels<const Acc<T>> panels = {}) {
  using A = Acc<T>;
  constexpr bool sums_in_place = std::is_same_v<T, A>;
  const int64_t cols = out.cols, tile_rows = std::min(kStripRows, left.rows);
  const MultiplyOps<A>& products = blocks().products<A>();
  BlockedFactor<T> factor(right, far, left.rows, panels);
  const Scratch<A> copy(tile_rows * std::min(kDepth, left.cols)),
      tile_sum(sums_in_place ? 0 : tile_rows * cols), wide_bias(cols);
  if (bias != nullptr) blocks().storage<T>().load({bias, 1, cols, cols, 1}, wide_bias.get(), cols);
  for (int64_t row = 0; row < left.rows; row += kStripRows) {
    const int64_t rows = std::min(kStripRows, left.rows - row);
    const View<T> to = out.block(row, 0, rows, cols);
    A* sum = tile_sum.get();
    int64_t ld = cols;
    if constexpr (sums_in_place) sum = to.data, ld = to.row_stride;
    Addend<A> addend;
    if (bias != nullptr) addend = {wide_bias.get(), 0};
    for (int64_t k = 0; k < left.cols; k += kDepth) {
      const int64_t depth = std::min(kDepth, left.cols - k);
      const auto tile = as_left_factor<T>(left.block(row, k, rows, depth), copy.get());
      for (int64_t col = 0; col < cols; col += factor.block_cols()) {
        const int64_t width = std::min(factor.block_cols(), cols - col);
        products.multiply(tile, factor.block(k, depth, col, width), width, sum + col, ld, A(1),
                          addend.from(col), factor.after(k, col));
      }
      addend = {sum, ld};
    }
    if (low != nullptr) {
      const View<const A> block = {low->left + row * low->ld, rows, low->rank, low->ld, 1};
      products.multiply(block, low->right, cols, sum, ld, A(1), addend, {});
    } else if (left.cols == 0) {
      for (int64_t i = 0; i < rows; ++i) std::fill_n(sum + i * ld, cols, A(0));
    }
    if constexpr (!sums_in_place) blocks().storage<T>().store(sum, ld, A(1), nullptr, false, to);
  }
}

// out (R, cols) = left.T @ right for a left factor of few columns (M, R; dense rows of `ld`), and
// the columns of `right` that one thread has: dB = h.T @ dy, dA.T = t.T @ x. Sums over all M. Up to
// kInPlaceRank columns of left use `right` too few times to pack it: R = 8, 1024 x 384 0.136 ->
// 0.087 ms, R = 16, 960 x 768 0.38 -> 0.30, but R = 32, 512 x 2048 0.96 -> 1.04.
template <typename T>
void skinny_transposed_product(const Acc<T>* left, int64_t ld, int64_t R, View<const T> right,
                               Acc<T>* out, int64_t out_ld) {
  using A = Acc<T>;
  Panels<const A> in_place;
  if (R <= kInPlaceRank) in_place = panels_where_it_lies<A>(right, R);
  const int64_t step = in_place.data != nullptr ? kInPlaceDepth : kDepth;
  const Scratch<A> packed(
      in_place.data != nullptr ? 0 : std::min(step, right.rows) * round_up_to_panel<A>(right.cols));
  if (right.rows == 0) {
    for (int64_t r = 0; r < R; ++r) std::fill_n(out + r * out_ld, right.cols, A(0));
  }
  for (int64_t m = 0; m < right.rows; m += step) {
    const int64_t depth = std::min(step, right.rows - m);
    Panels<const A> panels = in_place.from(m, 0);
    if (in_place.data == nullptr) {
      blocks().storage<T>().pack(right.block(m, 0, depth, right.cols), packed.get());
      panels = Panels<const A>::packed(packed.get(), depth);
    }
    blocks().products<A>().multiply({left + m * ld, R, depth, 1, ld}, panels, right.cols, out,
                                    out_ld, A(1), sum_so_far(m, out, out_ld), {});
  }
}

// Call change(values, ld) on y's elements as values of A: in place where they are that, else on a
// copy that is then rounded back. y has dense rows.
template <typename T, typename F>
void update(View<T> y, const F& change) {
  using A = Acc<T>;
  if constexpr (std::is_same_v<T, A>) {
    change(y.data, y.row_stride);
  } else {
    const int64_t wide = round_up_to_panel<A>(y.cols);
    const Scratch<A> values(y.rows * wide);
    blocks().storage<T>().load({y.data, y.rows, y.cols, y.row_stride, y.col_stride}, values.get(),
                               wide);
    change(values.get(), wide);
    blocks().storage<T>().store(values.get(), wide, A(1), nullptr, false, y);
  }
}

// y += low.left @ low.right, for the rows that one thread has.
template <typename T>
void add_low_rank(const LowRank<Acc<T>>& low, View<T> y) {
  update<T>(y, [&](Acc<T>* values, int64_t ld) {
    const View<const Acc<T>> left = {low.left, y.rows, low.rank, low.ld, 1};
    blocks().products<Acc<T>>().multiply(left, low.right, y.cols, values, ld, Acc<T>(1),
                                         {values, ld}, {});
  });
}

// Whether `dot` takes a matrix as its right factor.
template <typename T>
bool has_dense_rows(View<T> matrix) {
  return matrix.col_stride == 1 || matrix.cols == 1;
}

}  // namespace lora_ext::cpu
