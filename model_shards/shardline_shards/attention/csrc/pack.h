// Packs weights for `product.h`.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>

#include <vector>

#include "arena.h"
#include "product.h"

namespace {

// Where packed rows come from: matrices one after the other, or two of them in turn, a vector of
// rows each.
struct PackSource {
  const std::vector<at::Tensor>& weights;  // each [N_i, K], contiguous
  bool in_turn;

  int64_t num_rows() const {
    if (in_turn) {
      return 2 * pad(weights[0].size(0));
    }
    int64_t total = 0;
    for (const at::Tensor& weight : weights) {
      total += weight.size(0);
    }
    return total;
  }

  // The row of packed column `index`, or null where there is padding.
  template <typename T>
  const T* row(int64_t index) const {
    size_t matrix = 0;
    if (in_turn) {
      const int64_t vector = index / kLanes;
      matrix = vector % 2;
      index = vector / 2 * kLanes + index % kLanes;
    } else {
      while (matrix < weights.size() && index >= weights[matrix].size(0)) {
        index -= weights[matrix++].size(0);
      }
    }
    if (matrix >= weights.size() || index >= weights[matrix].size(0)) {
      return nullptr;
    }
    return weights[matrix].const_data_ptr<T>() + index * weights[matrix].size(1);
  }
};

// The number of vectors in a group, 4 or `fewer`, that leaves the busiest thread the least to do.
inline int choose_panels(int64_t num_rows, int fewer, int64_t num_threads) {
  const auto busiest = [&](int64_t panels) {
    return divide_up(divide_up(num_rows, panels * kLanes), num_threads) * panels;
  };
  return busiest(4) <= busiest(fewer) ? 4 : fewer;
}

template <typename T>
void fill_group(const PackSource& source, int64_t group, int64_t panels, int64_t steps, T* out) {
  const int64_t size = source.weights[0].size(1);
  const int64_t columns = panels * kLanes;
  for (int64_t column = 0; column < columns; ++column) {
    const T* row = source.row<T>(group * columns + column);
    if (row == nullptr) {
      continue;  // the memory is zero
    }
    T* to = out + group * steps * columns * kDepth<T> + column * kDepth<T>;
    for (int64_t k = 0; k < size; ++k) {
      to[k / kDepth<T> * columns * kDepth<T> + k % kDepth<T>] = row[k];
    }
  }
}

// [groups, steps, panels, lanes, depth] of `source`, in memory of `arena`.
template <typename T>
at::Tensor pack(const PackSource& source, int64_t num_threads, Arena& arena) {
  const int64_t steps = divide_up(source.weights[0].size(1), kDepth<T>);
  const int fewer = goes_in_tiles<T>(steps) ? 2 : 3;  // Tiles are multiplied two by two.
  const int64_t panels = source.in_turn ? 4 : choose_panels(source.num_rows(), fewer, num_threads);
  const int64_t groups = divide_up(source.num_rows(), panels * kLanes);
  const int64_t count = groups * steps * panels * kLanes * kDepth<T>;
  const Allocation memory = arena.allocate(count * sizeof(T));
  T* out = reinterpret_cast<T*>(memory.data);
  at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      fill_group(source, group, panels, steps, out);
    }
  });
  return at::from_blob(
      out, {groups, steps, panels, kLanes, kDepth<T>}, [owner = memory.owner](void*) {},
      source.weights[0].options());
}

template <typename T>
Packed<T> unpacked(const at::Tensor& packed, int64_t num_outputs) {
  Packed<T> result;
  result.data = packed.const_data_ptr<T>();
  result.num_outputs = num_outputs;
  result.num_groups = packed.size(0);
  result.num_steps = packed.size(1);
  result.panels = static_cast<int>(packed.size(2));
  return result;
}

}  // namespace
