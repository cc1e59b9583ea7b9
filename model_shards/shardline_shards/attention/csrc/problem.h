// What is computed, the pieces it is cut into, and one thread's working memory.

#pragma once

#include <cstdint>
#include <vector>

#include "pool.h"
#include "tiles.h"
#include "vector_math.h"

namespace {

constexpr int64_t kKeys = 64;       // keys in one turn of the walk
constexpr int64_t kKeysAhead = 24;  // how far in front of a lone query memory is fetched
constexpr int64_t kGroupKeys = 16;  // tokens that a lone query takes head by head
constexpr int64_t kPieceKeys = 128;  // a lone query's keys are cut into pieces of so many
static_assert(kKeys % kLanes == 0 && kKeys % kGroupKeys == 0 && kPieceKeys % kKeys == 0);

// kDim is the head size where the compiler may know it (that is a third of a decode's time), or 0.
template <typename Scalar, int kDim>
struct Problem {
  using T = Scalar;

  const T* query;  // [num_tokens, num_heads, head_dim], strides below
  const T* key;    // of `pool`
  const T* value;  // likewise
  T* output;       // [num_tokens, num_heads, head_dim]
  const int32_t* query_start;
  const int32_t* kv_lens;
  const int32_t* block_tables;  // [num_sequences, max_blocks]
  int64_t query_token_stride, query_head_stride;
  PoolShape pool;
  int64_t num_sequences, max_blocks;
  int64_t num_kv_heads, group, head_dim;
  float scaling;
  float softcap;   // 0: none
  int64_t window;  // the largest distance that is seen, plus one

  int64_t dim() const { return kDim == 0 ? head_dim : kDim; }
  int64_t padded() const { return pad(dim()); }
  int64_t query_len(int64_t i) const { return query_start[i + 1] - query_start[i]; }
};

struct Task {
  int64_t sequence;
  int64_t first_token, num_tokens;  // of the sequence's query tokens
  int64_t head_begin, head_end;     // KV heads
  int64_t key_begin, key_end;
  int64_t piece, num_pieces;        // of a lone query's keys, where each is a task of its own
};

// A task's state, row by row; the rows are heads x tokens x heads of the group.
struct State {
  Lines<float> output;  // [rows, padded], not yet divided by `sum`
  Lines<float> best;    // [rows], largest score so far
  Lines<float> sum;     // [rows, kLanes], sums of exp(score - best) over every kLanes-th key

  void reset(int64_t rows, int64_t padded) {
    output.assign(rows * padded, 0.f);
    best.assign(rows, kNegativeInfinity);
    sum.assign(rows * kLanes, 0.f);
  }
};

// What a walk in bf16 has beside; see `bf16_walk.h`.
struct Bf16Scratch {
  Lines<at::BFloat16> query;           // [rows, head_dim]
  Lines<at::BFloat16> rows;            // [kLanes, head_dim]
  Lines<at::BFloat16> keys, values;    // [kKeys, head_dim], laid out like packed weights
  Lines<at::BFloat16> weights, rests;  // [rows, kKeys]
  Lines<float> shrink;                 // [rows]

  void reset(int64_t num_rows, int64_t dim) {
    query.resize(num_rows * dim);
    rows.resize(kLanes * dim);
    keys.resize(kKeys * dim);
    values.resize(kKeys * dim);
    weights.resize(num_rows * kKeys);
    rests.resize(num_rows * kKeys);
    shrink.resize(num_rows);
  }
};

struct Scratch {
  State state;
  State total;  // of the pieces so far
  Bf16Scratch bf16;
  Lines<float> query;   // [rows, head_dim]
  Lines<float> scores;  // [rows, kKeys]
  Lines<float> rows;    // [kLanes, padded]
  Lines<float> keys;    // [padded, kKeys]: turned round
  Lines<float> values;  // [kKeys, padded]
  int64_t offsets[kKeys + kKeysAhead];  // where in the pools each key's first head starts

  void reset(int64_t rows, int64_t padded) {
    state.reset(rows, padded);
    query.resize(rows * padded);
    scores.resize(rows * kKeys);
    this->rows.resize(kLanes * padded);
    keys.resize(padded * kKeys);
    values.resize(kKeys * padded);
  }
};

// Not inlined, or gcc asks for the thread's address again in every turn of the inner loops.
C10_NOINLINE Scratch& thread_scratch() {
  thread_local Scratch scratch;
  return scratch;
}

}  // namespace
