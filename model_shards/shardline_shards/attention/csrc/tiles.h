// Products of bf16 in the tile registers of AMX, for processors that have them: sixteen rows of the
// input with sixteen columns and 32 numbers of the depth at once. Weights lie as `product.h` says.

#pragma once

#include "vector_math.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && \
    defined(CPU_CAPABILITY_AVX512)
#define SHARDLINE_HAS_TILES
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int64_t kRowsInTile = 16;  // of the input
constexpr int64_t kTileSteps = 16;   // pairs of the depth

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

// A thread's tiles while it multiplies: sums in 0 to 3, input in 4, weights in 5 to 7.
class Tiles {
 public:
  ~Tiles() {
    if (num_rows_ != 0) {
      _tile_release();
    }
  }

  void take_rows(int64_t num_rows) {
    if (num_rows == num_rows_) {
      return;
    }
    TileShapes shapes;
    for (int tile = 0; tile < 8; ++tile) {
      shapes.row_bytes[tile] = kCacheLineBytes;
      shapes.num_rows[tile] = static_cast<uint8_t>(tile <= 4 ? num_rows : kTileSteps);
    }
    _tile_loadconfig(&shapes);
    num_rows_ = num_rows;
  }

 private:
  int64_t num_rows_ = 0;
};

// sums [rows, kPanels, kLanes] of as many rows as the tiles have taken; `num_steps` is a multiple of
// kTileSteps, and `fetch` takes a step for each of them.
template <int kPanels, typename Fetch>
C10_ALWAYS_INLINE void multiply_tiles(
    const at::BFloat16* input, int64_t stride, const at::BFloat16* weights, int64_t num_steps,
    Fetch fetch, float* sums) {
  static_assert(kLanes == 16 && (kPanels == 3 || kPanels == 4));
  constexpr int64_t kPanelSize = 2 * kLanes;
  constexpr int64_t kStepBytes = kPanels * kPanelSize * sizeof(at::BFloat16);
  constexpr int64_t kRowBytes = kPanels * kLanes * sizeof(float);
  const int64_t input_bytes = stride * static_cast<int64_t>(sizeof(at::BFloat16));
  const auto fetch_some = [&] {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      fetch.step();
    }
  };
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  if constexpr (kPanels == 4) {
    _tile_zero(3);
  }
  for (int64_t k = 0; k < num_steps; k += kTileSteps) {
    _tile_loadd(4, input, input_bytes);
    _tile_loadd(5, weights, kStepBytes);
    _tile_dpbf16ps(0, 4, 5);
    fetch_some();
    _tile_loadd(6, weights + kPanelSize, kStepBytes);
    _tile_dpbf16ps(1, 4, 6);
    fetch_some();
    _tile_loadd(7, weights + 2 * kPanelSize, kStepBytes);
    _tile_dpbf16ps(2, 4, 7);
    fetch_some();
    if constexpr (kPanels == 4) {
      _tile_loadd(5, weights + 3 * kPanelSize, kStepBytes);
      _tile_dpbf16ps(3, 4, 5);
    }
    fetch_some();
    input += 2 * kTileSteps;
    weights += kTileSteps * kPanels * kPanelSize;
  }
  _tile_stored(0, sums, kRowBytes);
  _tile_stored(1, sums + kLanes, kRowBytes);
  _tile_stored(2, sums + 2 * kLanes, kRowBytes);
  if constexpr (kPanels == 4) {
    _tile_stored(3, sums + 3 * kLanes, kRowBytes);
  }
}

#else

// Named where nothing goes in tiles, and never called.
template <typename T>
constexpr bool kTiles = false;

inline bool may_use_tiles() { return false; }

struct Tiles {
  void take_rows(int64_t) {}
};

template <int kPanels, typename Fetch>
void multiply_tiles(
    const at::BFloat16*, int64_t, const at::BFloat16*, int64_t, Fetch, float*) {}

#endif

}  // namespace
