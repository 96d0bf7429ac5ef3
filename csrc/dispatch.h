// What the bindings of the operations share: the kernels in use, and where a call runs.
#pragma once

#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/tvm_ffi.h>

#include <type_traits>

#include "arguments.h"
#include "cpu/kernels.h"

#ifdef LORAPLEX_CUDA
#define LORAPLEX_CUDA_KERNEL(kernel) &cuda::kernel
#else
#define LORAPLEX_CUDA_KERNEL(kernel) nullptr
#endif

namespace loraplex {

// The CPU kernels in use. The only state of the library: a property of the machine, which tests
// may override.
extern const Kernels* active;

// The parameters alone decide the type: a build without CUDA has nullptr for a kernel.
template <class Params>
using CudaKernel = const char* (*)(const std::type_identity_t<Params>&, void*);

// Enqueues a kernel on the stream that torch works on.
template <class Params>
void run_on_cuda(const char* function, DLDevice device, CudaKernel<Params> kernel,
                 const Params& p) {
  LORAPLEX_REQUIRE(device.device_type == kDLCUDA && kernel != nullptr)
      << function << ": tensors are on a device that this build has no kernels for";
  const char* error = kernel(p, TVMFFIEnvGetStream(device.device_type, device.device_id));
  if (error != nullptr) TVM_FFI_THROW(RuntimeError) << function << ": " << error;
}

template <class Params>
void run(const char* function, DLDevice device, void (*on_cpu)(const Params&),
         CudaKernel<Params> on_cuda, const Params& p) {
  if (device.device_type == kDLCPU)
    on_cpu(p);
  else
    run_on_cuda(function, device, on_cuda, p);
}

}  // namespace loraplex
