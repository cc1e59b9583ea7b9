// Where tokens lie in KV memory.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace {

// Keys or values of one layer, [num_blocks, block_size, num_kv_heads, head_dim]: dense within a
// block, while between two blocks there may be what other layers have. Sizes count numbers.
struct PoolShape {
  int64_t num_blocks, block_size, block_stride, token_size;

  int64_t num_slots() const { return num_blocks * block_size; }
  int64_t place(int64_t block, int64_t token) const {
    return block * block_stride + token * token_size;
  }
  int64_t place_of_slot(int64_t slot) const { return place(slot / block_size, slot % block_size); }
};

inline bool is_pool(const at::Tensor& pool) {
  return pool.dim() == 4 && pool.size(0) > 0 && pool.select(0, 0).is_contiguous();
}

inline PoolShape shape_of_pool(const at::Tensor& pool) {
  return {pool.size(0), pool.size(1), pool.stride(0), pool.size(2) * pool.size(3)};
}

}  // namespace
