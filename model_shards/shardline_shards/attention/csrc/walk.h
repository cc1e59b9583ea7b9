// One task: a walk over some keys of a sequence, kKeys at a time, with the online softmax of
// FlashAttention (https://arxiv.org/abs/2205.14135). All query heads of a KV head go together, so
// that each key and value is read from memory once. All arithmetic is fp32, whatever is stored.

#pragma once

#include "problem.h"
#include "rows.h"

namespace {

template <typename P>
void load_queries(const P& p, const Task& task, Scratch& s) {
  const int64_t first = p.query_start[task.sequence] + task.first_token;
  float* out = s.query.data();
  for (int64_t head = task.head_begin * p.group; head < task.head_end * p.group; head += p.group) {
    for (int64_t token = first; token < first + task.num_tokens; ++token) {
      for (int64_t g = 0; g < p.group; ++g, out += p.dim()) {
        const auto* row = p.query + token * p.query_token_stride + (head + g) * p.query_head_stride;
        for (int64_t i = 0; i < p.dim(); ++i) {
          out[i] = static_cast<float>(row[i]);
        }
      }
    }
  }
}

// Offsets of `count` keys from `start` on.
template <typename P>
void place_keys(const P& p, int64_t sequence, int64_t start, int64_t count, int64_t* offsets) {
  const int32_t* table = p.block_tables + sequence * p.max_blocks;
  int64_t token = start % p.pool.block_size;
  for (int64_t j = 0, index = start / p.pool.block_size; j < count; ++index, token = 0) {
    const int64_t block = table[index];
    const int64_t end = std::min(count, j + p.pool.block_size - token);
    for (; j < end; ++token, ++j) {
      offsets[j] = p.pool.place(block, token);
    }
  }
}

// Offsets of the keys from `start` on. Behind the last key there are the first ones of the task
// that comes `then`, which may be fetched by then, and copies of the last one.
template <typename P>
void find_keys(const P& p, const Task& task, int64_t start, const Task* then, Scratch& s) {
  constexpr int64_t kMost = kKeys + kKeysAhead;
  const int64_t own = std::min(kMost, task.key_end - start);
  const int64_t others =
      then == nullptr ? 0 : std::min(kMost - own, then->key_end - then->key_begin);
  place_keys(p, task.sequence, start, own, s.offsets);
  if (others > 0) {
    place_keys(p, then->sequence, then->key_begin, others, s.offsets + own);
  }
  std::fill(s.offsets + own + others, s.offsets + kMost, s.offsets[own - 1]);
}

// Scores of a tile: the keys are turned round first, so that a vector holds one dim of many keys.
template <typename P>
void score_tile(
    const P& p, const float* query, int64_t head, int64_t rows, int64_t count, Scratch& s) {
  for (int64_t j = 0; j < count; j += kLanes) {
    for (int64_t r = 0; r < std::min(kLanes, count - j); ++r) {
      const auto* key = p.key + s.offsets[j + r] + head * p.dim();
      widen_row(key, s.rows.data() + r * p.padded(), p.dim());
    }
    for (int64_t i = 0; i < p.padded(); i += kLanes) {
      at::vec::transpose_mxn<float, kLanes, kLanes>(
          s.rows.data() + i, p.padded(), s.keys.data() + i * kKeys + j, kKeys);
    }
  }
  const auto keys = [from = s.keys.data()](int64_t k, int64_t j) {
    return Vec::loadu(from + k * kKeys + j);
  };
  multiply<false>(query, p.dim(), keys, s.scores.data(), kKeys, rows, pad(count), p.dim());
}

// Turns a row's scores of the keys [start, start + count) into weights; returns what its output so
// far is to be multiplied with.
template <typename P>
float weigh_row(
    const P& p, const Task& task, int64_t row, int64_t start, int64_t count, float* scores,
    State& state) {
  const int64_t num_before = p.kv_lens[task.sequence] - p.query_len(task.sequence);
  const int64_t token = task.first_token + row / p.group % task.num_tokens;
  const int64_t position = num_before + token - start;
  const int64_t begin = std::clamp<int64_t>(position - p.window + 1, 0, count);
  const int64_t end = std::clamp<int64_t>(position + 1, begin, count);
  if (begin == end) {
    std::fill(scores, scores + pad(count), 0.f);
    return 1.f;
  }
  if (p.softcap > 0.f) {
    soft_cap(scores, pad(count), p.softcap, p.scaling);
  }
  const float scale = p.softcap > 0.f ? 1.f : p.scaling;
  std::fill(scores, scores + begin, kNegativeInfinity);
  std::fill(scores + end, scores + pad(count), kNegativeInfinity);
  const float old_best = state.best[row];
  const float best = largest(scores, pad(count), scale, old_best);
  const float shrink = best == old_best ? 1.f : std::exp(old_best - best);
  state.best[row] = best;
  Vec sum = Vec::loadu(&state.sum[row * kLanes]) * Vec(shrink);
  soften(scores, pad(count), scale, best, sum);
  sum.store(&state.sum[row * kLanes]);
  return shrink;
}

// The same for some rows from `first_row` on, the output done.
template <typename P>
void weigh(
    const P& p, const Task& task, int64_t first_row, int64_t start, int64_t count, float* scores,
    State& state) {
  const int64_t end = first_row + task.num_tokens * p.group;
  for (int64_t row = first_row; row < end; ++row, scores += kKeys) {
    const float shrink = weigh_row(p, task, row, start, count, scores, state);
    if (shrink != 1.f) {
      scale_row(state.output.data() + row * p.padded(), shrink, p.padded());
    }
  }
}

template <typename P>
void add_tile(const P& p, int64_t head, float* output, int64_t rows, int64_t count, Scratch& s) {
  for (int64_t j = 0; j < count; ++j) {
    const auto* value = p.value + s.offsets[j] + head * p.dim();
    widen_row(value, s.values.data() + j * p.padded(), p.dim());
  }
  const auto values = [&p, from = s.values.data()](int64_t k, int64_t j) {
    return Vec::loadu(from + k * p.padded() + j);
  };
  multiply<true>(s.scores.data(), kKeys, values, output, p.padded(), rows, p.padded(), count);
}

// One turn of the walk for a tile of queries: head by head, on widened copies of keys and values.
template <typename P>
void attend_tile(const P& p, const Task& task, int64_t start, int64_t count, Scratch& s) {
  const int64_t rows = task.num_tokens * p.group;
  for (int64_t head = task.head_begin; head < task.head_end; ++head) {
    const int64_t first_row = (head - task.head_begin) * rows;
    score_tile(p, s.query.data() + first_row * p.dim(), head, rows, count, s);
    weigh(p, task, first_row, start, count, s.scores.data(), s.state);
    add_tile(p, head, s.state.output.data() + first_row * p.padded(), rows, count, s);
  }
}

template <typename P>
void store_output(const P& p, const Task& task, const State& state) {
  using T = typename P::T;
  const int64_t first = p.query_start[task.sequence] + task.first_token;
  const float* from = state.output.data();
  int64_t row = 0;
  for (int64_t head = task.head_begin * p.group; head < task.head_end * p.group; head += p.group) {
    for (int64_t token = first; token < first + task.num_tokens; ++token) {
      T* out = p.output + (token * p.num_kv_heads * p.group + head) * p.dim();
      for (int64_t g = 0; g < p.group; ++g, ++row, out += p.dim(), from += p.padded()) {
        const Vec share(1.f / sum_lanes(Vec::loadu(&state.sum[row * kLanes])));
        for (int64_t i = 0; i < p.dim(); i += kLanes) {
          store_narrow(Vec::loadu(from + i) * share, out + i, std::min(kLanes, p.dim() - i));
        }
      }
    }
  }
}

// Adds the state over some keys to the state over others.
inline void merge(State& into, const State& piece, int64_t padded) {
  const auto num_rows = static_cast<int64_t>(into.best.size());
  for (int64_t first = 0; first < num_rows; first += kLanes) {
    const auto count = static_cast<int>(std::min(kLanes, num_rows - first));
    const Vec old_best = Vec::loadu(&into.best[first], count);
    const Vec other_best = Vec::loadu(&piece.best[first], count);
    const Vec best = larger(old_best, other_best);
    best.store(&into.best[first], count);
    float keep[kLanes], take[kLanes];
    (old_best - best).exp_u20().store(keep);
    (other_best - best).exp_u20().store(take);
    for (int64_t r = 0; r < count; ++r) {
      const auto add_up = [&](float* sum, const float* other, int64_t size) {
        for (int64_t i = 0; i < size; i += kLanes) {
          const Vec kept = Vec::loadu(sum + i) * Vec(keep[r]);
          at::vec::fmadd(Vec::loadu(other + i), Vec(take[r]), kept).store(sum + i);
        }
      };
      const int64_t row = first + r;
      add_up(&into.sum[row * kLanes], &piece.sum[row * kLanes], kLanes);
      add_up(&into.output[row * padded], &piece.output[row * padded], padded);
    }
  }
}

}  // namespace
