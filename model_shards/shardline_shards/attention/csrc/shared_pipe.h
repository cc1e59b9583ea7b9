// A way for tensors from one process to another on the same node, through memory that both map.
//
// Bytes go round in it, each tensor's behind their number. Either end counts those that it is done
// with, modulo 2^32, and waits for the other one's count where it is full or empty.

#pragma once

#include <algorithm>

#include "shared_memory.h"

namespace {

class SharedPipe : public torch::CustomClassHolder {
 public:
  // Of memory that holds `capacity` bytes under way, a power of two.
  static int64_t num_bytes(int64_t capacity) {
    return kHeaderBytes + 2 * static_cast<int64_t>(sizeof(RankState)) + capacity;
  }

  // Maps what `descriptor` stands for: `num_bytes(capacity)` bytes, zero but for the first ones.
  SharedPipe(int64_t descriptor, int64_t capacity, bool sends)
      : capacity_(checked(capacity)),
        sends_(sends),
        base_(map_shared(descriptor, num_bytes(capacity))) {
    own().process_id.store(getpid());
  }
  ~SharedPipe() override { munmap(base_, num_bytes(capacity_)); }

  // Lets the other end go if it waits for this one, now or later.
  void leave() { own().has_left.store(1); }

  // Waits only where more is under way than there is room for.
  void send(const Tensor& tensor) {
    TORCH_CHECK(sends_ && tensor.is_contiguous(), "the sending end takes contiguous tensors");
    const int64_t count = tensor.nbytes();
    move(const_cast<int64_t*>(&count), sizeof(count));
    move(const_cast<void*>(tensor.const_data_ptr()), count);
    own().round.set(done_);
  }

  // Waits for the next tensor, of the size of `into`.
  void receive(Tensor into) {
    TORCH_CHECK(!sends_ && into.is_contiguous(), "the other end fills contiguous tensors");
    int64_t count = 0;
    move(&count, sizeof(count));
    const int64_t due = into.nbytes();
    TORCH_CHECK(count == due, "the other stage sent ", count, " bytes where ", due, " are due");
    move(into.mutable_data_ptr(), count);
    own().round.set(done_);
  }

 private:
  static int64_t checked(int64_t capacity) {
    TORCH_CHECK(
        capacity > 0 && capacity <= (int64_t{1} << 31) && !(capacity & (capacity - 1)),
        "a pipe holds a power of two bytes up to 2^31, not ", capacity);
    return capacity;
  }

  RankState& state(bool sends) {
    return reinterpret_cast<RankState*>(base_ + kHeaderBytes)[sends ? 0 : 1];
  }
  RankState& own() { return state(sends_); }
  RankState& other() { return state(!sends_); }

  // Bytes that this end can go on with, given what the other one has done.
  int64_t num_ready(uint32_t theirs) const {
    const uint32_t under_way = sends_ ? done_ - theirs : theirs - done_;
    return sends_ ? capacity_ - under_way : under_way;
  }

  // `count` bytes from `local` memory into the pipe, or out of it. The other end is told where it is
  // waited for; and by the caller, at the end.
  void move(void* local, int64_t count) {
    char* bytes = static_cast<char*>(local);
    while (count > 0) {
      const uint32_t theirs = other().round.value.load(std::memory_order_acquire);
      const int64_t position = done_ & (capacity_ - 1);
      const int64_t part = std::min({count, num_ready(theirs), capacity_ - position});
      if (part == 0) {
        own().round.set(done_);
        other().await_change(theirs, "the other stage");
        continue;
      }
      copy(bytes, position, part);
      bytes += part;
      count -= part;
      done_ += static_cast<uint32_t>(part);
    }
  }

  void copy(char* local, int64_t position, int64_t count) {
    char* shared = base_ + kHeaderBytes + 2 * sizeof(RankState) + position;
    if (sends_) {
      std::memcpy(shared, local, count);
    } else {
      std::memcpy(local, shared, count);
    }
  }

  int64_t capacity_;
  bool sends_;
  char* base_;
  uint32_t done_ = 0;
};

}  // namespace
