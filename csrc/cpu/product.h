// The one product: what every result of the operators is made of.
//   out = sum over legs of scale * (left @ right) [* keep]  + bias  [+ out]
// y has legs (x, weight.T) and (h, B); dx (dy, weight) and (t, A.T) with a mask; h, t, dA and dB
// one. Each result element is summed by one thread in an order that depends on the sizes and on the
// number of threads alone, so the same inputs give the same bits.
#pragma once

#include <array>
#include <cmath>
#include <optional>
#include <span>
#include <vector>

#include "cpu/left_factor.h"
#include "cpu/right_factor.h"

namespace lora_ext::cpu {

template <typename P>
struct Leg {
  Left<P> left;
  Right<P> right;
  double scale = 1;  // meets the sums, never a factor
  Bits keep = {};    // on the leg's product; the first such leg costs no memory of its own
  // Elements of the summed dimension at a time, at most.
  int64_t step = kIsPair<P> ? 2 * kDepth : kDepth;

  Leg block(int64_t row, int64_t rows, int64_t col, int64_t cols) const {
    return {left.from(row, rows), right.from(col, cols), scale, keep.from(row, col), step};
  }
};

template <typename T>
struct Out {
  View<T> to;
  const T* bias = nullptr;  // one a column
  bool add = false;         // to what `to` holds

  Out block(int64_t row, int64_t rows, int64_t col, int64_t cols) const {
    return {to.block(row, col, rows, cols), bias == nullptr ? bias : bias + col, add};
  }
};

// The rows of a tile, even ones.
constexpr int64_t tile_rows(int64_t rows) {
  return rows <= kLoneRows ? rows : even_part(rows, kStripRows, 1, 8, 1);
}

// The blocks of a leg's right factor, for one thread: ready, or packed when the first tile of the
// left factor asks for them, so that it finds them in cache; the tiles after it find them packed.
//
// A matrix that is far, or not packed, is asked for ahead where the hardware does not guess what
// comes next: panels, and short pieces of long rows.
template <typename P>
class Cursor {
 public:
  explicit Cursor(const Leg<P>& leg)
      : leg_(leg),
        right_(leg.right),
        step_(even_part(right_.depth(), leg.step, 1, 8, 1)),
        width_(round_up_to_panel<P>(right_.cols())),
        keeps_blocks_(leg.left.rows() > kLoneRows),
        looks_ahead_((right_.is_far() || right_.in_place()) && leg.left.rows() <= kStripRows &&
                     (right_.is_ready() || right_.has_dense_rows())),
        block_cols_(looks_ahead_ && !right_.is_ready() ? kAheadCols : right_.cols()),
        packed_(right_.is_ready()
                    ? 0
                    : width_ * words_of<P>(keeps_blocks_ ? right_.depth()
                                                         : std::min(step_, right_.depth()))),
        copy_(leg.left.in_place()
                  ? 0
                  : tile_rows(leg.left.rows()) * words_of<P>(std::min(step_, leg.left.depth()))) {}

  // sum (rows, cols; dense rows of `ld`) = scale * left's rows from `row` on @ right + addend, and
  // what is taken along.
  void add_to(int64_t row, int64_t rows, Acc<P>* sum, int64_t ld, Addend<Acc<P>> addend,
              Along<P> along = {}) {
    const int64_t depth = right_.depth();
    for (int64_t k = 0; k == 0 || k < depth; k += step_) {
      const int64_t steps = std::min(step_, depth - k);
      const Along<P> with = k + step_ < depth ? Along<P>{} : along;
      const Parts<P> left = leg_.left.parts(row, k, rows, steps, copy_.get());
      for (int64_t col = 0; col < right_.cols(); col += block_cols_) {
        const int64_t cols = std::min(block_cols_, right_.cols() - col);
        const Panels<const P> panels = block(k, steps, col, cols);
        Ahead ahead = after(k, col);
        for (int64_t part = 0; part < left.count; ++part) {
          blocks().products<P>().multiply(left.views[part], panels, cols, sum + part * ld + col,
                                          left.count * ld, static_cast<Acc<P>>(leg_.scale),
                                          part_of(addend.from(col), part, left.count), ahead,
                                          part_of(with.from(0, rows, col), part, left.count));
          ahead = {};
        }
      }
      addend = {sum, ld};
    }
  }

 private:
  static constexpr int64_t kAheadCols = 4 * kPanel<P>;

  Panels<const P> block(int64_t k, int64_t steps, int64_t col, int64_t cols) {
    if (right_.is_ready()) return right_.ready().from(words_of<P>(k), col);
    P* packed = packed_.get() + (keeps_blocks_ ? words_of<P>(k) * width_ : 0);
    if (k >= rows_packed_) right_.fill(k, steps, col, cols, packed);
    if (keeps_blocks_) rows_packed_ = std::max(rows_packed_, k + steps);
    return Panels<const P>::packed(packed, words_of<P>(steps));
  }

  // What to ask for while that block is worked on.
  Ahead after(int64_t k, int64_t col) const {
    if (!looks_ahead_) return {};
    if (right_.is_ready()) {
      const int64_t ahead = blocks().products<P>().tile_panels * kPanel<P>;
      const Panels<const P> next = right_.ready().from(words_of<P>(k), col + ahead);
      constexpr int64_t size = sizeof(P);
      return {reinterpret_cast<const char*>(next.data), next.row_stride * size,
              next.panel_stride * size};
    }
    const bool last = col + kAheadCols >= right_.cols();
    return {last ? right_.address(k + step_, 0) : right_.address(k, col + kAheadCols),
            right_.row_bytes(), kPanel<P> * right_.element_bytes()};
  }

  const Leg<P>& leg_;
  const Right<P>& right_;
  const int64_t step_;  // blocks of even depth, so that none is short
  const int64_t width_;
  const bool keeps_blocks_, looks_ahead_;
  const int64_t block_cols_;  // all, or so few that both they and the next ones stay in cache
  const Scratch<P> packed_, copy_;
  int64_t rows_packed_ = 0;
};

// The low-rank leg of a layer, taken along by the tiles of its base product as R more steps of
// their sums: a pass over the result less. Its scale then meets h or t instead of the sums, in
// float, of pairs rounded again as these were. It is near enough to 1 that nothing overflows by
// that.
template <typename P>
class Carried {
 public:
  static bool fits(std::span<const Leg<P>> legs) {
    if (legs.size() != 2) return false;
    const Leg<P>&low = legs[0], &base = legs[1];
    const double scale = std::fabs(low.scale);
    return low.keep.data == nullptr && base.keep.data == nullptr && base.scale == 1 &&
           low.right.is_ready() && low.left.has_dense_rows() && low.left.depth() <= kCarriedSteps &&
           scale > 1.0 / kMostScale && scale < kMostScale;
  }

  Carried(const Leg<P>& low, int64_t most_rows)
      : low_(low),
        words_(words_of<P>(low.left.depth())),
        copy_(low.left.in_place() ? 0 : most_rows * words_),
        sums_(most_rows * words_ * (kIsPair<P> ? 2 : 1)),
        pairs_(kIsPair<P> ? most_rows * words_ : 0) {}

  // Some rows of the left factor, scaled, and the right one.
  Along<P> rows(int64_t row, int64_t rows) const {
    const View<const P> left = low_.left.block(row, 0, rows, low_.left.depth(), copy_.get());
    const auto scale = static_cast<Acc<P>>(low_.scale);
    if constexpr (kIsPair<P>) {
      const int64_t cols = 2 * words_;
      const View<const BFloat16> elements = {&left.data->even, rows, cols, 2 * left.row_stride, 1};
      blocks().bfloat16.load(elements, sums_.get(), cols);
      blocks().bfloat16.store(sums_.get(), cols, scale, nullptr, false,
                              {&pairs_.get()->even, rows, cols, cols, 1});
      return {{pairs_.get(), rows, words_, words_, 1}, low_.right.ready()};
    } else {
      blocks().storage<P>().load(left, sums_.get(), words_);
      blocks().storage<P>().store(sums_.get(), words_, scale, nullptr, false,
                                  {sums_.get(), rows, words_, words_, 1});
      return {{sums_.get(), rows, words_, words_, 1}, low_.right.ready()};
    }
  }

 private:
  static constexpr double kMostScale = 1 << 16;

  const Leg<P>& low_;
  const int64_t words_;
  const Scratch<P> copy_;
  const Scratch<Acc<P>> sums_;
  const Scratch<P> pairs_;
};

inline constexpr size_t kMostLegs = 16;  // two a layer of a group

// The product, for the tiles of one thread, of at most so many rows where that is given.
template <typename T, typename P>
void product(std::span<const Leg<P>> legs, const Out<T>& out, int64_t most_rows = kLoneRows) {
  using A = Acc<P>;
  const int64_t cols = out.to.cols, n_rows = std::min(tile_rows(out.to.rows), most_rows);
  const bool masked = legs[0].keep.data != nullptr;
  const bool in_place = std::is_same_v<T, A> && out.to.col_stride == 1 && !(masked && out.add);
  const Scratch<A> tile(in_place ? 0 : n_rows * cols);
  const bool masked_later = std::any_of(legs.begin() + 1, legs.end(),
                                        [](const Leg<P>& leg) { return leg.keep.data != nullptr; });
  const Scratch<A> apart(masked_later ? n_rows * cols : 0);
  std::optional<Carried<P>> carried;
  if (Carried<P>::fits(legs)) {
    carried.emplace(legs[0], n_rows);
    legs = legs.subspan(1);
  }
  std::array<std::optional<Cursor<P>>, kMostLegs> cursors;
  for (size_t i = 0; i < legs.size(); ++i) cursors[i].emplace(legs[i]);
  for (int64_t row = 0; row < out.to.rows; row += n_rows) {
    const int64_t rows = std::min(n_rows, out.to.rows - row);
    const View<T> to = out.to.block(row, 0, rows, cols);
    A* sum = tile.get();
    int64_t ld = cols;
    Addend<A> addend;
    if constexpr (std::is_same_v<T, A>) {
      if (in_place) {
        sum = to.data, ld = to.row_stride;
        if (out.bias != nullptr) addend = {out.bias, 0};
        if (out.add) addend = {sum, ld};
      }
    }
    for (size_t i = 0; i < legs.size(); ++i) {
      const Bits keep = legs[i].keep.from(row, 0);
      if (i > 0 && keep.data != nullptr) {  // masked by itself, not with what is summed already
        cursors[i]->add_to(row, rows, apart.get(), cols, {});
        blocks().storage<A>().keep(keep, {apart.get(), rows, cols, cols, 1});
        blocks().storage<A>().store(apart.get(), cols, A(1), nullptr, true,
                                    {sum, rows, cols, ld, 1});
        continue;
      }
      cursors[i]->add_to(row, rows, sum, ld, addend,
                         carried ? carried->rows(row, rows) : Along<P>{});
      if (keep.data != nullptr) blocks().storage<A>().keep(keep, {sum, rows, cols, ld, 1});
      addend = {sum, ld};
    }
    if (!in_place) blocks().storage<T>().store(sum, ld, A(1), out.bias, out.add, to);
  }
}

template <typename T, typename P>
void product(const Leg<P>& leg, const Out<T>& out, int64_t most_rows = kLoneRows) {
  product<T, P>(std::span<const Leg<P>>(&leg, 1), out, most_rows);
}

// The same for tiles [row, row + rows) of some columns, by one thread each.
template <typename T, typename P>
void product_by_tiles(std::span<const Leg<P>> legs, const Out<T>& out, const Tiling& tiling) {
  const int64_t across = ceil_div(out.to.cols, tiling.cols);
  for_each_part(across * ceil_div(out.to.rows, tiling.rows), 1, [&](int64_t tile, int64_t) {
    const int64_t row = tile / across * tiling.rows, col = tile % across * tiling.cols;
    const int64_t rows = std::min(tiling.rows, out.to.rows - row),
                  cols = std::min(tiling.cols, out.to.cols - col);
    std::vector<Leg<P>> parts;
    parts.reserve(legs.size());
    for (const Leg<P>& leg : legs) parts.push_back(leg.block(row, rows, col, cols));
    product<T, P>(parts, out.block(row, rows, col, cols));
  });
}

// A product with many columns, by all threads. What is not in panels is packed by each thread for
// its own tiles; where more than kPackAloneThreads share a strip, the weights are packed once for
// all of them, kSharedPanels of them at a time.
template <typename T, typename P>
void wide_product(std::span<const Leg<P>> legs, const Out<T>& out) {
  const int64_t rows = out.to.rows, cols = out.to.cols, threads = num_threads();
  if (rows == 0 || cols == 0) return;
  const Tiling tiling = tiles_for(rows, cols, kStripCols, kLeastRows, threads);
  int64_t depth = 0;  // of all that is to be packed
  for (const Leg<P>& leg : legs) depth += leg.right.is_ready() ? 0 : words_of<P>(leg.right.depth());
  if (threads <= kPackAloneThreads || depth == 0 || tiling.rows >= rows) {
    return product_by_tiles<T, P>(legs, out, tiling);
  }
  const int64_t strips =
      std::max<int64_t>(kSharedPanels / std::max<int64_t>(depth, 1) / tiling.cols, 1);
  const int64_t group = std::min(strips * tiling.cols, cols);
  const Scratch<P> panels(depth * round_up_to_panel<P>(group));
  for (int64_t col = 0; col < cols; col += group) {
    const int64_t width = std::min(group, cols - col);
    P* packed = panels.get();
    std::vector<Leg<P>> parts;
    for (const Leg<P>& leg : legs) {
      Leg<P>& part = parts.emplace_back(leg.block(0, rows, col, width));
      if (part.right.is_ready()) continue;
      const int64_t steps = part.right.depth(), words = words_of<P>(steps);
      fill_panels(part.right, packed);
      part.right = {Panels<const P>::packed(packed, words), steps, width, false};
      packed += words * round_up_to_panel<P>(width);
    }
    product_by_tiles<T, P>(parts, out.block(0, rows, col, width),
                           tiles_for(rows, width, tiling.cols, kLeastRows, threads));
  }
}

}  // namespace lora_ext::cpu
