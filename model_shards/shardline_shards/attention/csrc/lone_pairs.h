// A lone query and what it meets, where pairs of bf16 are multiplied; see `lone_walk.h`.

#pragma once

#include "problem.h"
#include "product.h"

namespace {

struct LonePairs;  // named where there is none, too

#ifdef SHARDLINE_HAS_PAIRS

constexpr int kRowsOfHead = 4;  // that registers hold the sums of, beside a row of values

// Scores of one row against the keys at `offsets`, as many as a vector has lanes.
template <bool kFetches, typename P>
C10_ALWAYS_INLINE void score_pairs_of_row(
    const P& p, const at::BFloat16* query, const at::BFloat16* keys, const int64_t* offsets,
    float* out) {
  Register sums[kLanes];
#pragma GCC unroll 16
  for (int64_t k = 0; k < kLanes; ++k) {
    if constexpr (kFetches) {
      prefetch_row(keys + offsets[k + kKeysAhead], p.dim());
    }
    const at::BFloat16* key = keys + offsets[k];
    sums[k] = Vec(0.f);
#pragma GCC unroll 4
    for (int64_t i = 0; i < p.dim(); i += kPanelSize) {
      sums[k] = _mm512_dpbf16_ps(
          sums[k], (__m512bh)_mm512_loadu_si512(query + i), (__m512bh)_mm512_loadu_si512(key + i));
    }
  }
  sum_lanes_of_each(sums).store(out);
}

// output[kRows, 2 * kVectors] += weights[kRows, count] * values. A vector of values is kLanes pairs:
// the first ones of these lie in one vector of the output, the second ones in the next.
template <int kRows, int kVectors>
C10_ALWAYS_INLINE void add_pairs_to_rows(
    const float* weights, const at::BFloat16* values, const int64_t* offsets, int64_t count,
    float* output, int64_t stride) {
  constexpr int kWide = 2 * kVectors;
  const __m512i upper_half = _mm512_set1_epi32(0xffff0000);
  Register sums[kRows][kWide];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) {
      sums[r][j] = _mm512_loadu_ps(output + r * stride + j * kLanes);
    }
  }
  for (int64_t k = 0; k < count; ++k) {
    Register wide[kWide];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      prefetch_row(values + offsets[k + kKeysAhead] + v * kPanelSize, kPanelSize);
      const __m512i pairs = _mm512_loadu_si512(values + offsets[k] + v * kPanelSize);
      wide[2 * v] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
      wide[2 * v + 1] = _mm512_castsi512_ps(_mm512_and_si512(pairs, upper_half));
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const __m512 weight = _mm512_set1_ps(weights[r * kKeys + k]);
#pragma GCC unroll 4
      for (int j = 0; j < kWide; ++j) {
        sums[r][j] = _mm512_fmadd_ps(weight, wide[j], sums[r][j]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) {
      _mm512_storeu_ps(output + r * stride + j * kLanes, sums[r][j]);
    }
  }
}

template <int kRows, typename P>
C10_ALWAYS_INLINE void add_pairs_of_head(
    const P& p, const float* weights, const at::BFloat16* values, const int64_t* offsets,
    int64_t count, float* output) {
  int64_t i = 0;
  for (; i + 2 * kPanelSize <= p.dim(); i += 2 * kPanelSize) {
    add_pairs_to_rows<kRows, 2>(weights, values + i, offsets, count, output + i, p.dim());
  }
  for (; i < p.dim(); i += kPanelSize) {
    add_pairs_to_rows<kRows, 1>(weights, values + i, offsets, count, output + i, p.dim());
  }
}

// For head sizes of whole vectors of pairs; functions as in `LoneWide`.
struct LonePairs {
  template <typename P>
  static void load(const P& p, const Task& task, Scratch& s) {
    const int64_t index = p.query_start[task.sequence] + task.first_token;
    const auto* token = p.query + index * p.query_token_stride;
    const int64_t begin = task.head_begin * p.group, end = task.head_end * p.group;
    s.bf16.query.resize((end - begin) * p.dim());
    for (int64_t head = begin; head < end; ++head) {
      std::copy_n(
          token + head * p.query_head_stride, p.dim(), &s.bf16.query[(head - begin) * p.dim()]);
    }
  }

  template <typename P>
  C10_ALWAYS_INLINE static void score(
      const P& p, const at::BFloat16* keys, const int64_t* offsets, int64_t first_row, float* out,
      Scratch& s) {
    const at::BFloat16* query = s.bf16.query.data() + first_row * p.dim();
    score_pairs_of_row<true>(p, query, keys, offsets, out);
    for (int64_t r = 1; r < p.group; ++r) {
      score_pairs_of_row<false>(p, query + r * p.dim(), keys, offsets, out + r * kKeys);
    }
  }

  template <typename P>
  C10_ALWAYS_INLINE static void add(
      const P& p, const float* weights, const at::BFloat16* values, const int64_t* offsets,
      int64_t count, float* output) {
    for (int64_t row = 0; row < p.group; row += kRowsOfHead) {
      with_rows<kRowsOfHead>(std::min<int64_t>(kRowsOfHead, p.group - row), [&](auto rows) {
        add_pairs_of_head<decltype(rows)::value>(
            p, weights + row * kKeys, values, offsets, count, output + row * p.dim());
      });
    }
  }

  // Puts the numbers of pairs beside each other again.
  static void finish(State& state) {
    const __m512i first =
        _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(kLanes / 2));
    for (size_t i = 0; i < state.output.size(); i += kPanelSize) {
      float* out = &state.output[i];
      const __m512 left = _mm512_loadu_ps(out), right = _mm512_loadu_ps(out + kLanes);
      _mm512_storeu_ps(out, _mm512_permutex2var_ps(left, first, right));
      _mm512_storeu_ps(out + kLanes, _mm512_permutex2var_ps(left, second, right));
    }
  }
};

#endif

}  // namespace
