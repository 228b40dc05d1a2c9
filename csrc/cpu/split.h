// How work is split into parts for threads: functions of sizes and of the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

namespace lora_ext::cpu {

constexpr int64_t ceil_div(int64_t value, int64_t by) { return (value + by - 1) / by; }

// The size of the parts that `size` is split into: at most `most`, a multiple of `multiple`, as
// many parts for each thread as for the others, but no more parts than have `least` each.
constexpr int64_t even_part(int64_t size, int64_t most, int64_t least, int64_t multiple,
                            int64_t threads) {
  int64_t parts = std::max<int64_t>(ceil_div(size, std::max<int64_t>(most, 1)), 1);
  const int64_t even = ceil_div(parts, threads) * threads;
  parts = std::max(parts, std::min(even, size / least));
  return std::max<int64_t>(ceil_div(ceil_div(size, parts), multiple), 1) * multiple;
}

// A matrix cut into tiles of `rows` by `cols`.
struct Tiling {
  int64_t rows, cols;
};

// Strips of up to `most_cols` columns, and where the threads would not share them evenly, parts of
// rows as well, of `least_rows` at least: as few as keep the threads busy for 15 / 16 of the time,
// or else busiest.
constexpr Tiling tiles_for(int64_t rows, int64_t cols, int64_t most_cols, int64_t least_rows,
                           int64_t threads) {
  const int64_t strip = even_part(cols, most_cols, 64, 16, threads);
  const int64_t across = std::max<int64_t>(ceil_div(cols, strip), 1);
  int64_t best = 1, best_busy = 0;  // in 1 / 1024 of the threads' time
  for (int64_t down = 1; down == 1 || rows / down >= least_rows; ++down) {
    const int64_t tiles = across * down;
    const int64_t busy = 1024 * tiles / (ceil_div(tiles, threads) * threads);
    if (busy > best_busy) best = down, best_busy = busy;
    if (best_busy >= 960) break;
  }
  return {ceil_div(rows, best), strip};
}

}  // namespace lora_ext::cpu
