// How attention is cut into tasks, and how threads work on them together.

#pragma once

#include "bf16_walk.h"
#include "lone_walk.h"
#include "team.h"

namespace {

constexpr int64_t kTileRows = 48;    // rows (tokens x heads of a KV head) aimed at in a tile
constexpr int64_t kRowsInBf16 = 96;  // likewise, where bf16 is multiplied

// Whether the queries of chunks are multiplied in bf16.
template <typename P>
bool walks_in_bf16(const P& p) {
  using T = typename P::T;
  return kPairs<T> && p.dim() % (2 * kTileSteps) == 0 && (!kTiles<T> || may_use_tiles());
}

// Whether a lone query has a walk of its own, or is a tile of one.
template <typename P>
bool is_walked_alone(const P& p) {
  return p.dim() % kLanes == 0;
}

// The keys that a sequence's last query sees.
template <typename P>
int64_t num_keys_seen(const P& p, int64_t sequence) {
  return std::min<int64_t>(p.kv_lens[sequence], p.window);
}

// How lone queries are cut into tasks, so that no thread is idle for long.
struct LonePlan {
  int64_t most_keys;  // of a query that is one task; the pieces of a longer one are tasks
  int64_t heads;      // KV heads of a piece: all, so that KV memory is read as one stream, or one,
                      // where threads would be idle otherwise

  template <typename P>
  LonePlan(const P& p, int64_t num_threads) : heads(p.num_kv_heads) {
    int64_t num_keys = 0, num_pieces = 0;
    for (int64_t sequence = 0; sequence < p.num_sequences; ++sequence) {
      if (p.query_len(sequence) == 1) {
        num_keys += num_keys_seen(p, sequence);
        num_pieces += divide_up(num_keys_seen(p, sequence), kPieceKeys);
      }
    }
    // Only the walk of a lone query stops between pieces, whoever walks them.
    most_keys = is_walked_alone(p) ? num_keys / (2 * num_threads) : 0;
    if (num_pieces < num_threads) {
      heads = 1;
    }
  }

  template <typename P>
  void add_tasks(const P& p, int64_t sequence, std::vector<Task>& tasks) const {
    const int64_t end = p.kv_lens[sequence], begin = end - num_keys_seen(p, sequence);
    if (end - begin <= most_keys) {
      tasks.push_back({sequence, 0, 1, 0, p.num_kv_heads, begin, end, 0, 1});
      return;
    }
    const int64_t num_pieces = divide_up(end - begin, kPieceKeys);
    for (int64_t head = 0; head < p.num_kv_heads; head += heads) {
      for (int64_t i = 0; i < num_pieces; ++i) {
        const int64_t from = begin + i * kPieceKeys, to = std::min(end, from + kPieceKeys);
        tasks.push_back({sequence, 0, 1, head, head + heads, from, to, i, num_pieces});
      }
    }
  }
};

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

// The state over all keys of the task. `then` is what this thread may do next, if there is something.
template <typename P>
State& run_task(const P& p, const Task& task, const Task* then, Scratch& s) {
  if (task.num_tokens == 1 && is_walked_alone(p)) {
    return walk_lone(p, task, then, s);
  }
  if constexpr (kPairs<typename P::T>) {
    if (task.num_tokens > 1 && walks_in_bf16(p)) {
      walk_in_bf16(p, task, s);
      return s.state;
    }
  }
  s.reset(task.num_tokens * p.group * (task.head_end - task.head_begin), p.padded());
  load_queries(p, task, s);
  for (int64_t start = task.key_begin; start < task.key_end; start += kKeys) {
    find_keys(p, task, start, nullptr, s);
    attend_tile(p, task, start, std::min(kKeys, task.key_end - start), s);
  }
  return s.state;
}

// All tasks of one layer of one step.
class Attention {
 public:
  template <typename P>
  Attention(const P& p, int64_t num_threads) {
    const LonePlan lone(p, num_threads);
    for (int64_t sequence = 0; sequence < p.num_sequences; ++sequence) {
      if (p.query_len(sequence) == 1) {
        lone.add_tasks(p, sequence, tasks_);
      } else {
        plan_chunk(p, sequence, tasks_);
      }
    }
    for (int64_t i = 0; i < num_tasks(); i += tasks_[i].num_pieces) {
      if (tasks_[i].num_pieces > 1) {
        first_pieces_.push_back(i);
      }
    }
    pieces_.resize(first_pieces_.empty() ? 0 : tasks_.size());
  }

  int64_t num_tasks() const { return static_cast<int64_t>(tasks_.size()); }

  // By each thread of a team.
  template <typename P>
  void work(const P& p, Member& member) {
    member.share(num_tasks(), [&](int64_t i, Turn& turn) { run(p, i, turn); });
    const int64_t num_cut = static_cast<int64_t>(first_pieces_.size());
    member.share(num_cut, [&](int64_t i, Turn& turn) {
      if (turn.take()) {
        add_up(p, first_pieces_[i]);
      }
    });
  }

 private:
  // Tiles of a chunk take so long that nobody else begins one that has been begun.
  template <typename P>
  void run(const P& p, int64_t i, Turn& turn) {
    const Task& task = tasks_[i];
    if (task.num_tokens > 1 && !turn.take()) {
      return;
    }
    const Task* then = i + 1 < num_tasks() ? &tasks_[i + 1] : nullptr;
    State& state = run_task(p, task, then, thread_scratch());
    if (!turn.take()) {
      return;
    }
    if (task.num_pieces == 1) {
      store_output(p, task, state);
    } else {
      std::swap(pieces_[i], state);
    }
  }

  template <typename P>
  void add_up(const P& p, int64_t first) {
    for (int64_t piece = 1; piece < tasks_[first].num_pieces; ++piece) {
      merge(pieces_[first], pieces_[first + piece], p.padded());
    }
    store_output(p, tasks_[first], pieces_[first]);
  }

  std::vector<Task> tasks_;
  std::vector<int64_t> first_pieces_;  // of those whose keys are the tasks of several
  std::vector<State> pieces_;          // by task
};

}  // namespace
