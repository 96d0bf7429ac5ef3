// Bulk copies to shared memory, and the barriers that tell when they have arrived; Hopper only.
#pragma once

#include <cuda_runtime.h>

#include "device.cuh"

namespace loraplex::cuda {
namespace {

__device__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ void init_barrier(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(count));
}

// What copies see of barriers that one thread has made.
__device__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

__device__ void expect_bytes(uint64_t* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

__device__ void wait_for(uint64_t* barrier, uint32_t round) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(round)
      : "memory");
}

constexpr uint64_t kReadOnce = 0x12F0000000000000;  // the L2 cache's policy "evict first"

// Stages that copies fill and consumers empty, and where one of the two is.
struct Ring {
  uint64_t *full, *empty;
  int num_stages;
  int stage = 0;
  uint32_t round = 0;

  __device__ void advance() {
    if (++stage == num_stages) stage = 0, round ^= 1;
  }
  __device__ void wait_until_full() { wait_for(full + stage, round); }
  __device__ void wait_until_empty() { wait_for(empty + stage, round ^ 1); }
};

}  // namespace
}  // namespace loraplex::cuda
