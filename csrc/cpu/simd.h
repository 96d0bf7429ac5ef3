// Vectors as wide as the instruction set's registers, in GCC/Clang vector extensions, so that one
// kernel source serves every instruction set. Everything lives in an anonymous namespace: two
// instruction sets never share a function.
#pragma once

#include <cstdint>
#include <utility>

#include "kernels.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#define LORAPLEX_INLINE inline __attribute__((always_inline))

namespace loraplex::LORAPLEX_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr bool kManyRegisters = true;  // 32 vector registers, else 16
#else
constexpr bool kManyRegisters = false;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t UintVec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * kLanes)));
// The same in memory: any alignment, any type behind the pointer.
typedef float VecInMemory __attribute__((vector_size(4 * kLanes), aligned(2), may_alias));
typedef uint16_t HalfVecInMemory __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));

using Lanes = std::make_integer_sequence<int, kLanes>;

struct BFloat16 {
  uint16_t bits;
};

LORAPLEX_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
LORAPLEX_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
LORAPLEX_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <int... L>
LORAPLEX_INLINE Vec broadcast(float x, std::integer_sequence<int, L...>) {
  return Vec{(static_cast<void>(L), x)...};
}
LORAPLEX_INLINE Vec broadcast(float x) { return broadcast(x, Lanes{}); }
LORAPLEX_INLINE Vec load(const float* p) { return *reinterpret_cast<const VecInMemory*>(p); }
LORAPLEX_INLINE void store(float* p, Vec x) { *reinterpret_cast<VecInMemory*>(p) = x; }

// Keeps a loaded vector in its register: GCC would load it anew for each use as another type.
LORAPLEX_INLINE void keep(Vec& x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#else
  static_cast<void>(x);
#endif
}

LORAPLEX_INLINE Vec load(const BFloat16* p) {
  const HalfVec half = *reinterpret_cast<const HalfVecInMemory*>(p);
  return (Vec)(__builtin_convertvector(half, UintVec) << 16);
}

// Rounds to bfloat16, to nearest and ties to even, in the upper half of each lane; what is in the
// lower half has no meaning.
LORAPLEX_INLINE UintVec round_to_bfloat16(Vec x) {
  const UintVec bits = (UintVec)x;
  return x == x ? bits + 0x7fff + ((bits >> 16) & 1) : bits | 0x400000;
}

LORAPLEX_INLINE void store(BFloat16* p, Vec x) {
  *reinterpret_cast<HalfVecInMemory*>(p) =
      __builtin_convertvector(round_to_bfloat16(x) >> 16, HalfVec);
}

// Two vectors' worth of consecutive elements, in the order that is cheapest to come by: bfloat16
// are taken apart into those at even and at odd places. For what does not mind the order.
struct Wide {
  Vec first, second;
};

LORAPLEX_INLINE Wide operator+(Wide x, Wide y) { return {x.first + y.first, x.second + y.second}; }
LORAPLEX_INLINE Wide operator*(Wide x, Wide y) { return {x.first * y.first, x.second * y.second}; }
LORAPLEX_INLINE Wide operator*(Wide x, float y) { return {x.first * y, x.second * y}; }

LORAPLEX_INLINE Wide load_wide(const float* p) { return {load(p), load(p + kLanes)}; }
LORAPLEX_INLINE void store_wide(float* p, Wide x) {
  store(p, x.first);
  store(p + kLanes, x.second);
}

LORAPLEX_INLINE Wide load_wide(const BFloat16* p) {
  const UintVec bits = (UintVec)load(reinterpret_cast<const float*>(p));
  return {(Vec)(bits << 16), (Vec)(bits & 0xffff0000)};
}

LORAPLEX_INLINE void store_wide(BFloat16* p, Wide x) {
  const UintVec bits =
      round_to_bfloat16(x.first) >> 16 | (round_to_bfloat16(x.second) & 0xffff0000);
  store(reinterpret_cast<float*>(p), (Vec)bits);
}

// The first n < kLanes elements; the other lanes are 0.
template <class T>
LORAPLEX_INLINE Vec load_partial(const T* p, int64_t n) {
  T buffer[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
}

template <class T>
LORAPLEX_INLINE void store_partial(T* p, Vec x, int64_t n) {
  T buffer[kLanes];
  store(buffer, x);
  for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
}

// Calls f(i, load, store) for whole vectors of [0, n), then once for the rest.
template <class F>
LORAPLEX_INLINE void for_each_vector(int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    f(i, [](auto* p) { return load(p); }, [](auto* p, Vec x) { store(p, x); });
  }
  if (i < n) {
    f(
        i, [=](auto* p) { return load_partial(p, n - i); },
        [=](auto* p, Vec x) { store_partial(p, x, n - i); });
  }
}

// Calls f(i, load, store) for two vectors' worth of [0, n) at a time, then once for the rest.
template <class F>
LORAPLEX_INLINE void for_each_wide(int64_t n, F f) {
  constexpr int kWide = 2 * kLanes;
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide) {
    f(i, [](auto* p) { return load_wide(p); }, [](auto* p, Wide x) { store_wide(p, x); });
  }
  if (i < n) {
    const auto load_rest = [=]<class T>(const T* p) {
      T buffer[kWide] = {};
      for (int64_t k = 0; k < n - i; ++k) buffer[k] = p[k];
      return load_wide(buffer);
    };
    const auto store_rest = [=]<class T>(T* p, Wide x) {
      T buffer[kWide];
      store_wide(buffer, x);
      for (int64_t k = 0; k < n - i; ++k) p[k] = buffer[k];
    };
    f(i, load_rest, store_rest);
  }
}

LORAPLEX_INLINE Vec maximum(Vec a, Vec b) { return a > b ? a : b; }

// Lane l of the result is lane l ^ S.
template <int S, int... L>
LORAPLEX_INLINE Vec swap_lanes(Vec a, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(a, a, (L ^ S)...);
}

// Lane l is a's lane l where l & S is 0, else b's lane l ^ S.
template <int S, int... L>
LORAPLEX_INLINE Vec interleave_low(Vec a, Vec b, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(a, b, ((L & S) ? (L ^ S) + kLanes : L)...);
}

// Lane l is a's lane l ^ S where l & S is 0, else b's lane l.
template <int S, int... L>
LORAPLEX_INLINE Vec interleave_high(Vec a, Vec b, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(a, b, ((L & S) ? L + kLanes : (L ^ S))...);
}

template <int S = kLanes / 2, class F>
LORAPLEX_INLINE Vec fold_lanes(Vec x, F f) {
  x = f(x, swap_lanes<S>(x, Lanes{}));
  if constexpr (S > 1) x = fold_lanes<S / 2>(x, f);
  return x;
}

LORAPLEX_INLINE float reduce_add(Vec x) {
  return fold_lanes(x, [](Vec a, Vec b) { return a + b; })[0];
}
LORAPLEX_INLINE float reduce_max(Vec x) { return fold_lanes(x, maximum)[0]; }

typedef uint16_t Halves __attribute__((vector_size(4 * kLanes)));

template <int... H>
LORAPLEX_INLINE void zip_halves(Vec& a, Vec& b, std::integer_sequence<int, H...>) {
  const Halves x = (Halves)a, y = (Halves)b;
  a = (Vec)__builtin_shufflevector(x, y, (H / 2 + (H & 1) * 2 * kLanes)...);
  b = (Vec)__builtin_shufflevector(x, y, (H / 2 + kLanes + (H & 1) * 2 * kLanes)...);
}

// Takes two vectors of 16-bit elements to the pairs (a[i], b[i]), in the order of i.
LORAPLEX_INLINE void zip_halves(Vec& a, Vec& b) {
  zip_halves(a, b, std::make_integer_sequence<int, 2 * kLanes>{});
}

// Transposes the kLanes x kLanes matrix whose rows are `rows`.
template <int S = 1>
LORAPLEX_INLINE void transpose(Vec (&rows)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & S) continue;
    const Vec low = interleave_low<S>(rows[i], rows[i | S], Lanes{});
    const Vec high = interleave_high<S>(rows[i], rows[i | S], Lanes{});
    rows[i] = low;
    rows[i | S] = high;
  }
  if constexpr (2 * S < kLanes) transpose<2 * S>(rows);
}

// sums[i] = the sum of x[i]'s lanes for N vectors at once, at about three instructions a vector: at
// each level two vectors are folded into halves of one. N is a power of two.
template <int N, int S = 1>
LORAPLEX_INLINE void reduce_add_each(Vec (&x)[N], float* sums) {
  if constexpr (S < kLanes && S < N) {
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      if (i & (2 * S - 1)) continue;
      x[i] =
          interleave_low<S>(x[i], x[i | S], Lanes{}) + interleave_high<S>(x[i], x[i | S], Lanes{});
    }
    reduce_add_each<N, 2 * S>(x, sums);
  } else if constexpr (N < kLanes) {
    Vec y = x[0];
    if constexpr (2 * N <= kLanes) y += swap_lanes<N>(y, Lanes{});
    if constexpr (4 * N <= kLanes) y += swap_lanes<2 * N>(y, Lanes{});
    for (int i = 0; i < N; ++i) sums[i] = y[i];
  } else {
    for (int i = 0; i < N; i += kLanes) store(sums + i, x[i]);
  }
}

// 2 ** x for x <= 127, with a relative error of 2e-7; 0 below 2 ** -125.
LORAPLEX_INLINE Vec exp2(Vec x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2 ** 23: adding it leaves round(x) in the low bits
  const Vec clamped = x < -125.0f ? broadcast(-125.0f) : x;
  const Vec shifted = clamped + kRound;
  const Vec f = clamped - (shifted - kRound);
  Vec y = broadcast(1.5403530e-4f);
  y = y * f + 1.3333558e-3f;
  y = y * f + 9.6181291e-3f;
  y = y * f + 5.5504109e-2f;
  y = y * f + 2.4022651e-1f;
  y = y * f + 6.9314718e-1f;
  y = y * f + 1.0f;
  const Vec result = (Vec)((UintVec)y + ((UintVec)shifted << 23));
  return x < -125.0f ? Vec{} : result;
}

// With a relative error of 2e-7.
LORAPLEX_INLINE Vec tanh(Vec x) {
  constexpr float kNear = 0.6f;  // the polynomial serves up to here; beyond, nothing cancels out
  constexpr float kFar = 10.0f;  // from here on the result is 1
  constexpr float kScale = 2.88539008f;  // 2 * log2(e)
  const UintVec sign = (UintVec)x & 0x80000000;
  const Vec size = (Vec)((UintVec)x ^ sign);
  const Vec square = x * x;
  Vec near = broadcast(-5.9058467e-3f);
  near = near * square + 2.0805365e-2f;
  near = near * square - 5.3786677e-2f;
  near = near * square + 1.3331958e-1f;
  near = near * square - 3.3333299e-1f;
  near = near * square * x + x;
  const Vec far = 1.0f - 2.0f / (exp2((size > kFar ? broadcast(kFar) : size) * kScale) + 1.0f);
  return size < kNear ? near : (Vec)((UintVec)far | sign);
}

// A unit is what one 32-bit lane holds of a dot product's operands: one float, or two bfloat16
// where the machine multiplies them in pairs.
struct FloatUnit {
  static constexpr int kElements = 1;
  template <class T>
  LORAPLEX_INLINE static Vec from(const T* p) {
    return load(p);
  }
  LORAPLEX_INLINE static Vec dot(Vec sum, Vec a, Vec b) { return sum + a * b; }
};

#ifdef __AVX512BF16__
LORAPLEX_INLINE Vec load_pairs(const BFloat16* p) {
  return load(reinterpret_cast<const float*>(p));
}

struct BFloat16Unit {
  static constexpr int kElements = 2;
  template <class T>
  LORAPLEX_INLINE static Vec from(const T* p) {
    return load_pairs(p);
  }
  LORAPLEX_INLINE static Vec dot(Vec sum, Vec a, Vec b) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif

template <class T>
struct UnitOf {
  using Type = FloatUnit;
};
#ifdef __AVX512BF16__
template <>
struct UnitOf<BFloat16> {
  using Type = BFloat16Unit;
};
#endif

// One vector of units from consecutive elements of which n (at most a vector's worth) exist.
template <class Unit, class T>
LORAPLEX_INLINE Vec load_units(const T* p, int64_t n) {
  constexpr int kElements = kLanes * Unit::kElements;
  if (n >= kElements) return Unit::from(p);
  T buffer[kElements] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  return Unit::from(buffer);
}

// Calls f(T*) with T the element type of dtype.
template <class F>
LORAPLEX_INLINE void dispatch(DType dtype, F f) {
  if (dtype == DType::kBFloat16) {
    f(static_cast<BFloat16*>(nullptr));
  } else {
    f(static_cast<float*>(nullptr));
  }
}

}  // namespace
}  // namespace loraplex::LORAPLEX_ISA
