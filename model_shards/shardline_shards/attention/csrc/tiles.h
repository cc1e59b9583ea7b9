// Products of bf16 in the tile registers of AMX, for processors that have them: sixteen rows of the
// input with sixteen columns and 32 numbers of the depth at once. Weights lie as `product.h` says.

#pragma once

#include "vector_math.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(SHARDLINE_HAS_PAIRS)
#define SHARDLINE_HAS_TILES
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int64_t kRowsInTile = 16;  // of the input
constexpr int64_t kRowsInPair = 2 * kRowsInTile;
constexpr int64_t kTileSteps = 16;   // pairs of the depth
constexpr int64_t kPanelSize = 32;   // of a step of the depth: a pair for each lane

#ifdef SHARDLINE_HAS_TILES

template <typename T>
constexpr bool kTiles = std::is_same_v<T, at::BFloat16>;

// Linux lets a process use tile registers once it has asked (Documentation/arch/x86/xstate.rst).
inline bool may_use_tiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  static const bool is_granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return is_granted;
}

// What `ldtilecfg` reads.
struct alignas(kCacheLineBytes) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t num_rows[16] = {};
};

// Rows of the upper one of the two tiles that so many rows make.
constexpr int64_t upper_rows(int64_t num_rows) { return divide_up(num_rows, 2); }

// A thread's tiles while it multiplies: sums in 0 to 3, input and weights in 4 to 7. The sums of two
// tiles of rows lie in turn.
class Tiles {
 public:
  ~Tiles() {
    if (num_rows_ != 0) {
      _tile_release();
    }
  }

  // For one tile of so many rows, or for two, each of which has about half of them.
  void take_rows(int64_t num_rows) {
    if (num_rows == num_rows_) {
      return;
    }
    TileShapes shapes;
    const bool is_pair = num_rows > kRowsInTile;
    const int64_t num_upper = is_pair ? upper_rows(num_rows) : num_rows;
    const int64_t num_lower = is_pair ? num_rows - num_upper : num_rows;
    for (int tile = 0; tile < 8; ++tile) {
      const bool is_input = tile == 4 || (is_pair && tile == 5);
      const bool is_weights = tile > 3 && !is_input;
      shapes.row_bytes[tile] = kCacheLineBytes;
      shapes.num_rows[tile] =
          static_cast<uint8_t>(is_weights ? kTileSteps : tile % 2 == 0 ? num_upper : num_lower);
    }
    // To gcc the intrinsic reads eight bytes, and whatever is written behind them is written in vain.
    __asm__ volatile("" : : "m"(shapes));
    _tile_loadconfig(&shapes);
    num_rows_ = num_rows;
  }

 private:
  int64_t num_rows_ = 0;
};

template <int kPanels>
constexpr int64_t kStepBytes = kPanels * kPanelSize * sizeof(at::BFloat16);
template <int kPanels>
constexpr int64_t kSumsBytes = kPanels * kLanes * sizeof(float);  // of a row

C10_ALWAYS_INLINE int64_t row_bytes(int64_t stride) {
  return stride * static_cast<int64_t>(sizeof(at::BFloat16));
}

C10_ALWAYS_INLINE void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

template <typename Fetching>
C10_ALWAYS_INLINE void fetch_some(Fetching& fetch) {
#pragma GCC unroll 4
  for (int64_t i = 0; i < kTileSteps / 4; ++i) {
    fetch.step();
  }
}

// sums [rows, kPanels, kLanes] of as many rows as the tiles have taken, a tile at most; `num_steps`
// is a multiple of kTileSteps, and `fetch` takes a step for each of them.
template <int kPanels, typename Fetching>
C10_ALWAYS_INLINE void multiply_tile(
    const at::BFloat16* input, int64_t stride, const at::BFloat16* weights, int64_t num_steps,
    Fetching fetch, float* sums) {
  static_assert(kLanes == 16 && (kPanels == 2 || kPanels == 4));
  const int64_t input_bytes = row_bytes(stride);
  zero_sums();
  for (int64_t k = 0; k < num_steps; k += kTileSteps) {
    _tile_loadd(4, input, input_bytes);
    _tile_loadd(5, weights, kStepBytes<kPanels>);
    _tile_dpbf16ps(0, 4, 5);
    fetch_some(fetch);
    _tile_loadd(6, weights + kPanelSize, kStepBytes<kPanels>);
    _tile_dpbf16ps(1, 4, 6);
    fetch_some(fetch);
    if constexpr (kPanels == 4) {
      _tile_loadd(7, weights + 2 * kPanelSize, kStepBytes<kPanels>);
      _tile_dpbf16ps(2, 4, 7);
    }
    fetch_some(fetch);
    if constexpr (kPanels == 4) {
      _tile_loadd(5, weights + 3 * kPanelSize, kStepBytes<kPanels>);
      _tile_dpbf16ps(3, 4, 5);
    }
    fetch_some(fetch);
    input += 2 * kTileSteps;
    weights += kTileSteps * kPanels * kPanelSize;
  }
  _tile_stored(0, sums, kSumsBytes<kPanels>);
  _tile_stored(1, sums + kLanes, kSumsBytes<kPanels>);
  if constexpr (kPanels == 4) {
    _tile_stored(2, sums + 2 * kLanes, kSumsBytes<kPanels>);
    _tile_stored(3, sums + 3 * kLanes, kSumsBytes<kPanels>);
  }
}

// The same for the two tiles that `num_rows` rows make, and for two panels of all: whatever is loaded
// is multiplied twice.
template <int kPanels, typename Fetching>
C10_ALWAYS_INLINE void multiply_pair(
    const at::BFloat16* input, int64_t stride, int64_t num_rows, const at::BFloat16* weights,
    int64_t num_steps, Fetching fetch, float* sums) {
  const int64_t input_bytes = row_bytes(stride);
  const int64_t num_upper = upper_rows(num_rows);
  const at::BFloat16* lower = input + num_upper * stride;
  float* lower_sums = sums + num_upper * kPanels * kLanes;
  zero_sums();
  for (int64_t k = 0; k < num_steps; k += kTileSteps) {
    _tile_loadd(4, input, input_bytes);
    _tile_loadd(6, weights, kStepBytes<kPanels>);
    _tile_dpbf16ps(0, 4, 6);
    fetch_some(fetch);
    _tile_loadd(5, lower, input_bytes);
    _tile_dpbf16ps(1, 5, 6);
    fetch_some(fetch);
    _tile_loadd(7, weights + kPanelSize, kStepBytes<kPanels>);
    _tile_dpbf16ps(2, 4, 7);
    fetch_some(fetch);
    _tile_dpbf16ps(3, 5, 7);
    fetch_some(fetch);
    input += 2 * kTileSteps;
    lower += 2 * kTileSteps;
    weights += kTileSteps * kPanels * kPanelSize;
  }
  _tile_stored(0, sums, kSumsBytes<kPanels>);
  _tile_stored(1, lower_sums, kSumsBytes<kPanels>);
  _tile_stored(2, sums + kLanes, kSumsBytes<kPanels>);
  _tile_stored(3, lower_sums + kLanes, kSumsBytes<kPanels>);
}

// sums [num_rows, kPanels, kLanes] of up to two tiles of rows, which `tiles` takes.
template <int kPanels, typename Fetching>
C10_ALWAYS_INLINE void multiply_tiles(
    Tiles& tiles, const at::BFloat16* input, int64_t stride, int64_t num_rows,
    const at::BFloat16* weights, int64_t num_steps, Fetching fetch, float* sums) {
  tiles.take_rows(num_rows);
  if (num_rows <= kRowsInTile) {
    return multiply_tile<kPanels>(input, stride, weights, num_steps, fetch, sums);
  }
  multiply_pair<kPanels>(input, stride, num_rows, weights, num_steps, fetch, sums);
  if constexpr (kPanels == 4) {
    multiply_pair<kPanels>(
        input, stride, num_rows, weights + 2 * kPanelSize, num_steps, Fetch<0>{nullptr},
        sums + 2 * kLanes);
  }
}

#else

// Named where nothing goes in tiles, and never called.
template <typename T>
constexpr bool kTiles = false;

inline bool may_use_tiles() { return false; }

struct Tiles {};

template <int kPanels, typename Fetching>
void multiply_tiles(
    Tiles&, const at::BFloat16*, int64_t, int64_t, const at::BFloat16*, int64_t, Fetching, float*) {
}

#endif

// Whether tile registers multiply over so many pairs of the depth: the same for any number of rows, whose results
// would else differ by their last bits.
template <typename T>
bool goes_in_tiles(int64_t num_steps) {
  return kTiles<T> && num_steps % kTileSteps == 0 && may_use_tiles();
}

}  // namespace
