// Causal attention over paged KV memory on CPUs, and the write into it.
//
// A task is a tile of query tokens of one sequence over a range of KV heads and keys. It walks over
// its keys once, kKeys at a time, with the online softmax of FlashAttention
// (https://arxiv.org/abs/2205.14135), and takes all query heads of a KV head together, so that each
// key and value is read from memory once per tile. All arithmetic is fp32, whatever is stored.
// What a task computes depends on its own sequence alone: not on the batch, not on the threads.

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define CPU_CAPABILITY AVX512
#define CPU_CAPABILITY_AVX512
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define CPU_CAPABILITY AVX2
#define CPU_CAPABILITY_AVX2
#else
#define CPU_CAPABILITY DEFAULT
#endif

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <vector>

#include "vector_math.h"

namespace {

using at::Tensor;

constexpr int64_t kKeys = 64;        // keys in one turn of the walk
constexpr int64_t kKeysAhead = 32;   // how far in front of the walk memory is fetched
constexpr int64_t kTileRows = 48;    // query rows (tokens x heads of a KV head) aimed at in a tile
constexpr int64_t kPieceKeys = 1024; // a lone query's keys are cut into pieces no shorter than this
static_assert(kKeys % kLanes == 0);

// ---- the problem and one thread's memory -------------------------------------------------------

// kDim is the head size where the compiler may know it (that is a third of a decode's time), or 0.
template <typename Scalar, int kDim>
struct Problem {
  using T = Scalar;

  const T* query;  // [num_tokens, num_heads, head_dim], strides below
  const T* key;    // [num_blocks, block_size, num_kv_heads, head_dim]
  const T* value;  // likewise
  T* output;       // [num_tokens, num_heads, head_dim]
  const int32_t* query_start;
  const int32_t* kv_lens;
  const int32_t* block_tables;  // [num_sequences, max_blocks]
  int64_t query_token_stride, query_head_stride;
  int64_t num_sequences, num_blocks, block_size, max_blocks;
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
  int64_t piece, num_pieces;        // of the keys, when a lone query's are cut
};

// A task's state, row by row; the rows are heads x tokens x heads of the group.
struct State {
  std::vector<float> output;  // [rows, padded], not yet divided by `sum`
  std::vector<float> best;    // [rows], largest score so far
  std::vector<float> sum;     // [rows], sum of exp(score - best)

  void reset(int64_t rows, int64_t padded) {
    output.assign(rows * padded, 0.f);
    best.assign(rows, kNegativeInfinity);
    sum.assign(rows, 0.f);
  }
};

struct Scratch {
  State state;
  std::vector<float> query;   // [rows, head_dim], scaled
  std::vector<float> scores;  // [rows of a head, kKeys]
  std::vector<float> rows;    // [kLanes, padded]
  std::vector<float> keys;    // [padded, kKeys]: turned round
  std::vector<float> values;  // [kKeys, padded]
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

// ---- one task ----------------------------------------------------------------------------------

template <typename P>
void load_queries(const P& p, const Task& task, Scratch& s) {
  const int64_t first = p.query_start[task.sequence] + task.first_token;
  float* out = s.query.data();
  for (int64_t head = task.head_begin * p.group; head < task.head_end * p.group; head += p.group) {
    for (int64_t token = first; token < first + task.num_tokens; ++token) {
      for (int64_t g = 0; g < p.group; ++g, out += p.dim()) {
        const auto* row = p.query + token * p.query_token_stride + (head + g) * p.query_head_stride;
        for (int64_t i = 0; i < p.dim(); ++i) {
          out[i] = static_cast<float>(row[i]) * p.scaling;
        }
      }
    }
  }
}

// Offsets of the keys from `start` on; past the last key the last one is repeated.
template <typename P>
void find_keys(const P& p, const Task& task, int64_t start, Scratch& s) {
  const int32_t* table = p.block_tables + task.sequence * p.max_blocks;
  const int64_t stride = p.num_kv_heads * p.dim();
  const int64_t count = std::min(kKeys + kKeysAhead, task.key_end - start);
  int64_t place = start % p.block_size;
  for (int64_t j = 0, index = start / p.block_size; j < count; ++index, place = 0) {
    const int64_t block = table[index];
    TORCH_CHECK(block >= 0 && block < p.num_blocks, "block ", block, " does not exist");
    const int64_t first = (block * p.block_size + place) * stride;
    const int64_t end = std::min(count, j + p.block_size - place);
    for (int64_t i = 0; j < end; ++i, ++j) {
      s.offsets[j] = first + i * stride;
    }
  }
  std::fill(s.offsets + count, s.offsets + kKeys + kKeysAhead, s.offsets[count - 1]);
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

// Scores of a lone query: turning the keys round would cost more than it saves.
template <typename P>
void score_one(
    const P& p, const float* query, int64_t head, int64_t rows, int64_t count, Scratch& s) {
  const int64_t dim = p.dim();
  const auto* keys = p.key + head * dim;
  for (int64_t j = 0; j < count; ++j) {
    prefetch_row(keys + s.offsets[j + kKeysAhead], dim);
    const auto* key = keys + s.offsets[j];
    float* out = s.scores.data() + j;
    int64_t r = 0;
    for (; r + 3 <= rows; r += 3) {
      dot_rows<3>(query + r * dim, dim, key, out + r * kKeys, kKeys, dim);
    }
    for (; r < rows; ++r) {
      dot_rows<1>(query + r * dim, dim, key, out + r * kKeys, kKeys, dim);
    }
  }
}

// Turns the scores of the keys [start, start + count) into weights, and rescales the state to them.
template <typename P>
void weigh(
    const P& p, const Task& task, int64_t first_row, int64_t start, int64_t count, Scratch& s) {
  const int64_t offset = p.kv_lens[task.sequence] - p.query_len(task.sequence) + task.first_token;
  State& state = s.state;
  for (int64_t r = 0; r < task.num_tokens * p.group; ++r) {
    float* scores = s.scores.data() + r * kKeys;
    const int64_t position = offset + r / p.group - start;
    const int64_t begin = std::clamp<int64_t>(position - p.window + 1, 0, count);
    const int64_t end = std::clamp<int64_t>(position + 1, begin, count);
    if (begin == end) {
      std::fill(scores, scores + count, 0.f);
      continue;
    }
    if (p.softcap > 0.f) {
      soft_cap(scores, pad(count), p.softcap);
    }
    std::fill(scores, scores + begin, kNegativeInfinity);
    std::fill(scores + end, scores + pad(count), kNegativeInfinity);
    float& best = state.best[first_row + r];
    float& sum = state.sum[first_row + r];
    const float new_best = largest(scores, pad(count), best);
    const float shrink = std::exp(best - new_best);
    sum = sum * shrink + soften(scores, pad(count), new_best);
    best = new_best;
    if (shrink != 1.f) {
      scale_row(state.output.data() + (first_row + r) * p.padded(), shrink, p.padded());
    }
  }
}

template <typename P>
void add_values(
    const P& p, const Task& task, int64_t head, float* output, int64_t count, Scratch& s) {
  const int64_t rows = task.num_tokens * p.group;
  const auto* from = p.value + head * p.dim();
  const int64_t* offsets = s.offsets;
  if (task.num_tokens == 1 && p.dim() % kLanes == 0) {
    const auto in_place = [from, offsets](int64_t k, int64_t j) {
      prefetch_row(from + offsets[k + kKeysAhead] + j, kLanes);
      return load_wide(from + offsets[k] + j);
    };
    multiply<true>(
        s.scores.data(), kKeys, in_place, output, p.padded(), rows, p.padded(), count);
    return;
  }
  for (int64_t j = 0; j < count; ++j) {
    widen_row(from + offsets[j], s.values.data() + j * p.padded(), p.dim());
  }
  const auto widened = [&p, values = s.values.data()](int64_t k, int64_t j) {
    return Vec::loadu(values + k * p.padded() + j);
  };
  multiply<true>(s.scores.data(), kKeys, widened, output, p.padded(), rows, p.padded(), count);
}

template <typename P>
void run_task(const P& p, const Task& task, Scratch& s) {
  const int64_t rows = task.num_tokens * p.group;
  s.reset(rows * (task.head_end - task.head_begin), p.padded());
  load_queries(p, task, s);
  for (int64_t start = task.key_begin; start < task.key_end; start += kKeys) {
    const int64_t count = std::min(kKeys, task.key_end - start);
    find_keys(p, task, start, s);
    for (int64_t head = task.head_begin; head < task.head_end; ++head) {
      const int64_t first_row = (head - task.head_begin) * rows;
      const float* query = s.query.data() + first_row * p.dim();
      if (task.num_tokens == 1) {
        score_one(p, query, head, rows, count, s);
      } else {
        score_tile(p, query, head, rows, count, s);
      }
      weigh(p, task, first_row, start, count, s);
      add_values(p, task, head, s.state.output.data() + first_row * p.padded(), count, s);
    }
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
        const float share = 1.f / state.sum[row];
        for (int64_t i = 0; i < p.dim(); ++i) {
          out[i] = static_cast<T>(from[i] * share);
        }
      }
    }
  }
}

// Adds the state over some keys to the state over others.
void merge(State& into, const State& piece, int64_t padded) {
  for (size_t row = 0; row < into.best.size(); ++row) {
    const float best = std::max(into.best[row], piece.best[row]);
    const float keep = std::exp(into.best[row] - best);
    const float take = std::exp(piece.best[row] - best);
    into.best[row] = best;
    into.sum[row] = into.sum[row] * keep + piece.sum[row] * take;
    for (size_t i = row * padded; i < (row + 1) * padded; ++i) {
      into.output[i] = into.output[i] * keep + piece.output[i] * take;
    }
  }
}

// ---- all tasks ---------------------------------------------------------------------------------

// A lone query takes all KV heads, so that KV memory is read as one stream, and a long one is cut
// over its keys. The tiles of a chunk take one head each and stay within the cache; the last tiles
// cost most and go first.
template <typename P>
void plan_sequence(const P& p, int64_t sequence, std::vector<Task>& tasks) {
  const int64_t query_len = p.query_len(sequence);
  const int64_t first_position = p.kv_lens[sequence] - query_len;
  const auto key_begin = [&](int64_t token) {
    return std::max<int64_t>(0, first_position + token - p.window + 1);
  };
  if (query_len == 1) {
    const int64_t begin = key_begin(0), end = first_position + 1;
    const int64_t num_pieces = std::max<int64_t>(1, (end - begin) / kPieceKeys);
    const int64_t length = divide_up(end - begin, num_pieces);
    for (int64_t i = 0; i < num_pieces; ++i) {
      const int64_t from = begin + i * length, to = std::min(end, from + length);
      tasks.push_back({sequence, 0, 1, 0, p.num_kv_heads, from, to, i, num_pieces});
    }
    return;
  }
  const int64_t tile = std::max<int64_t>(2, kTileRows / p.group);
  for (int64_t first = divide_up(query_len, tile) * tile - tile; first >= 0; first -= tile) {
    const int64_t tokens = std::min(tile, query_len - first);
    const int64_t key_end = first_position + first + tokens;
    for (int64_t head = 0; head < p.num_kv_heads; ++head) {
      tasks.push_back(
          {sequence, first, tokens, head, head + 1, key_begin(first), key_end, 0, 1});
    }
  }
}

template <typename P>
void run_all(const P& p) {
  std::vector<Task> tasks;
  for (int64_t sequence = 0; sequence < p.num_sequences; ++sequence) {
    plan_sequence(p, sequence, tasks);
  }
  const int64_t num_tasks = static_cast<int64_t>(tasks.size());
  std::vector<State> pieces(num_tasks);
  std::atomic<int64_t> next{0};
  const int64_t num_threads = std::min<int64_t>(at::get_num_threads(), num_tasks);
  at::parallel_for(0, num_threads, 1, [&](int64_t, int64_t) {
    Scratch& scratch = thread_scratch();
    for (int64_t i = next++; i < num_tasks; i = next++) {
      run_task(p, tasks[i], scratch);
      if (tasks[i].num_pieces == 1) {
        store_output(p, tasks[i], scratch.state);
      } else {
        pieces[i] = scratch.state;
      }
    }
  });
  for (int64_t i = 0; i < num_tasks; ++i) {
    const int64_t left = tasks[i].num_pieces - 1 - tasks[i].piece;
    if (left > 0) {
      merge(pieces[i + 1], pieces[i], p.padded());
    } else if (tasks[i].num_pieces > 1) {
      store_output(p, tasks[i], pieces[i]);
    }
  }
}

// ---- the operators -----------------------------------------------------------------------------

// Calls `run` with a zero of the C++ type that `dtype` stands for.
template <typename Run>
void dispatch(at::ScalarType dtype, const Run& run) {
  switch (dtype) {
    case at::kFloat: return run(0.f);
    case at::kBFloat16: return run(at::BFloat16(0.f));
    case at::kHalf: return run(at::Half(0.f));
    default: TORCH_CHECK(false, "attention on CPUs takes float32, bfloat16 and float16");
  }
}

void check_pools(const Tensor& key_pool, const Tensor& value_pool, at::ScalarType dtype) {
  TORCH_CHECK(
      key_pool.dim() == 4 && key_pool.sizes() == value_pool.sizes() && key_pool.is_contiguous() &&
          value_pool.is_contiguous(),
      "pools are contiguous [num_blocks, block_size, num_kv_heads, head_dim]");
  TORCH_CHECK(
      key_pool.scalar_type() == dtype && value_pool.scalar_type() == dtype,
      "queries, keys, values and KV memory have one dtype");
}

void check_indexes(const Tensor& indexes, int64_t dim, at::ScalarType dtype) {
  TORCH_CHECK(
      indexes.dim() == dim && indexes.is_contiguous() && indexes.scalar_type() == dtype,
      "index tensors are contiguous, with the dims and dtypes of PagedBatch");
}

template <typename P>
void check_lengths(const P& p, int64_t num_tokens) {
  TORCH_CHECK(
      p.query_start[0] == 0 && p.query_start[p.num_sequences] == num_tokens,
      "query_start covers all query tokens");
  for (int64_t i = 0; i < p.num_sequences; ++i) {
    const int64_t room = p.max_blocks * p.block_size;
    TORCH_CHECK(
        p.query_len(i) >= 0 && p.query_len(i) <= p.kv_lens[i] && p.kv_lens[i] <= room, "sequence ",
        i, " has ", p.query_len(i), " query tokens, ", p.kv_lens[i], " tokens, room for ", room);
  }
}

Tensor paged_attend(
    const Tensor& query, const Tensor& key_pool, const Tensor& value_pool,
    const Tensor& query_start, const Tensor& kv_lens, const Tensor& block_tables, double scaling,
    std::optional<int64_t> window, std::optional<double> softcap) {
  check_pools(key_pool, value_pool, query.scalar_type());
  check_indexes(query_start, 1, at::kInt);
  check_indexes(kv_lens, 1, at::kInt);
  check_indexes(block_tables, 2, at::kInt);
  TORCH_CHECK(
      query_start.size(0) == kv_lens.size(0) + 1 && block_tables.size(0) == kv_lens.size(0),
      "query_start, kv_lens and block_tables disagree on the number of sequences");
  TORCH_CHECK(
      query.dim() == 3 && query.stride(2) == 1 && query.size(2) == key_pool.size(3) &&
          query.size(1) % key_pool.size(2) == 0,
      "query is [num_tokens, num_heads, head_dim] with whole groups of heads");
  Tensor output = at::empty(query.sizes(), query.options());
  const auto run = [&](auto p) {
    using T = typename decltype(p)::T;
    p.query = query.const_data_ptr<T>();
    p.key = key_pool.const_data_ptr<T>();
    p.value = value_pool.const_data_ptr<T>();
    p.output = output.mutable_data_ptr<T>();
    p.query_start = query_start.const_data_ptr<int32_t>();
    p.kv_lens = kv_lens.const_data_ptr<int32_t>();
    p.block_tables = block_tables.const_data_ptr<int32_t>();
    p.query_token_stride = query.stride(0);
    p.query_head_stride = query.stride(1);
    p.num_sequences = kv_lens.size(0);
    p.num_blocks = key_pool.size(0);
    p.block_size = key_pool.size(1);
    p.max_blocks = block_tables.size(1);
    p.num_kv_heads = key_pool.size(2);
    p.group = query.size(1) / p.num_kv_heads;
    p.head_dim = query.size(2);
    p.scaling = static_cast<float>(scaling);
    p.softcap = static_cast<float>(softcap.value_or(0.0));
    p.window = window.value_or(std::numeric_limits<int32_t>::max());
    check_lengths(p, query.size(0));
    run_all(p);
  };
  dispatch(query.scalar_type(), [&](auto zero) {
    switch (query.size(2)) {
      case 64: return run(Problem<decltype(zero), 64>());
      case 128: return run(Problem<decltype(zero), 128>());
      default: return run(Problem<decltype(zero), 0>());
    }
  });
  return output;
}

template <typename T>
void write_rows(const Tensor& rows, const Tensor& pool, const Tensor& slots) {
  const int64_t num_slots = pool.size(0) * pool.size(1);
  const int64_t heads = rows.size(1), dim = rows.size(2);
  const T* from = rows.const_data_ptr<T>();
  T* to = pool.mutable_data_ptr<T>();
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  for (int64_t token = 0; token < slots.size(0); ++token) {
    TORCH_CHECK(slot[token] >= 0 && slot[token] < num_slots, "slot ", slot[token], " of ", num_slots);
    for (int64_t head = 0; head < heads; ++head) {
      std::memcpy(
          to + (slot[token] * heads + head) * dim,
          from + token * rows.stride(0) + head * rows.stride(1), dim * sizeof(T));
    }
  }
}

void paged_write(
    const Tensor& key, const Tensor& value, const Tensor& key_pool, const Tensor& value_pool,
    const Tensor& slots) {
  check_pools(key_pool, value_pool, key.scalar_type());
  check_indexes(slots, 1, at::kLong);
  for (const Tensor& rows : {key, value}) {
    TORCH_CHECK(
        rows.scalar_type() == key_pool.scalar_type() && rows.dim() == 3 && rows.stride(2) == 1 &&
            rows.size(0) == slots.size(0) && rows.size(1) == key_pool.size(2) &&
            rows.size(2) == key_pool.size(3),
        "keys and values are [num_tokens, num_kv_heads, head_dim], one slot a token");
  }
  dispatch(key.scalar_type(), [&](auto zero) {
    write_rows<decltype(zero)>(key, key_pool, slots);
    write_rows<decltype(zero)>(value, value_pool, slots);
  });
}

}  // namespace

TORCH_LIBRARY(shardline, library) {
  library.def(
      "attend(Tensor query, Tensor key_pool, Tensor value_pool, Tensor query_start, "
      "Tensor kv_lens, Tensor block_tables, float scaling, int? window, float? softcap) -> Tensor");
  library.def(
      "write(Tensor key, Tensor value, Tensor(a!) key_pool, Tensor(b!) value_pool, Tensor slots) "
      "-> ()");
}

TORCH_LIBRARY_IMPL(shardline, CPU, library) {
  library.impl("attend", &paged_attend);
  library.impl("write", &paged_write);
}
