// Which instruction sets and devices this build and machine have.
#include "dispatch.h"

#include <string>

namespace loraplex {

using tvm::ffi::Array;
using tvm::ffi::String;

namespace {

#define LORAPLEX_TABLE(isa)                                               \
  {#isa,           &isa::rms_norm,  &isa::rope,        &isa::act_and_mul, \
   &isa::write_kv, &isa::attention, &isa::lora_shrink, &isa::lora_expand, \
   &isa::sample,   &isa::grouped}

// From the plainest to the best.
constexpr Kernels kAllKernels[] = {
    LORAPLEX_TABLE(portable),
#ifdef LORAPLEX_X86
    LORAPLEX_TABLE(avx2),
    LORAPLEX_TABLE(avx512),
    LORAPLEX_TABLE(avx512bf16),
#endif
};

bool machine_has(const std::string& isa) {
  if (isa == "portable") return true;
#ifdef LORAPLEX_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  if (isa == "avx2") return avx2;
  if (isa == "avx512") return avx512;
  if (isa == "avx512bf16") return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return false;
}

const Kernels* best_kernels() {
  const Kernels* best = nullptr;
  for (const Kernels& kernels : kAllKernels) {
    if (machine_has(kernels.isa)) best = &kernels;
  }
  return best;
}

}  // namespace

const Kernels* active = best_kernels();

namespace {

String get_cpu_isa() { return active->isa; }

Array<String> supported_cpu_isas() {
  Array<String> names;
  for (const Kernels& kernels : kAllKernels) {
    if (machine_has(kernels.isa)) names.push_back(kernels.isa);
  }
  return names;
}

void set_cpu_isa(const String& isa) {
  std::string allowed;
  for (const Kernels& kernels : kAllKernels) {
    if (!machine_has(kernels.isa)) continue;
    if (isa == kernels.isa) {
      active = &kernels;
      return;
    }
    allowed += std::string(allowed.empty() ? "" : ", ") + kernels.isa;
  }
  TVM_FFI_THROW(ValueError) << "'" << isa
                            << "' is not an instruction set that this build and machine "
                            << "have; they have " << allowed;
}

// Whether this build can run on CUDA devices.
bool has_cuda() {
#ifdef LORAPLEX_CUDA
  return true;
#else
  return false;
#endif
}

}  // namespace
}  // namespace loraplex

TVM_FFI_DLL_EXPORT_TYPED_FUNC(has_cuda, loraplex::has_cuda);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(get_cpu_isa, loraplex::get_cpu_isa);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(supported_cpu_isas, loraplex::supported_cpu_isas);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(set_cpu_isa, loraplex::set_cpu_isa);
