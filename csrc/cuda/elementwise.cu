// Row-wise kernels for CUDA: norms, rope, the gated activation, and writing K and V to the pool.
// All compute in float32 and round once, as their CPU twins do.
#include "device.cuh"
#include "kernels.h"

namespace loraplex::cuda {
namespace {

constexpr int kThreads = 256;

__device__ float block_sum(float x) {
  __shared__ float of_warp[kThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0;
  for (int warp = 0; warp < kThreads / 32; ++warp) sum += of_warp[warp];
  return sum;
}

// One block a row. With a residual, x is added to it first and then replaced by the result.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    rms_norm_kernel(const __grid_constant__ RmsNormParams p) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int64_t token = blockIdx.x / p.num_heads, head = blockIdx.x % p.num_heads;
  const T* x = static_cast<const T*>(p.x) + token * p.x_strides[0] + head * p.x_strides[1];
  T* out = static_cast<T*>(p.out) + token * p.out_strides[0] + head * p.out_strides[1];
  T* residual = p.residual == nullptr
                    ? nullptr
                    : static_cast<T*>(p.residual) + token * p.residual_strides[0] +
                          head * p.residual_strides[1];
  const T* weight = static_cast<const T*>(p.weight);
  const T* source = residual != nullptr ? residual : x;
  // What a thread keeps of a row; the rest, of very long ones, it reads again.
  constexpr int kKept = 4, kStride = kThreads * kWidth;
  Vec<T, kWidth> kept[kKept], weights[kKept];
  float sum = 0;
  const auto read = [&](int i) {
    Vec<T, kWidth> v = load<kWidth>(x + i);
    if (residual != nullptr) {
      const Vec<T, kWidth> r = load<kWidth>(residual + i);
      for (int k = 0; k < kWidth; ++k) {
        v.lanes[k] = from_float<T>(to_float(v.lanes[k]) + to_float(r.lanes[k]));
      }
      store<kWidth>(residual + i, v);
    }
    for (int k = 0; k < kWidth; ++k) sum += to_float(v.lanes[k]) * to_float(v.lanes[k]);
    return v;
  };
  const auto write = [&](int i, Vec<T, kWidth> v, const Vec<T, kWidth>& w, float scale) {
    for (int k = 0; k < kWidth; ++k) {
      v.lanes[k] = from_float<T>(to_float(v.lanes[k]) * scale * (to_float(w.lanes[k]) + p.offset));
    }
    store<kWidth>(out + i, v);
  };
  const int first = threadIdx.x * kWidth;
#pragma unroll
  for (int n = 0; n < kKept; ++n) {
    const int i = first + n * kStride;
    if (i < p.size) weights[n] = load<kWidth>(weight + i), kept[n] = read(i);
  }
  for (int i = first + kKept * kStride; i < p.size; i += kStride) read(i);
  const float scale = rsqrtf(block_sum(sum) / p.size + p.eps);
#pragma unroll
  for (int n = 0; n < kKept; ++n) {
    const int i = first + n * kStride;
    if (i < p.size) write(i, kept[n], weights[n], scale);
  }
  for (int i = first + kKept * kStride; i < p.size; i += kStride) {
    write(i, load<kWidth>(source + i), load<kWidth>(weight + i), scale);
  }
}

// One block a token; threads go over (head, kWidth pairs of dimensions) of q, then of k.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) rope_kernel(const __grid_constant__ RopeParams p) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int64_t token = blockIdx.x;
  const float* cosines = p.cos_sin_cache + p.positions[token] * 2 * p.half;
  const int vectors = p.half / kWidth;
  const int num_q = p.num_heads[0] * vectors, num_all = num_q + p.num_heads[1] * vectors;
  for (int index = threadIdx.x; index < num_all; index += kThreads) {
    const int tensor = index >= num_q;
    const int own = tensor ? index - num_q : index;
    const int head = own / vectors, i = own % vectors * kWidth;
    T* x = static_cast<T*>(p.tensors[tensor]) + token * p.strides[tensor][0] +
           head * p.strides[tensor][1] + i;
    Vec<T, kWidth> first = load<kWidth>(x), second = load<kWidth>(x + p.half);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const float cosine = cosines[i + k], sine = cosines[p.half + i + k];
      const float a = to_float(first.lanes[k]), b = to_float(second.lanes[k]);
      first.lanes[k] = from_float<T>(a * cosine - b * sine);
      second.lanes[k] = from_float<T>(b * cosine + a * sine);
    }
    store<kWidth>(x, first);
    store<kWidth>(x + p.half, second);
  }
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    act_and_mul_kernel(const __grid_constant__ ActAndMulParams p) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int64_t token = blockIdx.y;
  const int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kWidth;
  if (i >= p.size) return;
  const T* row = static_cast<const T*>(p.gate_up) + token * p.gate_up_stride + i;
  Vec<T, kWidth> gate = load<kWidth>(row);
  const Vec<T, kWidth> up = load<kWidth>(row + p.size);
  for (int k = 0; k < kWidth; ++k) {
    const float g = to_float(gate.lanes[k]);
    const float y =
        p.activation == Activation::kSilu ? g : g * kGeluLinear * (1 + kGeluSquare * g * g);
    gate.lanes[k] = from_float<T>(g / (1 + __expf(-y)) * to_float(up.lanes[k]));
  }
  store<kWidth>(static_cast<T*>(p.out) + token * p.out_stride + i, gate);
}

// One block a token; threads go over K's vectors, then over V's.
template <class T, class Cached, int kWidth>
__global__ void __launch_bounds__(kThreads)
    write_kv_kernel(const __grid_constant__ WriteKvParams p) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int64_t token = blockIdx.x, slot = p.slot_mapping[token];
  const int64_t page = slot / p.block_size, offset = slot % p.block_size;
  const int vectors = p.head_dim / kWidth, per_tensor = p.num_kv_heads * vectors;
  for (int index = threadIdx.x; index < 2 * per_tensor; index += kThreads) {
    const int which = index >= per_tensor;
    const int own = which ? index - per_tensor : index;
    const int head = own / vectors, i = own % vectors * kWidth;
    const CacheParams& cache = p.caches[which];
    const T* source = static_cast<const T*>(p.new_rows[which]) + token * p.strides[which][0] +
                      head * p.strides[which][1] + i;
    Cached* target = static_cast<Cached*>(cache.data) + page * cache.page_stride +
                     offset * cache.token_stride + head * cache.head_stride + i;
    const Vec<T, kWidth> row = load<kWidth>(source);
    if constexpr (std::is_same_v<T, Cached>) {
      store<kWidth>(target, row);
    } else {
      Vec<Cached, kWidth> converted;
      for (int k = 0; k < kWidth; ++k) {
        converted.lanes[k] = from_float<Cached>(to_float(row.lanes[k]));
      }
      store<kWidth>(target, converted);
    }
  }
}

// Calls use(element, width): the widest vectors that all these pointers and counts allow.
template <class Use>
void with_type(DType dtype, bool is_wide, Use use) {
  const auto with_width = [&](auto element) {
    using T = decltype(element);
    if (is_wide)
      use(element, std::integral_constant<int, 16 / sizeof(T)>());
    else
      use(element, std::integral_constant<int, 1>());
  };
  if (dtype == DType::kBFloat16)
    with_width(BFloat16());
  else
    with_width(float());
}

bool are_multiples_of_8(std::initializer_list<int64_t> counts) {
  for (int64_t count : counts) {
    if (count % 8 != 0) return false;
  }
  return true;
}

}  // namespace

const char* rms_norm(const RmsNormParams& p, void* stream) {
  const bool is_wide =
      is_aligned(p.x) && is_aligned(p.out) && is_aligned(p.weight) && is_aligned(p.residual) &&
      are_multiples_of_8({p.size, p.x_strides[0], p.x_strides[1], p.out_strides[0],
                          p.out_strides[1], p.residual_strides[0], p.residual_strides[1]});
  with_type(p.dtype, is_wide, [&](auto element, auto width) {
    launch(rms_norm_kernel<decltype(element), width>, dim3(p.num_tokens * p.num_heads), kThreads,
           stream, p);
  });
  return last_error();
}

const char* rope(const RopeParams& p, void* stream) {
  bool is_wide = are_multiples_of_8({p.half});
  for (int i = 0; i < 2; ++i) {
    is_wide = is_wide && is_aligned(p.tensors[i]) &&
              are_multiples_of_8({p.strides[i][0], p.strides[i][1]});
  }
  with_type(p.dtype, is_wide, [&](auto element, auto width) {
    launch(rope_kernel<decltype(element), width>, dim3(p.num_tokens), kThreads, stream, p);
  });
  return last_error();
}

const char* act_and_mul(const ActAndMulParams& p, void* stream) {
  const bool is_wide = is_aligned(p.out) && is_aligned(p.gate_up) &&
                       are_multiples_of_8({p.size, p.out_stride, p.gate_up_stride});
  with_type(p.dtype, is_wide, [&](auto element, auto width) {
    const int64_t per_block = kThreads * width;
    const dim3 grid((p.size + per_block - 1) / per_block, p.num_tokens);
    launch(act_and_mul_kernel<decltype(element), width>, grid, kThreads, stream, p);
  });
  return last_error();
}

const char* write_kv(const WriteKvParams& p, void* stream) {
  bool is_wide = are_multiples_of_8({p.head_dim});
  for (int i = 0; i < 2; ++i) {
    const CacheParams& cache = p.caches[i];
    is_wide = is_wide && is_aligned(p.new_rows[i]) && is_aligned(cache.data) &&
              are_multiples_of_8({p.strides[i][0], p.strides[i][1], cache.page_stride,
                                  cache.token_stride, cache.head_stride});
  }
  with_type(p.dtype, is_wide, [&](auto element, auto width) {
    using T = decltype(element);
    const auto kernel =
        p.has_float8_caches ? write_kv_kernel<T, Float8, width> : write_kv_kernel<T, T, width>;
    launch(kernel, dim3(p.num_tokens), kThreads, stream, p);
  });
  return last_error();
}

}  // namespace loraplex::cuda
