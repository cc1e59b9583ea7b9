// What a decoder layer does to single rows between its products, in fp32.

#pragma once

#include <array>
#include <cstring>

#include "vector_math.h"

namespace {

// A vector of 16-bit numbers, rounded to the nearest.
template <typename T>
C10_ALWAYS_INLINE auto narrowed(const Vec& x) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<T, at::Half>) {
    return at::vec::cvtfp32_fp16(x);
  } else {
#if defined(__AVX512BF16__) && defined(CPU_CAPABILITY_AVX512)
    return _mm512_cvtneps_pbh(x);
#else
    return at::vec::cvtfp32_bf16(x);
#endif
  }
#else
  float wide[kLanes];
  x.store(wide);
  std::array<T, kLanes> narrow;
  std::copy(wide, wide + kLanes, narrow.begin());
  return narrow;
#endif
}

// out[0, count) = x, count <= kLanes
template <typename T>
C10_ALWAYS_INLINE void store_narrow(const Vec& x, T* out, int64_t count = kLanes) {
  if constexpr (std::is_same_v<T, float>) {
    x.store(out, static_cast<int>(count));
  } else {
    const auto narrow = narrowed<T>(x);
    static_assert(sizeof narrow == kLanes * sizeof(T));
    if (count == kLanes) {
      std::memcpy(out, &narrow, sizeof narrow);
    } else {
      std::memcpy(out, &narrow, count * sizeof(T));
    }
  }
}

template <typename T>
C10_ALWAYS_INLINE void narrow_row(const float* row, T* out, int64_t size) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    store_narrow(Vec::loadu(row + i), out + i);
  }
  for (; i < size; ++i) {
    out[i] = static_cast<T>(row[i]);
  }
}

// out = x * rsqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019); `out` may be `x`.
template <typename T>
void normalise(const float* x, const float* weight, T* out, int64_t size, float eps) {
  Vec squares(0.f);
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const Vec part = Vec::loadu(x + i);
    squares = at::vec::fmadd(part, part, squares);
  }
  float sum = sum_lanes(squares);
  for (; i < size; ++i) {
    sum += x[i] * x[i];
  }
  const float scale = 1.f / std::sqrt(sum / static_cast<float>(size) + eps);
  for (i = 0; i + kLanes <= size; i += kLanes) {
    store_narrow(Vec::loadu(x + i) * Vec(scale) * Vec::loadu(weight + i), out + i);
  }
  for (; i < size; ++i) {
    out[i] = static_cast<T>(x[i] * scale * weight[i]);
  }
}

// Rotary embedding of one head, in halves (Su et al. 2021, as llama lays it out). `cos` and `sin`
// are [dim]; dim is even.
template <typename T>
void rotate(const float* x, const float* cos, const float* sin, T* out, int64_t dim) {
  const int64_t half = dim / 2;
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const Vec low = Vec::loadu(x + i), high = Vec::loadu(x + half + i);
    store_narrow(low * Vec::loadu(cos + i) - high * Vec::loadu(sin + i), out + i);
    store_narrow(
        high * Vec::loadu(cos + half + i) + low * Vec::loadu(sin + half + i), out + half + i);
  }
  for (; i < half; ++i) {
    const float low = x[i], high = x[half + i];
    out[i] = static_cast<T>(low * cos[i] - high * sin[i]);
    out[half + i] = static_cast<T>(high * cos[half + i] + low * sin[half + i]);
  }
}

// silu(gate) * up, with silu(x) = x / (1 + exp(-x))
C10_ALWAYS_INLINE Vec gated(const Vec& gate, const Vec& up) {
  return gate / (Vec(1.f) + gate.neg().exp_u20()) * up;
}

}  // namespace
