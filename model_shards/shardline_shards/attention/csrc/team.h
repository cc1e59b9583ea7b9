// A team of threads that goes through a long computation in phases and meets between them.
//
// A fork and a join of OpenMP for each phase would cost tens of microseconds when idle threads
// sleep, as they must where other processes want the cores. Here a thread that waits spins for a
// moment and then sleeps too.

#pragma once

#include <atomic>
#include <cstdint>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#else
#include <thread>
#endif

namespace {

constexpr int kSpins = 2000;  // some 30 microseconds
constexpr int64_t kNapNs = 50'000'000;

inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A number that threads, or processes that share its memory, wait on.
struct Signal {
  std::atomic<uint32_t> value{0};
  std::atomic<uint32_t> num_sleepers{0};

  void set(uint32_t next) {
    value.store(next);
    if (num_sleepers.load() != 0) {
      wake();
    }
  }

  // Waits until the value is no longer `old`, or for a nap's time; false in the latter case.
  bool wait_while(uint32_t old) {
    for (int i = 0; i < kSpins; ++i) {
      if (value.load(std::memory_order_acquire) != old) {
        return true;
      }
      pause_briefly();
    }
    num_sleepers.fetch_add(1);
    if (value.load() == old) {
      sleep(old);
    }
    num_sleepers.fetch_sub(1);
    return value.load(std::memory_order_acquire) != old;
  }

 private:
#ifdef __linux__
  void sleep(uint32_t old) {
    const timespec nap{0, kNapNs};
    syscall(SYS_futex, &value, FUTEX_WAIT, old, &nap, nullptr, 0);
  }
  void wake() { syscall(SYS_futex, &value, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0); }
#else
  void sleep(uint32_t) { std::this_thread::yield(); }
  void wake() {}
#endif
};

class Team {
 public:
  // Waits until all `size` threads of the team are here.
  void meet(int size) {
    if (size == 1) {
      return;
    }
    const uint32_t round = meeting_.value.load(std::memory_order_relaxed);
    if (num_arrived_.fetch_add(1) + 1 == static_cast<uint32_t>(size)) {
      num_arrived_.store(0, std::memory_order_relaxed);
      meeting_.set(round + 1);
    } else {
      while (!meeting_.wait_while(round)) {
      }
    }
  }

 private:
  alignas(64) std::atomic<uint32_t> num_arrived_{0};
  alignas(64) Signal meeting_;
};

}  // namespace
