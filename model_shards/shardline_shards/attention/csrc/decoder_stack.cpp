// The decoder layers of a stage as one object: weights packed once, all layers in one call.

#include <ATen/ops/empty.h>
#include <omp.h>
#include <torch/custom_class.h>

#include "decoder_step.h"
#include "pack.h"
#include "shared_memory.h"
#include "shared_pipe.h"

namespace {

using at::Tensor;

// Calls `run` with a zero of the C++ type that `dtype` stands for.
template <typename Run>
auto with_dtype(at::ScalarType dtype, const Run& run) {
  switch (dtype) {
    case at::kBFloat16: return run(at::BFloat16(0.f));
    case at::kHalf: return run(at::Half(0.f));
    default:
      TORCH_CHECK(dtype == at::kFloat, "decoder layers are float32, bfloat16 or float16");
      return run(0.f);
  }
}

// Calls `run` in as many threads as torch may use, each of which is a member of the team.
template <typename Run>
void run_by(Team& team, const Run& run) {
#pragma omp parallel
  {
    Member member(team, omp_get_thread_num(), omp_get_num_threads());
    run(member);
  }
}

const float* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<float>() : nullptr;
}

std::optional<Tensor> as_float(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? std::optional(tensor->to(at::kFloat).contiguous()) : std::nullopt;
}

struct LayerTensors {
  Tensor qkv, output, gate_up, down, input_norm, mlp_norm;
  std::optional<Tensor> qkv_bias, query_norm, key_norm;
  int64_t mlp_size;
  double scaling;
  int64_t window;
};

class DecoderStack : public torch::CustomClassHolder {
 public:
  DecoderStack(
      int64_t hidden_size, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, double eps,
      at::ScalarType dtype)
      : shape_{hidden_size, num_heads, num_kv_heads, head_dim, static_cast<float>(eps)},
        dtype_(dtype) {
    TORCH_CHECK(
        head_dim % 2 == 0 && num_heads % num_kv_heads == 0,
        "heads are even in size and come in whole groups");
  }

  // `qkv` and `gate_up` are lists of matrices; norms and the bias are vectors.
  void add_layer(
      std::vector<Tensor> qkv, Tensor output, std::vector<Tensor> gate_up, Tensor down,
      const Tensor& input_norm, const Tensor& mlp_norm, const std::optional<Tensor>& qkv_bias,
      const std::optional<Tensor>& query_norm, const std::optional<Tensor>& key_norm,
      double scaling, std::optional<int64_t> window) {
    check_matrices(qkv, shape_.query_size() + 2 * shape_.kv_size(), shape_.hidden_size);
    check_matrices({output}, shape_.hidden_size, shape_.query_size());
    check_matrices(gate_up, 2 * down.size(1), shape_.hidden_size);
    check_matrices({down}, shape_.hidden_size, down.size(1));
    LayerTensors layer;
    layer.qkv = packed(qkv, false);
    layer.output = packed({output}, false);
    layer.gate_up = packed(gate_up, true);
    layer.down = packed({down}, false);
    layer.input_norm = *as_float(input_norm);
    layer.mlp_norm = *as_float(mlp_norm);
    layer.qkv_bias = as_float(qkv_bias);
    layer.query_norm = as_float(query_norm);
    layer.key_norm = as_float(key_norm);
    layer.mlp_size = down.size(1);
    layer.scaling = scaling;
    layer.window = window.value_or(std::numeric_limits<int32_t>::max());
    layers_.push_back(layer);
  }

  int64_t num_layers() const { return static_cast<int64_t>(layers_.size()); }

  // After the last layer: a norm and the head [vocabulary rows, hidden_size].
  void set_head(const Tensor& norm, const Tensor& head) {
    check_matrices({head}, head.size(0), shape_.hidden_size);
    final_norm_ = as_float(norm);
    head_ = packed({head}, false);
    vocab_size_ = head.size(0);
  }

  // KV memory, for each layer [num_blocks, block_size, num_kv_heads, head_dim].
  void bind_memory(std::vector<Tensor> keys, std::vector<Tensor> values) {
    TORCH_CHECK(keys.size() == layers_.size() && values.size() == layers_.size());
    for (size_t i = 0; i < keys.size(); ++i) {
      for (const Tensor& pool : {keys[i], values[i]}) {
        TORCH_CHECK(
            is_pool(pool) && pool.scalar_type() == dtype_ && pool.sizes() == keys[0].sizes() &&
                pool.stride(0) == keys[0].stride(0) && pool.size(2) == shape_.num_kv_heads &&
                pool.size(3) == shape_.head_dim,
            "KV memory is [num_blocks, block_size, num_kv_heads, head_dim], blocks contiguous");
      }
    }
    keys_ = std::move(keys);
    values_ = std::move(values);
    bound_ = {};
  }

  // Half a layer of one step, where each rank holds a part of its weights: half 2i is layer i's
  // attention, half 2i + 1 its MLP. Returns this rank's part of the sum, fp32 like `hidden`; the
  // input is added by the one rank that is told so.
  Tensor run_half(
      const Tensor& hidden, const Tensor& cos, const Tensor& sin, const Tensor& positions,
      const Tensor& query_start, const Tensor& kv_lens, const Tensor& block_tables,
      const Tensor& slots, int64_t half, bool adds_input) {
    check_hidden(hidden, at::kFloat);
    TORCH_CHECK(half >= 0 && half < 2 * static_cast<int64_t>(layers_.size()));
    const StepShape step = step_shape(
        hidden.size(0), cos, sin, positions, query_start, kv_lens, block_tables, slots);
    return with_dtype(dtype_, [&](auto zero) {
      return compute_half<decltype(zero)>(hidden, step, half, adds_input);
    });
  }

  // The norm and the head alone: `hidden` fp32 [num_tokens, hidden_size] to logits as from `run`.
  Tensor run_head(const Tensor& hidden, const Tensor& logit_indexes) {
    check_hidden(hidden, at::kFloat);
    check_logits(logit_indexes, hidden.size(0));
    return with_dtype(
        dtype_, [&](auto zero) { return compute_head<decltype(zero)>(hidden, logit_indexes); });
  }

  // One step. `hidden` [num_tokens, hidden_size] in the weights' dtype, or with `token_ids` what
  // these are rows of; `cos` and `sin` [positions, head_dim] fp32, `positions` [num_tokens], the
  // others as in PagedBatch. Returns the hidden states after the last layer; or, with
  // `logit_indexes`, fp32 logits [len(logit_indexes), vocabulary rows]. Where ranks hold parts of
  // the weights they sum through `memory`.
  Tensor run(
      const Tensor& hidden, const std::optional<Tensor>& token_ids, const Tensor& cos,
      const Tensor& sin, const Tensor& positions, const Tensor& query_start, const Tensor& kv_lens,
      const Tensor& block_tables, const Tensor& slots, const std::optional<Tensor>& logit_indexes,
      const std::optional<c10::intrusive_ptr<SharedMemory>>& memory) {
    check_hidden(hidden, dtype_);
    if (token_ids.has_value()) {
      check_indexes(*token_ids, 0, hidden.size(0));
    }
    const int64_t num_rows = token_ids.value_or(hidden).size(0);
    if (logit_indexes.has_value()) {
      check_logits(*logit_indexes, num_rows);
    }
    const StepShape step =
        step_shape(num_rows, cos, sin, positions, query_start, kv_lens, block_tables, slots);
    return with_dtype(dtype_, [&](auto zero) {
      return compute_all<decltype(zero)>(
          hidden, token_ids, step, logit_indexes, memory.has_value() ? memory->get() : nullptr);
    });
  }

 private:
  void check_matrices(
      const std::vector<Tensor>& weights, int64_t num_outputs, int64_t num_inputs) const {
    int64_t total = 0;
    for (const Tensor& weight : weights) {
      TORCH_CHECK(
          weight.dim() == 2 && weight.is_contiguous() && weight.scalar_type() == dtype_ &&
              weight.size(1) == num_inputs,
          "weights are contiguous [outputs, ", num_inputs, "] in the stack's dtype");
      total += weight.size(0);
    }
    TORCH_CHECK(total == num_outputs, "weights have ", total, " rows instead of ", num_outputs);
  }

  Tensor packed(const std::vector<Tensor>& weights, bool in_turn) {
    return with_dtype(dtype_, [&](auto zero) {
      return pack<decltype(zero)>({weights, in_turn}, at::get_num_threads(), arena_);
    });
  }

  void check_hidden(const Tensor& hidden, at::ScalarType dtype) const {
    TORCH_CHECK(
        hidden.dim() == 2 && hidden.size(1) == shape_.hidden_size && hidden.is_contiguous() &&
            hidden.scalar_type() == dtype,
        "hidden states are contiguous [num_tokens, hidden_size] of dtype ", dtype);
  }

  void check_logits(const Tensor& logit_indexes, int64_t num_tokens) const {
    TORCH_CHECK(head_.has_value(), "this stage has no head");
    check_indexes(logit_indexes, 0, num_tokens);
  }

  void check_rotation(const Tensor& cos, const Tensor& sin, const Tensor& positions) const {
    for (const Tensor& table : {cos, sin}) {
      TORCH_CHECK(
          table.dim() == 2 && table.size(0) == cos.size(0) && table.size(1) == shape_.head_dim &&
              table.is_contiguous() && table.scalar_type() == at::kFloat,
          "cos and sin are contiguous [positions, head_dim] in fp32");
    }
    check_indexes(positions, 0, cos.size(0));
  }

  static void check_indexes(const Tensor& indexes, int64_t from, int64_t to) {
    TORCH_CHECK(indexes.is_contiguous() && indexes.scalar_type() == at::kLong);
    const int64_t* index = indexes.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < indexes.numel(); ++i) {
      TORCH_CHECK(index[i] >= from && index[i] < to, "index ", index[i], " of ", to);
    }
  }

  StepShape step_shape(
      int64_t num_rows, const Tensor& cos, const Tensor& sin, const Tensor& positions,
      const Tensor& query_start, const Tensor& kv_lens, const Tensor& block_tables,
      const Tensor& slots) const {
    TORCH_CHECK(!keys_.empty(), "bind_memory comes before run");
    check_rotation(cos, sin, positions);
    StepShape step;
    step.num_rows = num_rows;
    step.cos = cos.const_data_ptr<float>();
    step.sin = sin.const_data_ptr<float>();
    step.positions = positions.const_data_ptr<int64_t>();
    step.slots = slots.const_data_ptr<int64_t>();
    step.query_start = query_start.const_data_ptr<int32_t>();
    step.kv_lens = kv_lens.const_data_ptr<int32_t>();
    step.block_tables = block_tables.const_data_ptr<int32_t>();
    step.num_sequences = kv_lens.size(0);
    step.max_blocks = block_tables.size(1);
    step.pool = shape_of_pool(keys_[0]);
    TORCH_CHECK(
        slots.numel() == num_rows && positions.numel() == num_rows,
        "each token has one position and one slot");
    check_indexes(slots, 0, step.pool.num_slots());
    check_sequences(step);
    return step;
  }

  // Threads cannot throw: what they would trip over is found before they start.
  static void check_sequences(const StepShape& step) {
    TORCH_CHECK(
        step.query_start[0] == 0 && step.query_start[step.num_sequences] == step.num_rows,
        "query_start covers all tokens");
    for (int64_t i = 0; i < step.num_sequences; ++i) {
      const int64_t query_len = step.query_start[i + 1] - step.query_start[i];
      const int64_t num_blocks = divide_up(step.kv_lens[i], step.pool.block_size);
      TORCH_CHECK(
          query_len >= 0 && query_len <= step.kv_lens[i] && num_blocks <= step.max_blocks,
          "sequence ", i, " has ", query_len, " query tokens, ", step.kv_lens[i], " tokens and ",
          step.max_blocks, " blocks");
      for (int64_t block = 0; block < num_blocks; ++block) {
        const int64_t id = step.block_tables[i * step.max_blocks + block];
        TORCH_CHECK(id >= 0 && id < step.pool.num_blocks, "block ", id, " does not exist");
      }
    }
  }

  // Made once for the memory that is bound.
  template <typename T>
  const std::vector<Layer<T>>& bound_layers() {
    auto& layers = std::get<std::vector<Layer<T>>>(bound_);
    if (!layers.empty()) {
      return layers;
    }
    for (size_t i = 0; i < layers_.size(); ++i) {
      const LayerTensors& from = layers_[i];
      Layer<T> layer;
      layer.qkv = unpacked<T>(from.qkv, shape_.query_size() + 2 * shape_.kv_size());
      layer.output = unpacked<T>(from.output, shape_.hidden_size);
      layer.gate_up = unpacked<T>(from.gate_up, 2 * pad(from.mlp_size));
      layer.down = unpacked<T>(from.down, shape_.hidden_size);
      layer.input_norm = from.input_norm.const_data_ptr<float>();
      layer.mlp_norm = from.mlp_norm.const_data_ptr<float>();
      layer.qkv_bias = data_or_null(from.qkv_bias);
      layer.query_norm = data_or_null(from.query_norm);
      layer.key_norm = data_or_null(from.key_norm);
      layer.mlp_size = from.mlp_size;
      layer.scaling = static_cast<float>(from.scaling);
      layer.window = from.window;
      layer.key = keys_[i].mutable_data_ptr<T>();
      layer.value = values_[i].mutable_data_ptr<T>();
      layers.push_back(layer);
    }
    return layers;
  }

  template <typename T>
  Buffers<T>& buffers() {
    return std::get<Buffers<T>>(buffers_);
  }

  template <typename T>
  Tensor compute_all(
      const Tensor& hidden, const std::optional<Tensor>& token_ids, const StepShape& step,
      const std::optional<Tensor>& logit_indexes, SharedMemory* memory) {
    const std::vector<Layer<T>>& layers = bound_layers<T>();
    DecoderStep<T> decoder(shape_, layers, step, buffers<T>(), at::get_num_threads());
    HeadStep<T> head;
    fill_head(head, logit_indexes);
    const int64_t num_rows = step.num_rows, width = shape_.hidden_size;
    Tensor output = logit_indexes.has_value() ? new_logits(head.num_rows)
                                              : at::empty({num_rows, width}, hidden.options());
    const T* from = hidden.const_data_ptr<T>();
    const int64_t* ids = token_ids.has_value() ? token_ids->const_data_ptr<int64_t>() : nullptr;
    float* states = decoder.hidden();
    const int num_threads = at::get_num_threads();
    Team team(std::max(decoder.most_tasks(num_threads), head.most_tasks(num_threads)));
    run_by(team, [&](Member& member) {
      member.share_in_parts(num_rows, [&](int64_t row) {
        widen_row(from + (ids == nullptr ? row : ids[row]) * width, states + row * width, width);
      });
      decoder.run_layers(memory, member);
      if (logit_indexes.has_value()) {
        return head.run(shape_, states, output.mutable_data_ptr<float>(), member);
      }
      member.share_in_parts(num_rows, [&](int64_t row) {
        narrow_row(states + row * width, output.mutable_data_ptr<T>() + row * width, width);
      });
    });
    decoder.rethrow();
    return output;
  }

  template <typename T>
  Tensor compute_half(const Tensor& hidden, const StepShape& step, int64_t half, bool adds_input) {
    const std::vector<Layer<T>>& layers = bound_layers<T>();
    DecoderStep<T> decoder(shape_, layers, step, buffers<T>(), at::get_num_threads());
    Tensor output = at::empty(hidden.sizes(), hidden.options());
    const float* from = hidden.const_data_ptr<float>();
    float* to = output.mutable_data_ptr<float>();
    std::copy(from, from + hidden.numel(), decoder.hidden());
    Team team(decoder.most_tasks(at::get_num_threads()));
    run_by(team, [&](Member& member) {
      decoder.run_half(half, adds_input ? from : nullptr, to, member);
    });
    return output;
  }

  template <typename T>
  Tensor compute_head(const Tensor& hidden, const Tensor& logit_indexes) {
    HeadStep<T> head;
    fill_head(head, logit_indexes);
    Tensor output = new_logits(head.num_rows);
    Team team(head.most_tasks(at::get_num_threads()));
    run_by(team, [&](Member& member) {
      head.run(
          shape_, hidden.const_data_ptr<float>(), output.mutable_data_ptr<float>(), member);
    });
    return output;
  }

  Tensor new_logits(int64_t num_rows) const {
    return at::empty({num_rows, vocab_size_}, at::TensorOptions(at::kFloat));
  }

  template <typename T>
  void fill_head(HeadStep<T>& head, const std::optional<Tensor>& logit_indexes) const {
    if (logit_indexes.has_value()) {
      head.weights = unpacked<T>(*head_, vocab_size_);
      head.norm = final_norm_->const_data_ptr<float>();
      head.indexes = logit_indexes->const_data_ptr<int64_t>();
      head.num_rows = logit_indexes->numel();
      head.normed.resize(head.num_rows * head.weights.input_stride());
    }
  }

  StackShape shape_;
  at::ScalarType dtype_;
  Arena arena_;
  std::vector<LayerTensors> layers_;
  std::vector<Tensor> keys_, values_;
  std::optional<Tensor> final_norm_, head_;
  int64_t vocab_size_ = 0;
  std::tuple<
      std::vector<Layer<float>>, std::vector<Layer<at::BFloat16>>, std::vector<Layer<at::Half>>>
      bound_;
  std::tuple<Buffers<float>, Buffers<at::BFloat16>, Buffers<at::Half>> buffers_;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(shardline, library) {
  library.class_<SharedMemory>("SharedMemory")
      .def(torch::init<int64_t, int64_t, int64_t>())
      .def_static("num_bytes", &SharedMemory::num_bytes)
      .def("leave", &SharedMemory::leave)
      .def(
          "all_reduce",
          static_cast<Tensor (SharedMemory::*)(const Tensor&)>(&SharedMemory::all_reduce))
      .def("gather", &SharedMemory::gather);
  library.class_<SharedPipe>("SharedPipe")
      .def(torch::init<int64_t, int64_t, bool>())
      .def_static("num_bytes", &SharedPipe::num_bytes)
      .def("leave", &SharedPipe::leave)
      .def("send", &SharedPipe::send)
      .def("receive", &SharedPipe::receive);
  library.class_<DecoderStack>("DecoderStack")
      .def(torch::init<int64_t, int64_t, int64_t, int64_t, double, at::ScalarType>())
      .def("add_layer", &DecoderStack::add_layer)
      .def("set_head", &DecoderStack::set_head)
      .def("num_layers", &DecoderStack::num_layers)
      .def("bind_memory", &DecoderStack::bind_memory)
      .def("run", &DecoderStack::run)
      .def("run_half", &DecoderStack::run_half)
      .def("run_head", &DecoderStack::run_head);
}
