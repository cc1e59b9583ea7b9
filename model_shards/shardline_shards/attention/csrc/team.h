// A team of threads that goes through a long computation in phases, each of so many tasks.
//
// Where other processes want the cores, the system takes a thread's core away in the midst of a task,
// for longer than many phases take. Nobody waits for such a thread where there is another way: who has
// done his part of a phase does what is left of the others' parts, what they have begun included, and
// goes on. Who comes late finds the phases that were done without him, and follows.
//
// A fork and a join of OpenMP for each phase would cost tens of microseconds when idle threads
// sleep, as they must where other processes want the cores. Here a thread that waits spins for a
// moment and then sleeps too.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

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
constexpr int kSpinsBeforeHelp = 400;  // what a thread that has its core may be behind by
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

// The right to keep what a task yields. Several threads may compute one; one of them has it.
class Turn {
 public:
  Turn() : is_mine_(true), is_decided_(true) {}  // of the only thread
  Turn(std::atomic<uint32_t>& taken_in, uint32_t phase) : taken_in_(&taken_in), phase_(phase) {}

  // Whether this thread has it. Asked before anything is stored that others see; the earlier, the
  // longer others have to wait for a thread that loses its core.
  bool take() {
    if (!is_decided_) {
      uint32_t last = taken_in_->load(std::memory_order_relaxed);
      is_mine_ = last < phase_ && taken_in_->compare_exchange_strong(last, phase_);
      is_decided_ = true;
    }
    return is_mine_;
  }

 private:
  std::atomic<uint32_t>* taken_in_ = nullptr;
  uint32_t phase_ = 0;
  bool is_mine_ = false, is_decided_ = false;
};

// What the threads of a team share. No phase has more than `most_tasks` tasks.
class Team {
 public:
  explicit Team(int64_t most_tasks) : taken_in_(most_tasks) {}

 private:
  friend class Member;

  std::vector<std::atomic<uint32_t>> taken_in_;  // by task: the last phase that it was taken in
  alignas(64) std::atomic<int64_t> num_done_{0};
  alignas(64) Signal completed_;  // phases
};

// One thread of a team.
class Member {
 public:
  Member(Team& team, int thread, int num_threads)
      : team_(team), thread_(thread), num_threads_(num_threads) {}

  int thread() const { return thread_; }
  int num_threads() const { return num_threads_; }

  // A phase: all threads come here with the same tasks, and leave when each of these is done.
  // `run(task, turn)` stores nothing that others see before it has the turn. A thread that is late
  // runs it on what others have written over since, and does not get the turn.
  template <typename Run>
  void share(int64_t num_tasks, const Run& run) {
    if (num_threads_ == 1) {
      for (int64_t task = 0; task < num_tasks; ++task) {
        Turn turn;
        run(task, turn);
      }
      return;
    }
    if (num_tasks == 0) {
      return;
    }
    ++phase_;
    run_part(num_tasks, thread_, run);
    if (!is_complete_soon()) {
      for (int i = 1; i < num_threads_; ++i) {
        run_part(num_tasks, (thread_ + i) % num_threads_, run);
      }
      while (!is_complete()) {
        team_.completed_.wait_while(phase_ - 1);
      }
    }
  }

  // A phase in which `run(i)` is called once for each i < count, which is so short that each thread
  // takes a part of them at a time.
  template <typename Run>
  void share_in_parts(int64_t count, const Run& run) {
    const int64_t num_parts = std::min<int64_t>(count, num_threads_);
    share(num_parts, [&](int64_t part, Turn& turn) {
      if (turn.take()) {
        const int64_t end = count * (part + 1) / num_parts;
        for (int64_t i = count * part / num_parts; i < end; ++i) {
          run(i);
        }
      }
    });
  }

 private:
  bool is_complete() const {
    return team_.completed_.value.load(std::memory_order_acquire) >= phase_;
  }

  bool is_complete_soon() const {
    for (int i = 0; i < kSpinsBeforeHelp; ++i) {
      if (is_complete()) {
        return true;
      }
      pause_briefly();
    }
    return false;
  }

  // The tasks of a thread: one's own from the first one on, those of others from the last one on.
  template <typename Run>
  void run_part(int64_t num_tasks, int whose, const Run& run) {
    const int64_t begin = num_tasks * whose / num_threads_;
    const int64_t end = num_tasks * (whose + 1) / num_threads_;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t task = whose == thread_ ? i : begin + end - 1 - i;
      if (team_.taken_in_[task].load(std::memory_order_relaxed) < phase_) {
        Turn turn(team_.taken_in_[task], phase_);
        run(task, turn);
        if (turn.take()) {
          finish_task(num_tasks);
        }
      }
    }
  }

  void finish_task(int64_t num_tasks) {
    if (team_.num_done_.fetch_add(1) + 1 == num_tasks) {
      team_.num_done_.store(0, std::memory_order_relaxed);
      team_.completed_.set(phase_);
    }
  }

  Team& team_;
  int thread_, num_threads_;
  uint32_t phase_ = 0;
};

}  // namespace
