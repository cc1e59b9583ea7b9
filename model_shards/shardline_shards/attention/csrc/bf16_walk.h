// The walk of `walk.h` for the queries of a chunk, with both products in bf16: in the tile registers of
// AMX, or where there are none in pairs. Keys are turned round and values laid in pairs, like packed
// weights, once a turn for all queries; weights are multiplied as sums of two bf16, which is 16 bits of
// them. Sums are fp32, as ever.

#pragma once

#include "product.h"
#include "tiles.h"
#include "walk.h"

namespace {

#ifdef SHARDLINE_HAS_PAIRS

constexpr Fetch<0> kNothing{nullptr};
constexpr int64_t kValueColumns = 2 * kLanes;  // of an output, that are computed at once
constexpr int64_t kValuesSize = kKeys * kValueColumns;
constexpr int64_t kKeysAtOnce = 2 * kTileSteps;  // that values are multiplied for
static_assert(kKeys % kKeysAtOnce == 0 && kKeysAtOnce % kLanes == 0);

inline int64_t whole_tiles(int64_t count) { return divide_up(count, kKeysAtOnce) * kKeysAtOnce; }

// Queries [rows, dim] of the task's head, as they are.
template <typename P>
void copy_queries(const P& p, const Task& task, at::BFloat16* out) {
  const int64_t first = p.query_start[task.sequence] + task.first_token;
  for (int64_t token = first; token < first + task.num_tokens; ++token) {
    const auto* heads = p.query + token * p.query_token_stride;
    for (int64_t g = 0; g < p.group; ++g, out += p.dim()) {
      const auto* row = heads + (task.head_begin * p.group + g) * p.query_head_stride;
      std::copy_n(row, p.dim(), out);
    }
  }
}

// Keys as [dim / 2, kKeys, 2]: columns of a product. Beyond the last key there are copies of it.
template <typename P>
void turn_keys(const P& p, int64_t head, int64_t count, Scratch& s) {
  const int64_t num_pairs = p.dim() / 2;
  const auto* rows = reinterpret_cast<const float*>(s.bf16.rows.data());
  auto* out = reinterpret_cast<float*>(s.bf16.keys.data());
  for (int64_t j = 0; j < pad(count); j += kLanes) {
    for (int64_t r = 0; r < kLanes; ++r) {
      std::copy_n(p.key + s.offsets[j + r] + head * p.dim(), p.dim(), &s.bf16.rows[r * p.dim()]);
    }
    for (int64_t i = 0; i < num_pairs; i += kLanes) {
      at::vec::transpose_mxn<float, kLanes, kLanes>(rows + i, num_pairs, out + i * kKeys + j, kKeys);
    }
  }
}

// The kValueColumns numbers of two rows in turn: half of them at `out`, half a panel further.
inline void pair_up(const at::BFloat16* even, const at::BFloat16* odd, at::BFloat16* out) {
  const __m512i first = _mm512_set_epi16(
      47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35,
      3, 34, 2, 33, 1, 32, 0);
  const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  const __m512i a = _mm512_loadu_si512(even), b = _mm512_loadu_si512(odd);
  _mm512_store_si512(out, _mm512_permutex2var_epi16(a, first, b));
  _mm512_store_si512(out + kPanelSize, _mm512_permutex2var_epi16(a, second, b));
}

// Values as [dim / kValueColumns, kKeys / 2, 2, kLanes, 2], in whole tiles: beyond the last key there
// are copies of its own, which weigh nothing. What others left there might be no number.
template <typename P>
void lay_values(const P& p, int64_t head, int64_t count, Scratch& s) {
  for (int64_t j = 0; j < whole_tiles(count); j += 2) {
    const auto* even = p.value + s.offsets[j] + head * p.dim();
    const auto* odd = p.value + s.offsets[j + 1] + head * p.dim();
    at::BFloat16* out = s.bf16.values.data() + j * kPanelSize;
    for (int64_t i = 0; i < p.dim(); i += kValueColumns, out += kValuesSize) {
      pair_up(even + i, odd + i, out);
    }
  }
}

// A row's weights of `count` keys as the sum of two bf16.
inline void split_weights(
    const float* weights, int64_t count, at::BFloat16* whole, at::BFloat16* rest) {
  const auto widen = [](__m256i half) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  };
  for (int64_t j = 0; j < count; j += 2 * kLanes) {
    const __m512 low = _mm512_loadu_ps(weights + j), high = _mm512_loadu_ps(weights + j + kLanes);
    const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    const __m512 low_rest = low - widen(_mm512_castsi512_si256(rounded));
    const __m512 high_rest = high - widen(_mm512_extracti64x4_epi64(rounded, 1));
    _mm512_store_si512(whole + j, rounded);
    _mm512_store_si512(rest + j, (__m512i)_mm512_cvtne2ps_pbh(high_rest, low_rest));
  }
}

// Calls `run(first, num_rows)` for every two tiles of rows.
template <typename Run>
C10_ALWAYS_INLINE void for_each_pair(int64_t num_rows, const Run& run) {
  for (int64_t first = 0; first < num_rows; first += kRowsInPair) {
    run(first, std::min(kRowsInPair, num_rows - first));
  }
}

// sums [num_rows, kPanels, kLanes], as `multiply_tiles` has them, a few rows at a time
template <int kPanels>
void multiply_in_pairs(
    const at::BFloat16* input, int64_t stride, int64_t num_rows, const at::BFloat16* weights,
    int64_t num_steps, float* sums) {
  constexpr int kMax = max_rows(kPanels);
  for (int64_t row = 0; row < num_rows; row += kMax, input += kMax * stride) {
    with_rows<kMax>(std::min<int64_t>(kMax, num_rows - row), [&](auto rows) {
      Register some[decltype(rows)::value][kPanels];
      multiply_pass<at::BFloat16, decltype(rows)::value, kPanels>(
          input, stride, weights, kPanels * kPanelSize, num_steps, kNothing, some);
      for (int r = 0; r < rows; ++r) {
        for (int p = 0; p < kPanels; ++p, sums += kLanes) {
          Vec(some[r][p]).store(sums);
        }
      }
    });
  }
}

template <int kPanels>
void multiply_bf16(
    Tiles& tiles, const at::BFloat16* input, int64_t stride, int64_t num_rows,
    const at::BFloat16* weights, int64_t num_steps, float* sums) {
  if constexpr (kTiles<at::BFloat16>) {
    multiply_tiles<kPanels>(tiles, input, stride, num_rows, weights, num_steps, kNothing, sums);
  } else {
    multiply_in_pairs<kPanels>(input, stride, num_rows, weights, num_steps, sums);
  }
}

// scores [rows, kKeys] = queries * keys
template <typename P>
void score_pairs(const P& p, int64_t num_rows, Tiles& tiles, Scratch& s) {
  for_each_pair(num_rows, [&](int64_t first, int64_t some) {
    multiply_bf16<kKeys / kLanes>(
        tiles, s.bf16.query.data() + first * p.dim(), p.dim(), some, s.bf16.keys.data(),
        p.dim() / 2, s.scores.data() + first * kKeys);
  });
}

// Turns the scores into weights, in whole tiles.
template <typename P>
void weigh_rows(
    const P& p, const Task& task, int64_t start, int64_t count, int64_t num_rows, Scratch& s) {
  float* scores = s.scores.data();
  for (int64_t r = 0; r < num_rows; ++r, scores += kKeys) {
    s.bf16.shrink[r] = weigh_row(p, task, r, start, count, scores, s.state);
    std::fill(scores + pad(count), scores + whole_tiles(count), 0.f);
    split_weights(
        scores, whole_tiles(count), &s.bf16.weights[r * kKeys], &s.bf16.rests[r * kKeys]);
  }
}

// output [num_rows] = shrink * output + one + other, in kValueColumns columns
inline void add_sums(
    const float* shrink, const float* one, const float* other, int64_t num_rows, float* output,
    int64_t stride) {
  for (int64_t r = 0; r < num_rows; ++r, output += stride) {
    for (int64_t j = 0; j < kValueColumns; j += kLanes, one += kLanes, other += kLanes) {
      const Vec sum = Vec::loadu(one) + Vec::loadu(other);
      at::vec::fmadd(Vec::loadu(output + j), Vec(shrink[r]), sum).store(output + j);
    }
  }
}

// output [rows, dim] = shrink * output + weights * values
template <typename P>
void add_pairs(const P& p, int64_t count, int64_t num_rows, Tiles& tiles, Scratch& s) {
  alignas(kCacheLineBytes) float sums[2][kRowsInPair * kValueColumns];
  for_each_pair(num_rows, [&](int64_t first, int64_t some) {
    const at::BFloat16* values = s.bf16.values.data();
    for (int64_t i = 0; i < p.dim(); i += kValueColumns, values += kValuesSize) {
      const auto add_up = [&](const Lines<at::BFloat16>& weights, float* out) {
        multiply_bf16<kValueColumns / kLanes>(
            tiles, weights.data() + first * kKeys, kKeys, some, values, whole_tiles(count) / 2, out);
      };
      add_up(s.bf16.weights, sums[0]);
      add_up(s.bf16.rests, sums[1]);
      add_sums(
          &s.bf16.shrink[first], sums[0], sums[1], some,
          s.state.output.data() + first * p.padded() + i, p.padded());
    }
  });
}

template <typename P>
void walk_in_bf16(const P& p, const Task& task, Scratch& s) {
  const int64_t num_rows = task.num_tokens * p.group;
  s.state.reset(num_rows, p.padded());
  s.bf16.reset(num_rows, p.dim());
  s.scores.resize(num_rows * kKeys);
  copy_queries(p, task, s.bf16.query.data());
  Tiles tiles;
  for (int64_t start = task.key_begin; start < task.key_end; start += kKeys) {
    const int64_t count = std::min(kKeys, task.key_end - start);
    find_keys(p, task, start, nullptr, s);
    turn_keys(p, task.head_begin, count, s);
    lay_values(p, task.head_begin, count, s);
    score_pairs(p, num_rows, tiles, s);
    weigh_rows(p, task, start, count, num_rows, s);
    add_pairs(p, count, num_rows, tiles, s);
  }
}

#endif

}  // namespace
