// Causal attention over paged KV memory on CPUs, and the write into it.
//
// A task is a tile of query tokens of one sequence over a range of KV heads and keys. What it
// computes depends on its own sequence alone: not on the batch, not on the threads.

#include "tasks.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstring>

namespace {

using at::Tensor;

template <typename P>
void attend_all(const P& p) {
  const int64_t num_threads = at::get_num_threads();
  Attention attention(p, num_threads);
  Team team(attention.num_tasks());
  at::parallel_for(0, num_threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      Member member(team, thread, num_threads);
      attention.work(p, member);
    }
  });
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
      is_pool(key_pool) && is_pool(value_pool) && key_pool.sizes() == value_pool.sizes() &&
          key_pool.stride(0) == value_pool.stride(0),
      "pools are [num_blocks, block_size, num_kv_heads, head_dim], blocks contiguous");
  TORCH_CHECK(
      key_pool.scalar_type() == dtype && value_pool.scalar_type() == dtype,
      "queries, keys, values and KV memory have one dtype");
}

void check_indexes(const Tensor& indexes, int64_t dim, at::ScalarType dtype) {
  TORCH_CHECK(
      indexes.dim() == dim && indexes.is_contiguous() && indexes.scalar_type() == dtype,
      "index tensors are contiguous, with the dims and dtypes of PagedBatch");
}

// Threads cannot throw: what they would trip over is found before they start.
template <typename P>
void check_sequences(const P& p, int64_t num_tokens) {
  TORCH_CHECK(
      p.query_start[0] == 0 && p.query_start[p.num_sequences] == num_tokens,
      "query_start covers all query tokens");
  for (int64_t i = 0; i < p.num_sequences; ++i) {
    const int64_t room = p.max_blocks * p.pool.block_size;
    TORCH_CHECK(
        p.query_len(i) >= 0 && p.query_len(i) <= p.kv_lens[i] && p.kv_lens[i] <= room, "sequence ",
        i, " has ", p.query_len(i), " query tokens, ", p.kv_lens[i], " tokens, room for ", room);
    for (int64_t block = 0; block < divide_up(p.kv_lens[i], p.pool.block_size); ++block) {
      const int64_t id = p.block_tables[i * p.max_blocks + block];
      TORCH_CHECK(id >= 0 && id < p.pool.num_blocks, "block ", id, " does not exist");
    }
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
    p.pool = shape_of_pool(key_pool);
    p.max_blocks = block_tables.size(1);
    p.num_kv_heads = key_pool.size(2);
    p.group = query.size(1) / p.num_kv_heads;
    p.head_dim = query.size(2);
    p.scaling = static_cast<float>(scaling);
    p.softcap = static_cast<float>(softcap.value_or(0.0));
    p.window = window.value_or(std::numeric_limits<int32_t>::max());
    check_sequences(p, query.size(0));
    attend_all(p);
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
  const PoolShape shape = shape_of_pool(pool);
  const int64_t num_slots = shape.num_slots();
  const int64_t heads = rows.size(1), dim = rows.size(2);
  const T* from = rows.const_data_ptr<T>();
  T* to = pool.mutable_data_ptr<T>();
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  for (int64_t token = 0; token < slots.size(0); ++token) {
    TORCH_CHECK(
        slot[token] >= 0 && slot[token] < num_slots, "slot ", slot[token], " of ", num_slots);
    T* place = to + shape.place_of_slot(slot[token]);
    for (int64_t head = 0; head < heads; ++head) {
      std::memcpy(
          place + head * dim,
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
