// Sums and gathers between the processes of one node, through memory that all of them map.
//
// Every rank has two slots, used in turn. It fills one, says so, and waits for all others. Who has
// heard from everybody in one round knows that everybody is done reading the round before, so the
// slot of that round is free again.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <sys/mman.h>
#include <torch/custom_class.h>

#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstring>

#include "team.h"
#include "vector_math.h"

namespace {

using at::Tensor;

constexpr int64_t kSlotBytes = 1 << 22;
constexpr int64_t kLineBytes = 64;
constexpr int64_t kHeaderBytes = kLineBytes;  // by which memory is known again
constexpr auto kPatience = std::chrono::minutes(5);

// How far a process has come, where others who map the same memory can see it.
struct alignas(kLineBytes) RankState {
  Signal round;
  std::atomic<int32_t> process_id{0};
  std::atomic<int32_t> has_left{0};

  // Waits until it is no longer at `seen`; throws, with its name, where that will never be.
  template <typename... Name>
  void await_change(uint32_t seen, const Name&... name) {
    const auto give_up = std::chrono::steady_clock::now() + kPatience;
    while (!round.wait_while(seen)) {
      const bool is_gone = kill(process_id.load(), 0) != 0 && errno == ESRCH;
      TORCH_CHECK(
          !is_gone && has_left.load() == 0 && std::chrono::steady_clock::now() < give_up,
          name..., " does not answer");
    }
  }
};
static_assert(std::atomic<uint32_t>::is_always_lock_free);

inline char* map_shared(int64_t descriptor, int64_t num_bytes) {
  void* base = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
  TORCH_CHECK(base != MAP_FAILED, "shared memory cannot be mapped: ", std::strerror(errno));
  return static_cast<char*>(base);
}

class SharedMemory : public torch::CustomClassHolder {
 public:
  static int64_t num_bytes(int64_t size) {
    return kHeaderBytes + size * (static_cast<int64_t>(sizeof(RankState)) + 2 * kSlotBytes);
  }

  // Maps what `descriptor` stands for: `num_bytes(size)` bytes, zero but for the first kHeaderBytes.
  SharedMemory(int64_t descriptor, int64_t rank, int64_t size)
      : rank_(rank), size_(size), base_(map_shared(descriptor, num_bytes(size))) {
    state(rank).process_id.store(getpid());
  }
  ~SharedMemory() override { munmap(base_, num_bytes(size_)); }

  int64_t rank() const { return rank_; }

  // Lets those go who wait for this rank, now or later.
  void leave() { state(rank_).has_left.store(1); }

  // The sum over ranks, accumulated in fp32 in their order, in the dtype of `tensor`.
  Tensor all_reduce(const Tensor& tensor) {
    Tensor output = at::empty(tensor.sizes(), tensor.options());
    switch (tensor.scalar_type()) {
      case at::kBFloat16: sum<at::BFloat16>(tensor, output); break;
      case at::kHalf: sum<at::Half>(tensor, output); break;
      default:
        TORCH_CHECK(tensor.scalar_type() == at::kFloat, "sums are float32, bfloat16 or float16");
        sum<float>(tensor, output);
    }
    return output;
  }

  // The same in place, for `count` numbers.
  void all_reduce(float* numbers, int64_t count) { sum(numbers, numbers, count); }

  // On rank 0 [rows, sum(sizes)], the others' [rows, sizes[rank]] side by side; else `tensor`.
  Tensor gather(const Tensor& tensor, std::vector<int64_t> sizes) {
    TORCH_CHECK(tensor.dim() == 2 && tensor.is_contiguous() && tensor.size(1) == sizes[rank_]);
    const int64_t item = tensor.element_size(), num_rows = tensor.size(0);
    int64_t widest = 0, total = 0;
    for (const int64_t size : sizes) {
      widest = std::max(widest, size);
      total += size;
    }
    TORCH_CHECK(widest * item <= kSlotBytes, "a row of ", widest, " is too wide to gather");
    const int64_t step = kSlotBytes / std::max<int64_t>(1, widest * item);
    Tensor output = rank_ == 0 ? at::empty({num_rows, total}, tensor.options()) : tensor;
    for (int64_t first = 0; first < num_rows; first += step) {
      const int64_t count = std::min(step, num_rows - first);
      gather_rows(tensor, sizes, first, count, output);
    }
    return output;
  }

 private:
  RankState& state(int64_t rank) {
    return reinterpret_cast<RankState*>(base_ + kHeaderBytes)[rank];
  }

  char* slot(int64_t rank) {
    char* slots = base_ + kHeaderBytes + size_ * static_cast<int64_t>(sizeof(RankState));
    return slots + (2 * rank + round_ % 2) * kSlotBytes;
  }

  void next_round() { ++round_; }

  // This rank's slot is filled; returns when everybody's is.
  void meet() {
    state(rank_).round.set(round_);
    for (int64_t rank = 0; rank < size_; ++rank) {
      if (rank != rank_) {
        wait_for(state(rank), rank);
      }
    }
  }

  void wait_for(RankState& other, int64_t rank) {
    // The other may be a round ahead, never behind for good.
    for (uint32_t seen = other.round.value.load(std::memory_order_acquire);
         static_cast<int32_t>(seen - round_) < 0;
         seen = other.round.value.load(std::memory_order_acquire)) {
      other.await_change(seen, "tp rank ", rank);
    }
  }

  template <typename T>
  void sum(const Tensor& tensor, const Tensor& output) {
    TORCH_CHECK(tensor.is_contiguous(), "tensors to sum are contiguous");
    sum(tensor.const_data_ptr<T>(), output.mutable_data_ptr<T>(), tensor.numel());
  }

  template <typename T>
  void sum(const T* from, T* to, int64_t total) {
    constexpr int64_t kStep = kSlotBytes / sizeof(T);
    for (int64_t first = 0; first < total; first += kStep) {
      const int64_t count = std::min(kStep, total - first);
      next_round();
      std::memcpy(slot(rank_), from + first, count * sizeof(T));
      meet();
      for (int64_t i = 0; i < count; i += kBlock) {
        sum_block(i, std::min(kBlock, count - i), to + first + i);
      }
    }
  }

  static constexpr int64_t kBlock = 256;

  template <typename T>
  void sum_block(int64_t first, int64_t count, T* out) {
    float total[kBlock] = {};
    for (int64_t rank = 0; rank < size_; ++rank) {
      const T* part = reinterpret_cast<const T*>(slot(rank)) + first;
      for (int64_t i = 0; i < count; ++i) {
        total[i] += static_cast<float>(part[i]);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      out[i] = static_cast<T>(total[i]);
    }
  }

  void gather_rows(
      const Tensor& tensor, const std::vector<int64_t>& sizes, int64_t first, int64_t count,
      const Tensor& output) {
    const int64_t item = tensor.element_size();
    const char* own =
        static_cast<const char*>(tensor.const_data_ptr()) + first * sizes[rank_] * item;
    next_round();
    if (rank_ != 0) {
      std::memcpy(slot(rank_), own, count * sizes[rank_] * item);
      return meet();
    }
    meet();
    const int64_t width = output.size(1) * item;
    char* column = static_cast<char*>(output.mutable_data_ptr()) + first * width;
    for (int64_t rank = 0; rank < size_; ++rank) {
      const int64_t part = sizes[rank] * item;
      const char* from = rank == 0 ? own : slot(rank);
      for (int64_t row = 0; row < count; ++row) {
        std::memcpy(column + row * width, from + row * part, part);
      }
      column += part;
    }
  }

  int64_t rank_, size_;
  char* base_;
  uint32_t round_ = 0;
};

}  // namespace
