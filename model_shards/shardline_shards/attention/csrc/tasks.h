// How attention is cut into tasks, and how threads work on them together.

#pragma once

#include <atomic>

#include "bf16_walk.h"

namespace {

constexpr int64_t kTileRows = 48;     // rows (tokens x heads of a KV head) aimed at in a tile
constexpr int64_t kRowsInBf16 = 96;   // likewise, where bf16 is multiplied
constexpr int64_t kPieceKeys = 1024;  // a lone query's keys are cut into pieces at least so long

// Whether the queries of chunks are multiplied in bf16.
template <typename P>
bool walks_in_bf16(const P& p) {
  using T = typename P::T;
  return kPairs<T> && p.dim() % (2 * kTileSteps) == 0 && (!kTiles<T> || may_use_tiles());
}

// A lone query takes `heads` KV heads at a time: all, so that KV memory is read as one stream, or
// one, where threads would be idle otherwise. A long one is cut over its keys.
template <typename P>
void plan_lone(const P& p, int64_t sequence, int64_t heads, std::vector<Task>& tasks) {
  const int64_t end = p.kv_lens[sequence];
  const int64_t begin = std::max<int64_t>(0, end - p.window);
  const int64_t num_pieces = std::max<int64_t>(1, (end - begin) / kPieceKeys);
  const int64_t length = divide_up(end - begin, num_pieces);
  for (int64_t head = 0; head < p.num_kv_heads; head += heads) {
    for (int64_t i = 0; i < num_pieces; ++i) {
      const int64_t from = begin + i * length, to = std::min(end, from + length);
      tasks.push_back({sequence, 0, 1, head, head + heads, from, to, i, num_pieces});
    }
  }
}

// The tiles of a chunk take one head each and stay within the cache; the last tiles cost most and
// go first.
template <typename P>
void plan_chunk(const P& p, int64_t sequence, std::vector<Task>& tasks) {
  const int64_t query_len = p.query_len(sequence);
  const int64_t first_position = p.kv_lens[sequence] - query_len;
  const int64_t rows = walks_in_bf16(p) ? kRowsInBf16 : kTileRows;
  const int64_t tile = std::max<int64_t>(2, rows / p.group);
  for (int64_t first = divide_up(query_len, tile) * tile - tile; first >= 0; first -= tile) {
    const int64_t tokens = std::min(tile, query_len - first);
    const int64_t key_begin = std::max<int64_t>(0, first_position + first - p.window + 1);
    const int64_t key_end = first_position + first + tokens;
    for (int64_t head = 0; head < p.num_kv_heads; ++head) {
      tasks.push_back({sequence, first, tokens, head, head + 1, key_begin, key_end, 0, 1});
    }
  }
}

// `then` is what this thread may do next, if there is something.
template <typename P>
void run_task(const P& p, const Task& task, const Task* then, Scratch& s) {
  const bool is_lone = task.num_tokens == 1 && p.dim() % kLanes == 0;
  if constexpr (kPairs<typename P::T>) {
    if (task.num_tokens > 1 && walks_in_bf16(p)) {
      return walk_in_bf16(p, task, s);
    }
  }
  s.reset(task.num_tokens * p.group * (task.head_end - task.head_begin), p.padded());
  load_queries(p, task, s);
  for (int64_t start = task.key_begin; start < task.key_end; start += kKeys) {
    const int64_t count = std::min(kKeys, task.key_end - start);
    find_keys(p, task, start, is_lone ? then : nullptr, s);
    if (is_lone) {
      attend_lone(p, task, start, count, s);
    } else {
      attend_tile(p, task, start, count, s);
    }
  }
}

// All tasks of one layer of one step. Threads call `work`; when all are done, one calls `finish`.
class Attention {
 public:
  template <typename P>
  Attention(const P& p, int64_t num_threads) : num_threads_(num_threads) {
    const int64_t heads = p.num_sequences < 2 * num_threads ? 1 : p.num_kv_heads;
    for (int64_t sequence = 0; sequence < p.num_sequences; ++sequence) {
      if (p.query_len(sequence) == 1) {
        plan_lone(p, sequence, heads, tasks_);
      } else {
        plan_chunk(p, sequence, tasks_);
      }
    }
    for (const Task& task : tasks_) {
      has_pieces_ = has_pieces_ || task.num_pieces > 1;
    }
    pieces_.resize(has_pieces_ ? tasks_.size() : 0);
  }

  int64_t num_tasks() const { return static_cast<int64_t>(tasks_.size()); }
  bool has_pieces() const { return has_pieces_; }

  // For the next layer; by one thread, while none works.
  void restart() { next_.store(0, std::memory_order_relaxed); }

  template <typename P>
  void work(const P& p) {
    Scratch& scratch = thread_scratch();
    for (int64_t i = next_++; i < num_tasks(); i = next_++) {
      const int64_t then = i + num_threads_;
      run_task(p, tasks_[i], then < num_tasks() ? &tasks_[then] : nullptr, scratch);
      if (tasks_[i].num_pieces == 1) {
        store_output(p, tasks_[i], scratch.state);
      } else {
        pieces_[i] = scratch.state;
      }
    }
  }

  template <typename P>
  void finish(const P& p) {
    if (!has_pieces_) {
      return;
    }
    for (int64_t i = 0; i < num_tasks(); ++i) {
      const int64_t left = tasks_[i].num_pieces - 1 - tasks_[i].piece;
      if (left > 0) {
        merge(pieces_[i + 1], pieces_[i], p.padded());
      } else if (tasks_[i].num_pieces > 1) {
        store_output(p, tasks_[i], pieces_[i]);
      }
    }
  }

 private:
  int64_t num_threads_;
  std::vector<Task> tasks_;
  std::vector<State> pieces_;
  bool has_pieces_ = false;
  std::atomic<int64_t> next_{0};
};

}  // namespace
