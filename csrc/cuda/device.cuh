// Small things that the CUDA kernels share: types, vectors of them, and launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace loraplex::cuda {

using BFloat16 = __nv_bfloat16;

template <class T>
__device__ __forceinline__ float to_float(T x) {
  if constexpr (std::is_same_v<T, BFloat16>)
    return __bfloat162float(x);
  else
    return x;
}

template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, BFloat16>)
    return __float2bfloat16(x);
  else
    return x;
}

// kWidth elements that are read and written at once.
template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vec {
  T lanes[kWidth];
};

template <int kWidth, class T>
__device__ __forceinline__ Vec<T, kWidth> load(const T* p) {
  return *reinterpret_cast<const Vec<T, kWidth>*>(p);
}

template <int kWidth, class T>
__device__ __forceinline__ void store(T* p, const Vec<T, kWidth>& value) {
  *reinterpret_cast<Vec<T, kWidth>*>(p) = value;
}

// What is wrong with the launches so far, null if nothing is.
inline const char* last_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace loraplex::cuda
