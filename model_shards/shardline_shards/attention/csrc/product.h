// Products with weights that were packed once: out[rows, N] = input[rows, K] * weight[N, K]^T.
//
// Packed weights are [groups, steps, panels, lanes, depth]: a group is what one pass over the depth
// computes, `panels` vectors of output columns, and it lies in one piece, so that a few rows stream
// through memory. A sum runs over K in order, whatever the number of rows or threads: a row's result
// is its own.

#pragma once

#include <cstring>
#include <vector>

#include "team.h"
#include "tiles.h"
#include "vector_math.h"

namespace {

// Two neighbours in K go together where the processor multiplies pairs of bf16.
#ifdef SHARDLINE_HAS_PAIRS
template <typename T>
constexpr bool kPairs = std::is_same_v<T, at::BFloat16>;
#else
template <typename T>
constexpr bool kPairs = false;
#endif

template <typename T>
constexpr int64_t kDepth = kPairs<T> ? 2 : 1;

// What a product reads its input as: pairs as they are, the rest widened once for all columns.
template <typename T>
using Input = std::conditional_t<kPairs<T>, T, float>;

constexpr int64_t kFewRows = 8;  // so few that a group takes microseconds

constexpr int kNumRegisters = kLanes == 8 ? 16 : 32;
constexpr int64_t kRowBlockBytes = 1 << 18;      // of input that stays in a core's cache
constexpr int64_t kTileRowBlockBytes = 1 << 20;  // likewise, where tile registers multiply
constexpr int64_t kBytesAhead = 2048;            // how far in front of a pass weights are fetched
constexpr int64_t kTileBytesAhead = 4096;        // likewise, where tile registers multiply

// Whether registers hold the sums of a pass beside one row of weights and one number of the input.
constexpr bool fits(int rows, int panels) { return (rows + 1) * panels + 1 <= kNumRegisters; }

// Vectors of a group that one pass takes: all; or half, where registers are so few that a row of
// weights would be widened again for every two rows of input.
constexpr int pass_panels(int rows, int panels) {
  return kNumRegisters == 16 && panels == 4 && !fits(rows, panels) ? panels / 2 : panels;
}

// Rows of the largest tile.
constexpr int max_rows(int panels) {
  int rows = 1;
  while (fits(rows + 1, pass_panels(rows + 1, panels))) {
    ++rows;
  }
  return rows;
}

template <typename T>
struct Packed {
  const T* data = nullptr;
  int64_t num_outputs = 0;  // N
  int64_t num_groups = 0, num_steps = 0;
  int panels = 0;

  int64_t group_columns() const { return panels * kLanes; }
  int64_t group_size() const { return num_steps * group_columns() * kDepth<T>; }
  int64_t input_stride() const { return num_steps * kDepth<T>; }
};

// Sums of the kPanels vectors at `weights`, of which a step of the depth holds `step_size` numbers.
template <typename T, int kRows, int kPanels, typename Fetching>
C10_ALWAYS_INLINE void multiply_pass(
    const Input<T>* input, int64_t stride, const T* weights, int64_t step_size, int64_t num_steps,
    Fetching fetch, Register (&result)[kRows][kPanels]) {
  Register sums[kRows][kPanels];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p) {
      sums[r][p] = Vec(0.f);
    }
  }
  constexpr int64_t kPanelSize = kLanes * kDepth<T>;
  for (int64_t k = 0; k < num_steps; ++k, weights += step_size) {
    fetch.step();
    if constexpr (kPairs<T>) {
#ifdef SHARDLINE_HAS_PAIRS
      __m512bh right[kPanels];
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) {
        right[p] = (__m512bh)_mm512_loadu_si512(weights + p * kPanelSize);
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        int32_t pair;
        std::memcpy(&pair, input + r * stride + 2 * k, sizeof pair);
        const __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
        for (int p = 0; p < kPanels; ++p) {
          sums[r][p] = _mm512_dpbf16_ps(sums[r][p], left, right[p]);
        }
      }
#endif
    } else {
      Register right[kPanels];
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) {
        right[p] = load_wide(weights + p * kPanelSize);
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Vec left(input[r * stride + k]);
#pragma GCC unroll 4
        for (int p = 0; p < kPanels; ++p) {
          sums[r][p] = at::vec::fmadd(left, Vec(right[p]), Vec(sums[r][p]));
        }
      }
    }
  }
  // Not in place: what others know the address of is kept in memory.
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p) {
      result[r][p] = sums[r][p];
    }
  }
}

// Some rows of the input that are multiplied with a group at once; `index` of `num_tiles`.
struct Tile {
  int64_t first_row, num_rows;
  int64_t index, num_tiles;
};

// Calls `run` with what a tile fetches while it is multiplied. The only one streams: it fetches a
// little in front of itself. Of several, each fetches its share of the next group.
template <typename T, int kPanels, typename Run>
C10_ALWAYS_INLINE void with_fetch(
    const Packed<T>& w, int64_t group, const Tile& tile, int64_t bytes_ahead, const Run& run) {
  constexpr int kAll = kPanels * static_cast<int>(kLanes * kDepth<T> * sizeof(T)) / kCacheLineBytes;
  constexpr int kSome = divide_up(kAll, 2);
  const char* here = reinterpret_cast<const char*>(w.data + group * w.group_size());
  const char* next = reinterpret_cast<const char*>(w.data + (group + 1) * w.group_size());
  if (tile.num_tiles == 1) {
    run(Fetch<kAll, kOnce>{here + bytes_ahead});
  } else if (tile.index * kSome < kAll) {
    run(Fetch<kSome, kSecondCache>{next + tile.index * w.num_steps * kSome * kCacheLineBytes});
  } else {
    run(Fetch<0>{next});
  }
}

template <typename T, int kRows, int kPanels, typename Store>
void multiply_tile_packed(
    const Packed<T>& w, const Input<T>* input, int64_t stride, int64_t group, const Tile& tile,
    const Store& store) {
  constexpr int kAtOnce = pass_panels(kRows, kPanels);
  constexpr int64_t kStepSize = kPanels * kLanes * kDepth<T>;
  Register sums[kRows][kAtOnce];
  const T* weights = w.data + group * w.group_size();
  const auto pass = [&](int first, auto fetch) {
    multiply_pass<T, kRows, kAtOnce>(
        input, stride, weights + first * kLanes * kDepth<T>, kStepSize, w.num_steps, fetch, sums);
    for (int r = 0; r < kRows; ++r) {
      store(tile.first_row + r, group * w.group_columns() + first * kLanes, sums[r]);
    }
  };
  with_fetch<T, kPanels>(w, group, tile, kBytesAhead, [&](auto fetch) { pass(0, fetch); });
  for (int first = kAtOnce; first < kPanels; first += kAtOnce) {
    pass(first, Fetch<0>{nullptr});
  }
}

// Calls `run` with `rows` as a constant, 1 <= rows <= kMax.
template <int kMax, typename Run>
C10_ALWAYS_INLINE void with_rows(int64_t rows, const Run& run) {
  if constexpr (kMax == 1) {
    run(std::integral_constant<int, 1>());
  } else if (rows == kMax) {
    run(std::integral_constant<int, kMax>());
  } else {
    with_rows<kMax - 1>(rows, run);
  }
}

// Rows [begin, end) of the input as a product reads them.
template <typename T>
const Input<T>* read_rows(const T* input, int64_t stride, int64_t begin, int64_t end) {
  if constexpr (std::is_same_v<T, Input<T>>) {
    return input + begin * stride;
  } else {
    thread_local Lines<float> wide;
    const size_t size = (end - begin) * stride;
    if (wide.size() < size) {
      wide.resize(size);
    }
    widen_row(input + begin * stride, wide.data(), size);
    return wide.data();
  }
}

// Calls `multiply(input of the tile, group, tile)` for each of some groups and every tile of up to
// `max_rows` rows, in even blocks of up to `block_bytes`.
template <typename T, typename Multiply>
void for_each_tile(
    const T* input, int64_t stride, int64_t num_rows, int64_t max_rows, int64_t block_bytes,
    int64_t group_begin, int64_t group_end, const Multiply& multiply) {
  const int64_t fitting = block_bytes / static_cast<int64_t>(stride * sizeof(Input<T>));
  const int64_t most = std::max<int64_t>(1, fitting / max_rows) * max_rows;
  const int64_t num_blocks = std::max<int64_t>(1, divide_up(num_rows, most));
  const int64_t block = divide_up(divide_up(num_rows, num_blocks), max_rows) * max_rows;
  for (int64_t begin = 0; begin < num_rows; begin += block) {
    const int64_t end = std::min(num_rows, begin + block);
    const int64_t num_tiles = divide_up(end - begin, max_rows);
    const Input<T>* rows_in = read_rows(input, stride, begin, end);
    for (int64_t group = group_begin; group < group_end; ++group) {
      for (int64_t tile = 0; tile < num_tiles; ++tile) {
        const int64_t first = (end - begin) * tile / num_tiles;
        const int64_t last = (end - begin) * (tile + 1) / num_tiles;
        multiply(
            rows_in + first * stride, group, Tile{begin + first, last - first, tile, num_tiles});
      }
    }
  }
}

template <typename T, int kPanels, typename Store>
void multiply_groups_in_tiles(
    const Packed<T>& w, const T* input, int64_t stride, int64_t num_rows, int64_t group_begin,
    int64_t group_end, const Store& store) {
  alignas(kCacheLineBytes) float sums[kRowsInPair][kPanels * kLanes];
  Tiles tiles;
  const auto multiply = [&](const T* rows, int64_t group, const Tile& tile) {
    with_fetch<T, kPanels>(w, group, tile, kTileBytesAhead, [&](auto fetch) {
      multiply_tiles<kPanels>(
          tiles, rows, stride, tile.num_rows, w.data + group * w.group_size(), w.num_steps, fetch,
          sums[0]);
    });
    for (int64_t r = 0; r < tile.num_rows; ++r) {
      Register row[kPanels];
      for (int p = 0; p < kPanels; ++p) {
        row[p] = Vec::loadu(sums[r] + p * kLanes);
      }
      store(tile.first_row + r, group * w.group_columns(), row);
    }
  };
  for_each_tile<T>(
      input, stride, num_rows, kRowsInPair, kTileRowBlockBytes, group_begin, group_end, multiply);
}

template <typename T, int kPanels, typename Store>
void multiply_groups(
    const Packed<T>& w, const T* input, int64_t stride, int64_t num_rows, int64_t group_begin,
    int64_t group_end, const Store& store) {
  constexpr int kMax = max_rows(kPanels);
  const auto multiply = [&](const Input<T>* rows_in, int64_t group, const Tile& tile) {
    with_rows<kMax>(tile.num_rows, [&](auto rows) {
      multiply_tile_packed<T, decltype(rows)::value, kPanels>(
          w, rows_in, stride, group, tile, store);
    });
  };
  for_each_tile<T>(
      input, stride, num_rows, kMax, kRowBlockBytes, group_begin, group_end, multiply);
}

// Groups [begin, end) of a product; the others are as in `multiply_packed`.
template <typename T, typename Store>
void multiply_some(
    const Packed<T>& w, const T* input, int64_t stride, int64_t num_rows, int64_t begin,
    int64_t end, const Store& store) {
  using Two = std::integral_constant<int, 2>;
  using Three = std::integral_constant<int, 3>;
  using Four = std::integral_constant<int, 4>;
  const auto run = [&](auto panels) {
    multiply_groups<T, decltype(panels)::value>(w, input, stride, num_rows, begin, end, store);
  };
  const auto run_in_tiles = [&](auto panels) {
    multiply_groups_in_tiles<T, decltype(panels)::value>(
        w, input, stride, num_rows, begin, end, store);
  };
  if constexpr (kTiles<T>) {
    if (goes_in_tiles<T>(w.num_steps)) {
      if (w.panels == 2) {
        return run_in_tiles(Two());
      }
      return run_in_tiles(Four());
    }
  }
  if (w.panels == 3) {
    return run(Three());
  }
  run(Four());
}

// A product, by a team: `store(row, first column, vectors of a group)` takes the sums. `input`
// [num_rows, stride] is zero from K to the stride, which is even where pairs are multiplied. Of few
// rows a group is a task, that another thread may compute again; of more, what one thread computes.
template <typename T, typename Store>
void multiply_packed(
    const Packed<T>& w, const T* input, int64_t stride, int64_t num_rows, Member& member,
    const Store& store) {
  const bool is_quick = num_rows <= kFewRows;
  const int64_t num_tasks = is_quick ? w.num_groups : member.num_threads();
  member.share(num_tasks, [&](int64_t task, Turn& turn) {
    if (!is_quick && !turn.take()) {
      return;
    }
    const int64_t begin = w.num_groups * task / num_tasks;
    const int64_t end = w.num_groups * (task + 1) / num_tasks;
    multiply_some(
        w, input, stride, num_rows, begin, end,
        [&](int64_t row, int64_t column, const auto& sums) {
          if (turn.take()) {
            store(row, column, sums);
          }
        });
  });
}

}  // namespace
