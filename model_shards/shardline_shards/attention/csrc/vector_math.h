// The small dense pieces that attention is made of, in fp32, on torch's portable vectors.
// Rows are contiguous; "padded" sizes are multiples of kLanes. Much is inlined by force: without
// that a decode takes a third longer.

#pragma once

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define CPU_CAPABILITY AVX512
#define CPU_CAPABILITY_AVX512
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define CPU_CAPABILITY AVX2
#define CPU_CAPABILITY_AVX2
#else
#define CPU_CAPABILITY DEFAULT
#endif

// Whether pairs of bf16 are multiplied and summed in fp32 by one instruction.
#if defined(__AVX512BF16__) && defined(CPU_CAPABILITY_AVX512)
#define SHARDLINE_HAS_PAIRS
#endif

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <type_traits>
#include <vector>

namespace {

using Vec = at::vec::Vectorized<float>;

// For arrays that are to stay in registers: gcc keeps those in memory whose elements have a
// constructor, and `Vec` has one. Both turn into each other by themselves.
#if defined(CPU_CAPABILITY_AVX512)
using Register = __m512;
#elif defined(CPU_CAPABILITY_AVX2)
using Register = __m256;
#else
using Register = Vec;
#endif

constexpr int64_t kLanes = Vec::size();
constexpr int64_t kCacheLineBytes = 64;
constexpr float kNegativeInfinity = -std::numeric_limits<float>::infinity();

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t pad(int64_t size) { return divide_up(size, kLanes) * kLanes; }

// Begins at a cache line, so that a vector of it touches one and not two.
template <typename T>
struct LineAllocator {
  using value_type = T;
  static constexpr std::align_val_t kAlignment{kCacheLineBytes};

  LineAllocator() = default;
  template <typename U>
  LineAllocator(const LineAllocator<U>&) {}

  T* allocate(size_t count) {
    return static_cast<T*>(::operator new(count * sizeof(T), kAlignment));
  }
  void deallocate(T* memory, size_t) { ::operator delete(memory, kAlignment); }
  bool operator==(const LineAllocator&) const = default;
};

template <typename T>
using Lines = std::vector<T, LineAllocator<T>>;

template <typename T>
C10_ALWAYS_INLINE Vec load_wide(const T* from) {
  if constexpr (std::is_same_v<T, float>) {
    return Vec::loadu(from);
  } else {
    Vec wide;
    at::vec::load_to_float<T>(from, wide);
    return wide;
  }
}

// Where what is fetched goes: what is read once and soon, or into the second cache.
//
// On AMD's processors the former passes by all caches but the first, and others find there what they
// left. On Intel's, lines that are fetched so (`prefetchnta`) have a small part of the first cache, and
// are gone before they are read: steps took 2.7 times as long.
#if defined(__znver1__) || defined(__znver2__) || defined(__znver3__) || defined(__znver4__) || \
    defined(__znver5__)
constexpr int kOnce = 0;
#else
constexpr int kOnce = 3;
#endif
constexpr int kSecondCache = 2;

// Into the second cache: the first has room for what is used next.
template <typename T>
C10_ALWAYS_INLINE void prefetch_row(const T* row, int64_t size) {
  const char* bytes = reinterpret_cast<const char*>(row);
#pragma GCC unroll 8
  for (int64_t i = 0; i < size * static_cast<int64_t>(sizeof(T)); i += kCacheLineBytes) {
    __builtin_prefetch(bytes + i, 0, kSecondCache);
  }
}

// Weights that will be needed, fetched on the way: `kLines` cache lines a step from `from` on.
template <int kLines, int kWhere = kOnce>
struct Fetch {
  const char* from;

  C10_ALWAYS_INLINE void step() {
#pragma GCC unroll 4
    for (int i = 0; i < kLines; ++i) {
      __builtin_prefetch(from + i * kCacheLineBytes, 0, kWhere);
    }
    from += kLines * kCacheLineBytes;
  }
};

// out[0, size) = row[0, size)
template <typename T>
C10_ALWAYS_INLINE void widen_row(const T* row, float* out, int64_t size) {
  int64_t i = 0;
#pragma GCC unroll 8
  for (; i + kLanes <= size; i += kLanes) {
    load_wide(row + i).store(out + i);
  }
  for (; i < size; ++i) {
    out[i] = static_cast<float>(row[i]);
  }
}

C10_ALWAYS_INLINE float sum_lanes(const Vec& x) {
  return at::vec::vec_reduce_all<float>([](const Vec& a, const Vec& b) { return a + b; }, x);
}

// clamp_min and not maximum: the latter pays for NaN, which a largest score cannot mend anyway.
C10_ALWAYS_INLINE Vec larger(const Vec& a, const Vec& b) { return at::vec::clamp_min(a, b); }

C10_ALWAYS_INLINE float max_lanes(const Vec& x) {
  return at::vec::vec_reduce_all<float>([](const Vec& a, const Vec& b) { return larger(a, b); }, x);
}

// The sums of the lanes of kLanes vectors, in order; `x` is used up.
template <typename Vector>
C10_ALWAYS_INLINE Vec sum_lanes_of_each(Vector (&x)[kLanes]) {
#pragma GCC unroll 4
  for (int64_t n = kLanes / 2; n > 0; n /= 2) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < n; ++i) {
      const auto [low, high] = at::vec::interleave2(Vec(x[i]), Vec(x[i + n]));
      x[i] = low + high;
    }
  }
  return x[0];
}

// sums[r][key] = rows[r, 0..size) * key[0..size), not yet summed over the lanes; `size` is padded
template <int kRows, typename T>
C10_ALWAYS_INLINE void dot_rows(
    const float* rows, int64_t size, const T* key, Vec (*sums)[kLanes], int64_t place) {
  Register sum[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    sum[r] = Vec(0.f);
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < size; i += kLanes) {
    const Vec wide = load_wide(key + i);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      sum[r] = at::vec::fmadd(Vec::loadu(rows + r * size + i), wide, Vec(sum[r]));
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    sums[r][place] = sum[r];
  }
}

// c[kRows, kColumns vectors] = a[kRows, depth] * b (+ c), where b(k, j) is the vector of row k at
// column j; `first` is the first column.
template <int kRows, int kColumns, bool kAccumulate, typename Right>
C10_ALWAYS_INLINE void multiply_tile(
    const float* a, int64_t lda, const Right& b, int64_t first, float* c, int64_t ldc,
    int64_t depth) {
  Register sum[kRows][kColumns];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) {
      sum[r][j] = kAccumulate ? Vec::loadu(c + r * ldc + j * kLanes) : Vec(0.f);
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    Register right[kColumns];
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) {
      right[j] = b(k, first + j * kLanes);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec left(a[r * lda + k]);
#pragma GCC unroll 4
      for (int j = 0; j < kColumns; ++j) {
        sum[r][j] = at::vec::fmadd(left, Vec(right[j]), Vec(sum[r][j]));
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) {
      Vec(sum[r][j]).store(c + r * ldc + j * kLanes);
    }
  }
}

template <int kRows, bool kAccumulate, typename Right>
C10_ALWAYS_INLINE void multiply_rows(
    const float* a, int64_t lda, const Right& b, float* c, int64_t ldc, int64_t columns,
    int64_t depth) {
  constexpr int kWide = kRows <= 3 ? 4 : 2;  // sums that the 16 registers of AVX2 just hold
  int64_t j = 0;
  for (; j + kWide * kLanes <= columns; j += kWide * kLanes) {
    multiply_tile<kRows, kWide, kAccumulate>(a, lda, b, j, c + j, ldc, depth);
  }
  for (; j < columns; j += kLanes) {
    multiply_tile<kRows, 1, kAccumulate>(a, lda, b, j, c + j, ldc, depth);
  }
}

// c[rows, columns] = a[rows, depth] * b (+ c), `columns` padded, b as above
template <bool kAccumulate, typename Right>
C10_ALWAYS_INLINE void multiply(
    const float* a, int64_t lda, const Right& b, float* c, int64_t ldc, int64_t rows,
    int64_t columns, int64_t depth) {
  for (; rows >= 6; rows -= 6, a += 6 * lda, c += 6 * ldc) {
    multiply_rows<6, kAccumulate>(a, lda, b, c, ldc, columns, depth);
  }
  switch (rows) {
    case 1: return multiply_rows<1, kAccumulate>(a, lda, b, c, ldc, columns, depth);
    case 2: return multiply_rows<2, kAccumulate>(a, lda, b, c, ldc, columns, depth);
    case 3: return multiply_rows<3, kAccumulate>(a, lda, b, c, ldc, columns, depth);
    case 4: return multiply_rows<4, kAccumulate>(a, lda, b, c, ldc, columns, depth);
    case 5: return multiply_rows<5, kAccumulate>(a, lda, b, c, ldc, columns, depth);
    default: return;
  }
}

// row[0, padded) *= factor
inline void scale_row(float* row, float factor, int64_t padded) {
  for (int64_t i = 0; i < padded; i += kLanes) {
    (Vec::loadu(row + i) * Vec(factor)).store(row + i);
  }
}

// scores[0, padded) = cap * tanh(scale * scores / cap); tanh|y| = (1 - e) / (1 + e) with e = exp(-2|y|)
inline void soft_cap(float* scores, int64_t padded, float cap, float scale) {
  const Vec one(1.f), factor(-2.f * scale / cap), limit(cap);
  for (int64_t i = 0; i < padded; i += kLanes) {
    const Vec score = Vec::loadu(scores + i);
    const Vec e = (score.abs() * factor).exp_u20();
    const Vec size = limit * (one - e) / (one + e);
    Vec::blendv(size, size.neg(), score < Vec(0.f)).store(scores + i);
  }
}

// scores[0, padded) = exp(scale * scores - best) where `best` is the largest so far; each lane of
// `sum` grows by its own.
C10_ALWAYS_INLINE void soften(float* scores, int64_t padded, float scale, float best, Vec& sum) {
  for (int64_t j = 0; j < padded; j += kLanes) {
    const Vec weight = at::vec::fmadd(Vec::loadu(scores + j), Vec(scale), Vec(-best)).exp_u20();
    weight.store(scores + j);
    sum = sum + weight;
  }
}

// The largest of scale * scores and `at_least`; mostly that, of a long row.
C10_ALWAYS_INLINE float largest(
    const float* scores, int64_t padded, float scale, float at_least) {
  Vec best(kNegativeInfinity);
  for (int64_t j = 0; j < padded; j += kLanes) {
    best = larger(best, Vec::loadu(scores + j));
  }
  best = best * Vec(scale);
  const bool has_larger = (best > Vec(at_least)).zero_mask() != (1 << kLanes) - 1;
  return has_larger ? max_lanes(best) : at_least;
}

}  // namespace
