// The walk of `walk.h` for a lone query. Here all depends on reading memory without a pause: keys and
// values are used where they lie, all heads of some tokens before the next tokens, and what comes next
// is fetched in small steps between the computing.

#pragma once

#include "lone_pairs.h"
#include "product.h"
#include "walk.h"

namespace {

// Scores of kRows rows against the keys at `offsets`, as many as a vector has lanes.
template <int kRows, typename P>
C10_ALWAYS_INLINE void score_rows(
    const P& p, const float* query, const typename P::T* keys, const int64_t* offsets, float* out) {
  Vec sums[kRows][kLanes];
  for (int64_t k = 0; k < kLanes; ++k) {
    prefetch_row(keys + offsets[k + kKeysAhead], p.dim());
    dot_rows<kRows>(query, p.dim(), keys + offsets[k], sums, k);
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    sum_lanes_of_each(sums[r]).store(out + r * kKeys);
  }
}

// A lone query and what it meets, in fp32.
struct LoneWide {
  template <typename P>
  static void load(const P& p, const Task& task, Scratch& s) {
    load_queries(p, task, s);
  }

  // Scores of kLanes keys of one head, for the rows from `first_row` on.
  template <typename P>
  C10_ALWAYS_INLINE static void score(
      const P& p, const typename P::T* keys, const int64_t* offsets, int64_t first_row, float* out,
      Scratch& s) {
    const float* query = s.query.data() + first_row * p.dim();
    int64_t rows = p.group;
    for (; rows >= 3; rows -= 3, query += 3 * p.dim(), out += 3 * kKeys) {
      score_rows<3>(p, query, keys, offsets, out);
    }
    for (; rows >= 1; rows -= 1, query += p.dim(), out += kKeys) {
      score_rows<1>(p, query, keys, offsets, out);
    }
  }

  // output += weights * values, of one head
  template <typename P>
  C10_ALWAYS_INLINE static void add(
      const P& p, const float* weights, const typename P::T* from, const int64_t* offsets,
      int64_t count, float* output) {
    const auto values = [from, offsets](int64_t k, int64_t j) {
      prefetch_row(from + offsets[k + kKeysAhead] + j, kLanes);
      return load_wide(from + offsets[k] + j);
    };
    multiply<true>(weights, kKeys, values, output, p.padded(), p.group, p.padded(), count);
  }

  static void finish(State&) {}
};

// Scores of the keys, weights of these, and what the values then yield; of up to kKeys.
template <typename Lone, typename P>
void attend_lone(const P& p, const Task& task, int64_t start, int64_t count, Scratch& s) {
  const int64_t num_rows = (task.head_end - task.head_begin) * p.group;
  for (int64_t j = 0; j < count; j += kLanes) {
    const auto* keys = p.key + task.head_begin * p.dim();
    for (int64_t row = 0; row < num_rows; row += p.group, keys += p.dim()) {
      Lone::score(p, keys, s.offsets + j, row, &s.scores[row * kKeys + j], s);
    }
  }
  for (int64_t row = 0; row < num_rows; row += p.group) {
    weigh(p, task, row, start, count, s.scores.data() + row * kKeys, s.state);
  }
  for (int64_t j = 0; j < count; j += kGroupKeys) {
    const int64_t some = std::min(kGroupKeys, count - j);
    const auto* values = p.value + task.head_begin * p.dim();
    for (int64_t row = 0; row < num_rows; row += p.group, values += p.dim()) {
      Lone::add(
          p, &s.scores[row * kKeys + j], values, s.offsets + j, some,
          &s.state.output[row * p.padded()]);
    }
  }
}

// The task's pieces, whose states are added up in order. Whether they are tasks of their own makes no
// difference to the result. `Lone` says how the query meets keys and values.
template <typename Lone, typename P>
State& walk_pieces(const P& p, const Task& task, const Task* then, Scratch& s) {
  const int64_t num_rows = p.group * (task.head_end - task.head_begin);
  s.reset(num_rows, p.padded());
  Lone::load(p, task, s);
  for (int64_t begin = task.key_begin; begin < task.key_end; begin += kPieceKeys) {
    const int64_t end = std::min(begin + kPieceKeys, task.key_end);
    s.state.reset(num_rows, p.padded());
    for (int64_t start = begin; start < end; start += kKeys) {
      find_keys(p, task, start, then, s);
      attend_lone<Lone>(p, task, start, std::min(kKeys, end - start), s);
    }
    if (begin == task.key_begin) {
      std::swap(s.total, s.state);
    } else {
      merge(s.total, s.state, p.padded());
    }
  }
  Lone::finish(s.total);
  return s.total;
}

template <typename P>
State& walk_lone(const P& p, const Task& task, const Task* then, Scratch& s) {
  if constexpr (kPairs<typename P::T>) {
    if (p.dim() % kPanelSize == 0) {
      return walk_pieces<LonePairs>(p, task, then, s);
    }
  }
  return walk_pieces<LoneWide>(p, task, then, s);
}

}  // namespace
