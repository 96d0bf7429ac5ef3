// What the LoRA kernels share: adapters' tiles, found through page tables, and tensor cores.
//
// A tile of 8 ranks x 64 columns is read straight into registers: lane (g, t) = (lane / 4, lane %
// 4) takes columns 8t..8t+7 of each half of row g. The order in which a matrix product goes through
// its inner dimension is free as long as both sides agree, so these are operands of
// mma.m16n8k16 as they are (shrink), or after a transposition within the warp (expand), and no
// shared memory lies between the adapters and the tensor cores.
#pragma once

#include "device.cuh"
#include "kernels.h"

namespace loraplex::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kTileElements = kTileRanks * kTileColumns;
constexpr unsigned kFullWarp = ~0u;

// Finds tiles of one adapter.
struct Pages {
  const BFloat16* pool;
  const int32_t* pages;
  int32_t first;  // of pages
  int64_t page_elements;
  uint64_t reciprocal;  // of tiles_per_page, times 2^40
  int tiles_per_page;

  __device__ const BFloat16* tile(uint32_t number) const {
    const uint32_t index = static_cast<uint32_t>((number * reciprocal) >> 40);
    return pool + pages[index] * page_elements + (number - index * tiles_per_page) * kTileElements;
  }
};

// What the host knows once a launch.
struct Geometry {
  int64_t page_elements;
  uint64_t reciprocal;
  int tiles_per_page;
};

struct Module {
  uint32_t first_tile;
  int rank;
};

__device__ Pages find_pages(const LoraParams& p, const Geometry& geometry, int4 item) {
  return {reinterpret_cast<const BFloat16*>(p.pool),
          p.pages + item.z,
          item.w,
          geometry.page_elements,
          geometry.reciprocal,
          geometry.tiles_per_page};
}

template <bool kIsExpand>
__device__ Module find_module(const LoraParams& p, const Pages& pages, int m) {
  const int4* header =
      reinterpret_cast<const int4*>(pages.pool + pages.first * pages.page_elements);
  const int4 entry = __ldg(header + p.layer * p.num_modules + p.modules[m]);
  return {static_cast<uint32_t>(kIsExpand ? entry.y : entry.x), entry.z};
}

__device__ void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                    uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Weights are read once: they must not push activations out of the L1 cache.
__device__ uint4 load_weights(const BFloat16* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

__device__ uint4 zeros() { return make_uint4(0, 0, 0, 0); }

inline Geometry make_geometry(const LoraParams& p) {
  const int64_t page_elements = p.page_bytes / static_cast<int64_t>(sizeof(BFloat16));
  const int tiles_per_page = static_cast<int>(page_elements / kTileElements);
  const uint64_t reciprocal = ((uint64_t{1} << 40) + tiles_per_page - 1) / tiles_per_page;
  return {page_elements, reciprocal, tiles_per_page};
}

// Two a multiprocessor.
inline int num_blocks() {
  static const int count = [] {
    int device = 0, multiprocessors = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    return 2 * multiprocessors;
  }();
  return count;
}

}  // namespace
}  // namespace loraplex::cuda
