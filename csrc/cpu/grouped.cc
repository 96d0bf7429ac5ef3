// Products with weights of 4 or 8 bits whose scales are shared by groups of inputs, and those
// weights in full: see engine/models/quantization/grouped.py.
#include "float8.h"
#include "kernels.h"
#include "simd.h"

namespace loraplex::LORAPLEX_ISA {
namespace {

// Rows of x that are multiplied at a time, by weights that are decoded once.
constexpr int kMaxRows = kManyRegisters ? 8 : 4;

// Below this many weights a second thread costs more than it saves.
constexpr int64_t kParallelWeights = 1 << 15;

// Entries of a table of 16.
LORAPLEX_INLINE Vec look_up(const float* table, IntVec index) {
#if defined(__AVX512F__)
  // (The mask of all lanes is for GCC 12, which warns of the operation without it.)
  return (Vec)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)index, (__m512)load(table));
#elif defined(__AVX2__)
  const __m256 low = _mm256_permutevar8x32_ps((__m256)load(table), (__m256i)index);
  const __m256 high = _mm256_permutevar8x32_ps((__m256)load(table + 8), (__m256i)index);
  return index < 8 ? (Vec)low : (Vec)high;
#else
  Vec result;
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = table[index[lane]];
  return result;
#endif
}

LORAPLEX_INLINE IntVec load_bytes(const uint8_t* p) {
  return load_bits(reinterpret_cast<const Float8*>(p));
}

// Each decodes a block of weights, so many vectors, from their bytes.
struct Table4 {
  static constexpr int kBlock = kGroupedBlock4, kVectors = kBlock / kLanes, kBytes = kBlock / 2;
  LORAPLEX_INLINE static void decode(const uint8_t* bytes, const float* table, Vec* weights) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors / 2; ++v) {
      const IntVec pairs = load_bytes(bytes + v * kLanes);
      weights[v] = look_up(table, pairs & 15);
      weights[v + kVectors / 2] = look_up(table, pairs >> 4);
    }
  }
};

struct Int8 {
  static constexpr int kBlock = kGroupedBlock8, kVectors = kBlock / kLanes, kBytes = kBlock;
  LORAPLEX_INLINE static void decode(const uint8_t* bytes, const float*, Vec* weights) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      weights[v] = __builtin_convertvector(load_bytes(bytes + v * kLanes) - 128, Vec);
    }
  }
};

struct Float8Weights {
  static constexpr int kBlock = kGroupedBlock8, kVectors = kBlock / kLanes, kBytes = kBlock;
  LORAPLEX_INLINE static void decode(const uint8_t* bytes, const float*, Vec* weights) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      weights[v] = load(reinterpret_cast<const Float8*>(bytes + v * kLanes));
    }
  }
};

LORAPLEX_INLINE float to_float(float x) { return x; }
LORAPLEX_INLINE float to_float(BFloat16 x) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16);
}

// Calls f(k, weights) for the blocks of output n, with their weights from input k on.
template <class Code, class T, class F>
LORAPLEX_INLINE void for_each_block(const GroupedParams& p, int64_t n, F f) {
  const int64_t groups = p.in_features / p.group_size;
  const uint8_t* bytes = p.values + n * (p.in_features / Code::kBlock) * Code::kBytes;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t group = n * groups + g;
    const Vec scale = broadcast(to_float(static_cast<const T*>(p.scales)[group]));
    const Vec middle =
        p.middles ? broadcast(to_float(static_cast<const T*>(p.middles)[group])) : Vec{};
    for (int64_t k = g * p.group_size; k < (g + 1) * p.group_size; k += Code::kBlock) {
      Vec weights[Code::kVectors];
      Code::decode(bytes, p.table, weights);
      bytes += Code::kBytes;
#pragma GCC unroll 8
      for (int v = 0; v < Code::kVectors; ++v) weights[v] = weights[v] * scale + middle;
      f(k, weights);
    }
  }
}

template <class Code, class T, int R>
void multiply(const GroupedParams& p, int64_t n, int64_t first_row) {
  const float* x = p.x + first_row * p.in_features;
  Vec sums[R][2] = {};
  for_each_block<Code, T>(p, n, [&](int64_t k, const Vec* weights) {
#pragma GCC unroll 8
    for (int v = 0; v < Code::kVectors; ++v) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        sums[r][v & 1] += weights[v] * load(x + r * p.in_features + k + v * kLanes);
      }
    }
  });
  for (int r = 0; r < R; ++r) {
    T* y = static_cast<T*>(p.out) + (first_row + r) * p.out_features + n;
    store_partial(y, broadcast(reduce_add(sums[r][0] + sums[r][1])), 1);
  }
}

template <class Code, class T, int R>
void multiply_rows(const GroupedParams& p, int64_t n, int64_t first_row) {
  if (p.num_rows - first_row < R) {
    if constexpr (R > 1) multiply_rows<Code, T, R - 1>(p, n, first_row);
  } else {
    multiply<Code, T, R>(p, n, first_row);
  }
}

template <class Code, class T>
void multiply_all(const GroupedParams& p) {
#pragma omp parallel for if (p.out_features * p.in_features > kParallelWeights)
  for (int64_t n = 0; n < p.out_features; ++n) {
    for (int64_t row = 0; row < p.num_rows; row += kMaxRows) {
      multiply_rows<Code, T, kMaxRows>(p, n, row);
    }
  }
}

template <class Code, class T>
void expand_all(const GroupedParams& p) {
#pragma omp parallel for if (p.out_features * p.in_features > kParallelWeights)
  for (int64_t n = 0; n < p.out_features; ++n) {
    T* out = static_cast<T*>(p.out) + n * p.in_features;
    for_each_block<Code, T>(p, n, [&](int64_t k, const Vec* weights) {
#pragma GCC unroll 8
      for (int v = 0; v < Code::kVectors; ++v) store(out + k + v * kLanes, weights[v]);
    });
  }
}

template <class Code>
void run(const GroupedParams& p) {
  dispatch(p.dtype, [&]<class T>(T*) {
    if (p.x == nullptr) {
      expand_all<Code, T>(p);
    } else {
      multiply_all<Code, T>(p);
    }
  });
}

}  // namespace

void grouped(const GroupedParams& p) {
  if (p.code == GroupedCode::kTable4) {
    run<Table4>(p);
  } else if (p.code == GroupedCode::kInt8) {
    run<Int8>(p);
  } else {
    run<Float8Weights>(p);
  }
}

}  // namespace loraplex::LORAPLEX_ISA
