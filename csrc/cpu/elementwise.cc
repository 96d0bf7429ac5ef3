// Row-wise operations of the model: RMS norm, rotary embedding, gated activations, writing K
// and V.
#include "float8.h"
#include "kernels.h"
#include "simd.h"

namespace loraplex::LORAPLEX_ISA {
namespace {

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kParallelElements = 1 << 15;

template <class T>
LORAPLEX_INLINE void add_residual(T* x, T* residual, int64_t size) {
  for_each_wide(size, [&](int64_t i, auto load, auto store) {
    store(residual + i, load(residual + i) + load(x + i));
  });
}

template <class T>
LORAPLEX_INLINE void normalize(T* out, const T* x, const T* weight, float eps, float offset,
                               int64_t size) {
  Wide squares{};
  for_each_wide(size, [&](int64_t i, auto load, auto) {
    const Wide value = load(x + i);
    squares = squares + value * value;
  });
  const float sum = reduce_add(squares.first + squares.second);
  const float scale = 1.0f / __builtin_sqrtf(sum / size + eps);
  const Wide offsets{broadcast(offset), broadcast(offset)};
  for_each_wide(size, [&](int64_t i, auto load, auto store) {
    store(out + i, load(x + i) * scale * (load(weight + i) + offsets));
  });
}

template <class T>
LORAPLEX_INLINE void rotate(T* x, const float* cos_sin, int64_t half) {
  for_each_vector(half, [&](int64_t i, auto load, auto store) {
    const Vec first = load(x + i), second = load(x + half + i);
    const Vec cos = load(cos_sin + i), sin = load(cos_sin + half + i);
    store(x + i, first * cos - second * sin);
    store(x + half + i, second * cos + first * sin);
  });
}

template <Activation kActivation>
LORAPLEX_INLINE Vec activate(Vec x) {
  constexpr float kLog2e = 1.44269504f;
  Vec power = x * -kLog2e;
  if constexpr (kActivation == Activation::kGeluTanh) {
    power = power * kGeluLinear * (1.0f + kGeluSquare * x * x);
    power = power < -127.0f ? broadcast(-127.0f) : power;
  }
  const Vec result = x / (1.0f + exp2(power > 127.0f ? broadcast(127.0f) : power));
  return power > 127.0f ? Vec{} : result;
}

template <Activation kActivation, class T>
LORAPLEX_INLINE void gate(T* out, const T* gate_row, const T* up_row, int64_t size) {
  for_each_wide(size, [&](int64_t i, auto load, auto store) {
    const Wide x = load(gate_row + i);
    store(out + i,
          Wide{activate<kActivation>(x.first), activate<kActivation>(x.second)} * load(up_row + i));
  });
}

template <class T>
LORAPLEX_INLINE void convert(T* to, const T* from, int64_t size) {
  __builtin_memcpy(to, from, size * sizeof(T));
}

template <class T>
LORAPLEX_INLINE void convert(Float8* to, const T* from, int64_t size) {
  for_each_vector(size, [&](int64_t i, auto load, auto store) { store(to + i, load(from + i)); });
}

template <class T, class Cached>
void write_kv_as(const WriteKvParams& p) {
  const int64_t elements = p.num_tokens * p.num_kv_heads * p.head_dim;
#pragma omp parallel for if (elements > kParallelElements)
  for (int64_t token = 0; token < p.num_tokens; ++token) {
    const int64_t page = p.slot_mapping[token] / p.block_size;
    const int64_t offset = p.slot_mapping[token] % p.block_size;
    for (int which = 0; which < 2; ++which) {
      const T* from = static_cast<const T*>(p.new_rows[which]) + token * p.strides[which][0];
      const CacheParams& cache = p.caches[which];
      Cached* to =
          static_cast<Cached*>(cache.data) + page * cache.page_stride + offset * cache.token_stride;
      for (int64_t head = 0; head < p.num_kv_heads; ++head) {
        convert(to + head * cache.head_stride, from + head * p.strides[which][1], p.head_dim);
      }
    }
  }
}

template <Activation kActivation>
void act_and_mul_as(const ActAndMulParams& p) {
  dispatch(p.dtype, [&]<class T>(T*) {
#pragma omp parallel for if (p.num_tokens * p.size > kParallelElements)
    for (int64_t token = 0; token < p.num_tokens; ++token) {
      const T* row = static_cast<const T*>(p.gate_up) + token * p.gate_up_stride;
      gate<kActivation>(static_cast<T*>(p.out) + token * p.out_stride, row, row + p.size, p.size);
    }
  });
}

}  // namespace

void rms_norm(const RmsNormParams& p) {
  dispatch(p.dtype, [&]<class T>(T*) {
#pragma omp parallel for collapse(2) if (p.num_tokens * p.num_heads * p.size > kParallelElements)
    for (int64_t token = 0; token < p.num_tokens; ++token) {
      for (int64_t head = 0; head < p.num_heads; ++head) {
        const auto at = [=](void* base, const int64_t* strides) {
          return static_cast<T*>(base) + token * strides[0] + head * strides[1];
        };
        T* x = at(p.x, p.x_strides);
        T* out = at(p.out, p.out_strides);
        if (p.residual != nullptr) {
          T* residual = at(p.residual, p.residual_strides);
          add_residual(x, residual, p.size);
          x = residual;
        }
        normalize(out, x, static_cast<const T*>(p.weight), p.eps, p.offset, p.size);
      }
    }
  });
}

void rope(const RopeParams& p) {
  const int64_t elements = p.num_tokens * (p.num_heads[0] + p.num_heads[1]) * 2 * p.half;
  dispatch(p.dtype, [&]<class T>(T*) {
#pragma omp parallel for if (elements > kParallelElements)
    for (int64_t token = 0; token < p.num_tokens; ++token) {
      const float* cos_sin = p.cos_sin_cache + p.positions[token] * 2 * p.half;
      for (int which = 0; which < 2; ++which) {
        T* row = static_cast<T*>(p.tensors[which]) + token * p.strides[which][0];
        for (int64_t head = 0; head < p.num_heads[which]; ++head) {
          rotate(row + head * p.strides[which][1], cos_sin, p.half);
        }
      }
    }
  });
}

void act_and_mul(const ActAndMulParams& p) {
  if (p.activation == Activation::kSilu) {
    act_and_mul_as<Activation::kSilu>(p);
  } else {
    act_and_mul_as<Activation::kGeluTanh>(p);
  }
}

void write_kv(const WriteKvParams& p) {
  dispatch(p.dtype, [&]<class T>(T*) {
    if (p.has_float8_caches) {
      write_kv_as<T, Float8>(p);
    } else {
      write_kv_as<T, T>(p);
    }
  });
}

}  // namespace loraplex::LORAPLEX_ISA
