// Small things that the CUDA kernels share: types, vectors of them, and launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace loraplex::cuda {

using BFloat16 = __nv_bfloat16;
using Float8 = __nv_fp8_e4m3;

template <class T>
__device__ __forceinline__ float to_float(T x) {
  if constexpr (std::is_same_v<T, BFloat16>)
    return __bfloat162float(x);
  else
    return x;
}

// Float8: what is beyond its greatest number becomes that.
template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, BFloat16>)
    return __float2bfloat16(x);
  else
    return T(x);
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

// Programmatic dependent launch (CUDA programming guide): a kernel may begin while the one before
// it in the stream ends, and waits here before it touches what that one has to do with.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel of the stream begin as soon as there is room for it.
__device__ __forceinline__ void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Launches a kernel that calls wait_for_previous_kernel().
template <class... Parameters, class... Arguments>
void launch_with_shared(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes,
                        void* stream, const Arguments&... arguments) {
  static const bool has_dependent_launch = [] {
    int device = 0, major = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    return major >= 9;
  }();
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = has_dependent_launch;
  cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, void* stream,
            const Arguments&... arguments) {
  launch_with_shared(kernel, grid, threads, 0, stream, arguments...);
}

inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace loraplex::cuda
