// One step through the decoder layers of a stage, for models laid out like llama: RMS norm, rotary
// attention over grouped heads, RMS norm, SwiGLU; biases and norms of queries and keys as given.
//
// All threads of a team go through all layers together, phase by phase. Hidden states stay fp32 from
// the first layer to the last; what enters a product is rounded to the weights' dtype.

#pragma once

#include <exception>
#include <memory>
#include <optional>

#include "product.h"
#include "rows.h"
#include "shared_memory.h"
#include "tasks.h"
#include "team.h"

namespace {

struct StackShape {
  int64_t hidden_size, num_heads, num_kv_heads, head_dim;
  float eps;

  int64_t query_size() const { return num_heads * head_dim; }
  int64_t kv_size() const { return num_kv_heads * head_dim; }
};

// One layer's weights and KV memory; norms and biases are fp32, null where there are none.
template <typename T>
struct Layer {
  Packed<T> qkv, output, gate_up, down;  // gate_up: vectors of gate and up in turn
  const float *input_norm, *qkv_bias, *query_norm, *key_norm, *mlp_norm;
  int64_t mlp_size;
  float scaling;
  int64_t window;
  T *key, *value;
};

// out[column...] = sums (+ bias), as far as `width` goes
template <size_t kPanels>
void store_sums(
    const Register (&sums)[kPanels], const float* bias, float* out, int64_t column, int64_t width) {
  for (size_t p = 0; p < kPanels && column < width; ++p, column += kLanes) {
    const int count = static_cast<int>(std::min(kLanes, width - column));
    Vec sum(sums[p]);
    if (bias != nullptr) {
      sum = sum + Vec::loadu(bias + column, count);
    }
    sum.store(out + column, count);
  }
}

// What one step is about; as in PagedBatch.
struct StepShape {
  int64_t num_rows;
  const float *cos, *sin;    // [positions, head_dim]
  const int64_t* positions;  // [num_rows]
  const int64_t* slots;      // [num_rows]
  const int32_t *query_start, *kv_lens, *block_tables;
  int64_t num_sequences, max_blocks;
  PoolShape pool;
};

// Memory of a step, kept from one to the next. Rows are padded with zeros to what products read.
template <typename T>
struct Buffers {
  Lines<float> hidden, qkv;
  Lines<T> normed, query, attended, active;
  std::vector<Lines<T>> own_normed;  // by thread
};

template <typename T>
class DecoderStep {
 public:
  DecoderStep(
      const StackShape& shape, const std::vector<Layer<T>>& layers, const StepShape& step,
      Buffers<T>& buffers, int num_threads)
      : shape_(shape), layers_(layers), step_(step), buffers_(buffers) {
    const auto grow = [&](auto& buffer, int64_t width) {
      const size_t size = step.num_rows * width;
      if (buffer.size() < size) {
        buffer.resize(size);
      }
    };
    grow(buffers.hidden, shape.hidden_size);
    grow(buffers.qkv, shape.query_size() + 2 * shape.kv_size());
    grow(buffers.normed, normed_stride());
    grow(buffers.query, shape.query_size());
    grow(buffers.attended, shape.query_size());
    grow(buffers.active, active_stride());
    buffers.own_normed.resize(num_threads);
    for (auto& own : buffers.own_normed) {
      own.resize(kFewRows * normed_stride());
    }
    plan_attention(num_threads);
  }

  // `hidden` [num_rows, hidden_size]: in, and in place out
  float* hidden() { return buffers_.hidden.data(); }

  // The most tasks that a phase has.
  int64_t most_tasks(int num_threads) const {
    int64_t most = num_threads;
    for (const Layer<T>& layer : layers_) {
      for (const Packed<T>* weights : {&layer.qkv, &layer.output, &layer.gate_up, &layer.down}) {
        most = std::max(most, weights->num_groups);
      }
    }
    for (const auto& [window, attention] : attention_) {
      most = std::max(most, attention->num_tasks());
    }
    return most;
  }

  // By each thread of the team. With `memory` this rank holds a part of the weights, and what
  // the ranks have is summed after each half of a layer; the hidden states themselves count once.
  void run_layers(SharedMemory* memory, Member& member) {
    const bool adds_input = memory == nullptr || memory->rank() == 0;
    const int64_t num_halves = 2 * static_cast<int64_t>(layers_.size());
    for (int64_t half = 0; half < num_halves; ++half) {
      run_half(half, adds_input ? hidden() : nullptr, hidden(), member);
      if (memory != nullptr) {
        sum_over_ranks(*memory, member);
      }
    }
  }

  // Threads cannot throw; what went wrong in one of them is thrown here, when they are done.
  void rethrow() {
    if (error_ != nullptr) {
      std::rethrow_exception(error_);
    }
  }

  // Half 2i is layer i's attention, half 2i + 1 its MLP: to = from + what it yields from `hidden`.
  void run_half(int64_t half, const float* from, float* to, Member& member) {
    const Layer<T>& layer = layers_[half / 2];
    if (half % 2 == 0) {
      run_attention(layer, from, to, member);
    } else {
      run_mlp(layer, from, to, member);
    }
  }

 private:
  int64_t normed_stride() const { return divide_up(shape_.hidden_size, kDepth<T>) * kDepth<T>; }
  int64_t active_stride() const { return layers_[0].down.input_stride(); }

  // Calls `run` with the attention problem of `layer`, its head size known to the compiler.
  template <typename Run>
  void with_problem(const Layer<T>& layer, const Run& run) {
    switch (shape_.head_dim) {
      case 64: return run(problem<64>(layer));
      case 128: return run(problem<128>(layer));
      default: return run(problem<0>(layer));
    }
  }

  template <int kDim>
  Problem<T, kDim> problem(const Layer<T>& layer) {
    Problem<T, kDim> p;
    p.query = buffers_.query.data();
    p.key = layer.key;
    p.value = layer.value;
    p.output = buffers_.attended.data();
    p.query_start = step_.query_start;
    p.kv_lens = step_.kv_lens;
    p.block_tables = step_.block_tables;
    p.query_token_stride = shape_.query_size();
    p.query_head_stride = shape_.head_dim;
    p.num_sequences = step_.num_sequences;
    p.pool = step_.pool;
    p.max_blocks = step_.max_blocks;
    p.num_kv_heads = shape_.num_kv_heads;
    p.group = shape_.num_heads / shape_.num_kv_heads;
    p.head_dim = shape_.head_dim;
    p.scaling = layer.scaling;
    p.softcap = 0.f;
    p.window = layer.window;
    return p;
  }

  // One plan for all layers with the same window.
  void plan_attention(int num_threads) {
    for (const Layer<T>& layer : layers_) {
      if (find_attention(layer) == nullptr) {
        with_problem(layer, [&](const auto& p) {
          attention_.emplace_back(layer.window, std::make_unique<Attention>(p, num_threads));
        });
      }
    }
  }

  Attention* find_attention(const Layer<T>& layer) {
    for (auto& [window, attention] : attention_) {
      if (window == layer.window) {
        return attention.get();
      }
    }
    return nullptr;
  }

  void sum_over_ranks(SharedMemory& memory, Member& member) {
    member.share(1, [&](int64_t, Turn& turn) {
      if (turn.take() && error_ == nullptr) {
        try {
          memory.all_reduce(hidden(), step_.num_rows * shape_.hidden_size);
        } catch (...) {
          error_ = std::current_exception();
        }
      }
    });
  }

  // Attention's part of a layer: to = from + what it yields, where `to` and `from` may be the same
  // and `from` null for none; likewise below.
  void run_attention(const Layer<T>& layer, const float* from, float* to, Member& member) {
    const int64_t width = shape_.query_size() + 2 * shape_.kv_size();
    multiply_packed(
        layer.qkv, normed(layer.input_norm, member), normed_stride(), step_.num_rows, member,
        [&](int64_t row, int64_t column, const auto& sums) {
          store_sums(sums, layer.qkv_bias, buffers_.qkv.data() + row * width, column, width);
        });
    member.share_in_parts(step_.num_rows, [&](int64_t row) { place_heads(layer, row); });
    with_problem(layer, [&](const auto& p) { find_attention(layer)->work(p, member); });
    add_product(
        layer.output, buffers_.attended.data(), shape_.query_size(), from, to, member);
  }

  void run_mlp(const Layer<T>& layer, const float* from, float* to, Member& member) {
    multiply_packed(
        layer.gate_up, normed(layer.mlp_norm, member), normed_stride(), step_.num_rows, member,
        [&](int64_t row, int64_t column, const auto& sums) {
          store_gated(sums, buffers_.active.data() + row * active_stride(), column / 2, layer);
        });
    add_product(layer.down, buffers_.active.data(), active_stride(), from, to, member);
  }

  // The normed hidden states; few rows as this thread's own copy, which saves a phase.
  const T* normed(const float* weight, Member& member) {
    const auto normalise_row = [&](int64_t row, T* out) {
      normalise(
          hidden() + row * shape_.hidden_size, weight, out + row * normed_stride(),
          shape_.hidden_size, shape_.eps);
    };
    if (step_.num_rows > kFewRows) {
      T* out = buffers_.normed.data();
      member.share_in_parts(step_.num_rows, [&](int64_t row) { normalise_row(row, out); });
      return out;
    }
    T* out = buffers_.own_normed[member.thread()].data();
    for (int64_t row = 0; row < step_.num_rows; ++row) {
      normalise_row(row, out);
    }
    return out;
  }

  template <size_t kPanels>
  static void store_gated(
      const Register (&sums)[kPanels], T* out, int64_t column, const Layer<T>& layer) {
    for (size_t p = 0; p + 1 < kPanels && column < layer.mlp_size; p += 2, column += kLanes) {
      const int64_t count = std::min(kLanes, layer.mlp_size - column);
      store_narrow(gated(sums[p], sums[p + 1]), out + column, count);
    }
  }

  // Norms and rotates queries and keys, and puts keys and values where they belong.
  void place_heads(const Layer<T>& layer, int64_t row) {
    const int64_t dim = shape_.head_dim, width = shape_.query_size() + 2 * shape_.kv_size();
    float* heads = buffers_.qkv.data() + row * width;
    const int64_t position = step_.positions[row];
    const float *cos = step_.cos + position * dim, *sin = step_.sin + position * dim;
    T* query = buffers_.query.data() + row * shape_.query_size();
    place(heads, shape_.num_heads, layer.query_norm, cos, sin, query);
    heads += shape_.query_size();
    const int64_t place_in_pool = step_.pool.place_of_slot(step_.slots[row]);
    place(heads, shape_.num_kv_heads, layer.key_norm, cos, sin, layer.key + place_in_pool);
    narrow_row(heads + shape_.kv_size(), layer.value + place_in_pool, shape_.kv_size());
  }

  void place(
      float* heads, int64_t count, const float* norm, const float* cos, const float* sin, T* out) {
    const int64_t dim = shape_.head_dim;
    for (int64_t head = 0; head < count; ++head, heads += dim, out += dim) {
      if (norm != nullptr) {
        normalise(heads, norm, heads, dim, shape_.eps);
      }
      rotate(heads, cos, sin, out, dim);
    }
  }

  // to = from + input * weights^T
  void add_product(
      const Packed<T>& weights, const T* input, int64_t stride, const float* from, float* to,
      Member& member) {
    const int64_t width = shape_.hidden_size;
    multiply_packed(
        weights, input, stride, step_.num_rows, member,
        [&](int64_t row, int64_t column, const auto& sums) {
          const float* added = from == nullptr ? nullptr : from + row * width;
          store_sums(sums, added, to + row * width, column, width);
        });
  }

  const StackShape& shape_;
  const std::vector<Layer<T>>& layers_;
  const StepShape& step_;
  Buffers<T>& buffers_;
  std::exception_ptr error_;
  std::vector<std::pair<int64_t, std::unique_ptr<Attention>>> attention_;
};

// The last norm and the head, for some rows of the hidden states.
template <typename T>
struct HeadStep {
  Packed<T> weights;
  const float* norm = nullptr;
  const int64_t* indexes = nullptr;
  int64_t num_rows = 0;
  Lines<T> normed;  // [num_rows, what products read]

  // The most tasks that a phase has.
  int64_t most_tasks(int num_threads) const {
    return std::max<int64_t>(num_threads, weights.num_groups);
  }

  // By each thread of a team: logits [num_rows, num_outputs].
  void run(const StackShape& shape, const float* hidden, float* logits, Member& member) {
    const int64_t stride = weights.input_stride(), width = weights.num_outputs;
    member.share_in_parts(num_rows, [&](int64_t row) {
      normalise(
          hidden + indexes[row] * shape.hidden_size, norm, normed.data() + row * stride,
          shape.hidden_size, shape.eps);
    });
    multiply_packed(
        weights, normed.data(), stride, num_rows, member,
        [&](int64_t row, int64_t column, const auto& sums) {
          store_sums(sums, nullptr, logits + row * width, column, width);
        });
  }
};

}  // namespace
