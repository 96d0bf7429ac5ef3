// y = x W^T for few rows of x: the weights go through once, as fast as memory gives them.
//
// What bounds such a product is reading W, so everything serves that. Each multiprocessor has one
// block, which takes an equal share of all of W: a share is a run of steps, kDepth columns of a
// tile of kTileFeatures rows, and may begin and end inside of a tile (stream-K, Osama et al. 2023).
// A warp copies tiles of W and x to shared memory with the bulk tensor copy engine, stages ahead of
// two warpgroups, which multiply them with wgmma: the features are the rows of its product, the
// tokens its columns. W does not depend on the kernel before this one, so its first stages are on
// their way while that one still runs (programmatic dependent launch): row-wise kernels between two
// linears cost little more than a microsecond.
//
// A block that begins inside of a tile leaves its sums to the block that began the tile, which adds
// them in order: the result is the same every time, and depends on a row's own x alone.
#include <cuda.h>

#include "bulk_copy.cuh"
#include "kernels.h"

namespace loraplex::cuda {
namespace {

constexpr int kTileFeatures = 128, kDepth = 64;
constexpr int kWarpgroups = 2, kWarpgroupThreads = 128;
constexpr int kConsumers = kWarpgroups * kWarpgroupThreads;
constexpr int kThreads = kConsumers + 32;
constexpr int kWarpgroupFeatures = kTileFeatures / kWarpgroups;
constexpr int kRowBytes = kDepth * sizeof(BFloat16);  // of a tile: what the swizzle repeats at
constexpr int kAtomBytes = 8 * kRowBytes;             // rows that are swizzled together

// Sums of a warpgroup: kTokens columns of its features, by chunks as wide as one wgmma.
template <int kTokens>
struct Sums {
  static constexpr int kChunk = kTokens < 64 ? kTokens : 64;
  static constexpr int kChunks = kTokens / kChunk;
  static constexpr int kVectors = kTokens / 8;  // of 4 sums, for each thread
  float of[kChunks][kChunk / 2];
};

template <int kTokens>
struct Stages {
  static constexpr int kWeightBytes = kTileFeatures * kRowBytes;
  static constexpr int kBytes = kWeightBytes + kTokens * kRowBytes;
  static constexpr int kCount = 200 * 1024 / kBytes;
  static constexpr int kSharedBytes = kCount * kBytes + kAtomBytes;  // and room to align
};

// ---- copies and products ----

__device__ void copy_tokens(uint32_t target, const CUtensorMap& map, uint64_t* barrier,
                            int column) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(target),
      "l"(&map), "r"(shared_address(barrier)), "r"(column), "r"(0)
      : "memory");
}

__device__ void copy_weights(uint32_t target, const CUtensorMap& map, uint64_t* barrier, int column,
                             int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(target),
      "l"(&map), "r"(shared_address(barrier)), "r"(column), "r"(row), "l"(kReadOnce)
      : "memory");
}

// Descriptor of a tile in shared memory: rows of kRowBytes, swizzled over that width.
__device__ uint64_t describe(uint32_t address) {
  const uint64_t atom_stride = kAtomBytes >> 4, swizzle_128 = 1;
  return (address & 0x3FFFF) >> 4 | uint64_t{1} << 16 | atom_stride << 32 | swizzle_128 << 62;
}

__device__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
__device__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// d (+)= A B^T over 16 columns: A has 64 rows, B 16.
__device__ __forceinline__ void multiply(float (&d)[8], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %10, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, p, 1, 1, 0, 0;\n"
      "}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7])
      : "l"(a), "l"(b), "r"(accumulate));
}

// The same with 64 rows of B.
__device__ __forceinline__ void multiply(float (&d)[32], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "%32, %33, p, 1, 1, 0, 0;\n"
      "}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
        "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "l"(a), "l"(b), "r"(accumulate));
}

// ---- shares of the work, and sums that go from block to block ----

// Steps [first_step(b), first_step(b + 1)) are block b's.
struct Shares {
  int depth, num_steps;  // of a tile, and of all tiles

  __device__ int first_step(int block) const {
    return static_cast<int>(int64_t{num_steps} * block / gridDim.x);
  }
};

__device__ void sync_warpgroup(int warpgroup) {
  asm volatile("bar.sync %0, %1;" ::"r"(warpgroup + 1), "n"(kWarpgroupThreads) : "memory");
}

__device__ void add(float4& sum, const float4& other) {
  sum.x += other.x, sum.y += other.y, sum.z += other.z, sum.w += other.w;
}

// Where each warpgroup of a block leaves its sums for another block's, and says that it has.
template <int kTokens>
struct Handover {
  static constexpr int kVectors = Sums<kTokens>::kVectors;
  static constexpr int kBlockVectors = kWarpgroups * kVectors * kWarpgroupThreads;
  float4* own_place;
  int32_t* flags;
  int warpgroup, thread;

  __device__ Handover(const LinearParams& p, int warpgroup)
      : own_place(reinterpret_cast<float4*>(p.partials) + blockIdx.x * kBlockVectors +
                  warpgroup * kVectors * kWarpgroupThreads + threadIdx.x % kWarpgroupThreads),
        flags(p.flags + warpgroup),
        warpgroup(warpgroup),
        thread(threadIdx.x % kWarpgroupThreads) {}

  __device__ void give(const Sums<kTokens>& own) const {
    const float4* vectors = reinterpret_cast<const float4*>(own.of);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) __stcg(own_place + i * kWarpgroupThreads, vectors[i]);
    __threadfence();
    sync_warpgroup(warpgroup);
    if (thread == 0) {
      asm volatile("st.release.gpu.global.s32 [%0], 1;" ::"l"(flags + blockIdx.x * kWarpgroups)
                   : "memory");
    }
  }

  // Adds the sums of the next `count` blocks, and leaves their flags as they were.
  __device__ void take(Sums<kTokens>& own, const Shares& shares, int count) const {
    for (int block = blockIdx.x + 1 + thread; block <= blockIdx.x + count;
         block += kWarpgroupThreads) {
      if (shares.first_step(block) == shares.first_step(block + 1)) continue;
      int32_t* flag = flags + block * kWarpgroups;
      int32_t is_there = 0;
      while (is_there == 0) {
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(is_there) : "l"(flag) : "memory");
      }
      *flag = 0;
    }
    sync_warpgroup(warpgroup);
    float4* vectors = reinterpret_cast<float4*>(own.of);
    for (int n = 1; n <= count; n += 2) {
      // Two at a time are on their way at once.
      const bool has_first = has_share(shares, n),
                 has_second = n < count && has_share(shares, n + 1);
      float4 first[kVectors], second[kVectors];
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const float4* place = own_place + n * kBlockVectors + i * kWarpgroupThreads;
        first[i] = has_first ? __ldcg(place) : make_float4(0, 0, 0, 0);
        second[i] = has_second ? __ldcg(place + kBlockVectors) : make_float4(0, 0, 0, 0);
      }
#pragma unroll
      for (int i = 0; i < kVectors; ++i) add(vectors[i], first[i]), add(vectors[i], second[i]);
    }
  }

  // With less steps than blocks, some have none.
  static __device__ bool has_share(const Shares& shares, int distance) {
    const int block = blockIdx.x + distance;
    return shares.first_step(block) < shares.first_step(block + 1);
  }
};

// ---- the kernel ----

__device__ uint32_t pack_and_transpose(float x, float y) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;"
               : "=r"(result)
               : "r"(*reinterpret_cast<const uint32_t*>(&pair)));
  return result;
}

// A thread's sums are of features g and g + 8 and of tokens 2 t, 2 t + 1 of each 8; transposed
// within the warp, of features 2 t and 2 t + 1 and of token g.
template <int kTokens>
__device__ void write_rows(const LinearParams& p, const Sums<kTokens>& sums, int first_feature) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, g = lane / 4, t = lane % 4;
  const int feature = first_feature + 16 * warp;
  const BFloat16* bias = static_cast<const BFloat16*>(p.bias);
  float added[2] = {0, 0};
  for (int half = 0; half < 2; ++half) {
    const int own = feature + 8 * half + g;
    if (bias != nullptr && own < p.out_features) added[half] = to_float(bias[own]);
  }
  const float4* vectors = reinterpret_cast<const float4*>(sums.of);
#pragma unroll
  for (int i = 0; i < Sums<kTokens>::kVectors; ++i) {
    const uint32_t halves[2] = {
        pack_and_transpose(vectors[i].x + added[0], vectors[i].y + added[0]),
        pack_and_transpose(vectors[i].z + added[1], vectors[i].w + added[1])};
    const int token = 8 * i + g;
    BFloat16* y = static_cast<BFloat16*>(p.y) + token * p.y_stride;
    for (int half = 0; half < 2; ++half) {
      const int first = feature + 8 * half + 2 * t;
      if (token < p.num_tokens && first < p.out_features) {
        *reinterpret_cast<uint32_t*>(y + first) = halves[half];
      }
    }
  }
}

template <int kTokens>
__device__ void copy_share(uint32_t stages, Ring ring, const Shares& shares,
                           const CUtensorMap& weights, const CUtensorMap& tokens) {
  using S = Stages<kTokens>;
  const int begin = shares.first_step(blockIdx.x), end = shares.first_step(blockIdx.x + 1);
  const auto copy_weight_tile = [&](int step, int stage) {
    expect_bytes(ring.full + stage, S::kBytes);
    copy_weights(stages + stage * S::kBytes, weights, ring.full + stage,
                 step % shares.depth * kDepth, step / shares.depth * kTileFeatures);
  };
  const auto copy_token_tile = [&](int step, int stage) {
    copy_tokens(stages + stage * S::kBytes + S::kWeightBytes, tokens, ring.full + stage,
                step % shares.depth * kDepth);
  };
  const int ahead = min(S::kCount, end - begin);
  for (int i = 0; i < ahead; ++i) copy_weight_tile(begin + i, i);
  wait_for_previous_kernel();
  for (int i = 0; i < ahead; ++i, ring.advance()) copy_token_tile(begin + i, i);
  for (int step = begin + ahead; step < end; ++step, ring.advance()) {
    ring.wait_until_empty();
    copy_weight_tile(step, ring.stage);
    copy_token_tile(step, ring.stage);
  }
}

template <int kTokens>
__device__ void multiply_share(uint32_t stages, Ring ring, const Shares& shares,
                               const LinearParams& p) {
  using S = Stages<kTokens>;
  const int warpgroup = threadIdx.x / kWarpgroupThreads;
  const bool is_first_lane = threadIdx.x % 32 == 0;
  const uint32_t features = stages + warpgroup * kWarpgroupFeatures * kRowBytes;
  const Handover<kTokens> handover(p, warpgroup);
  const int begin = shares.first_step(blockIdx.x), end = shares.first_step(blockIdx.x + 1);
  for (int step = begin; step < end;) {
    const int tile = step / shares.depth, first = step % shares.depth;
    const int num_steps = min(shares.depth - first, end - step);
    Sums<kTokens> sums;
    int last_stage = -1;  // that products in flight may still read
    for (int i = 0; i < num_steps; ++i, ring.advance()) {
      ring.wait_until_full();
      const uint64_t a = describe(features + ring.stage * S::kBytes);
      const uint64_t b = describe(stages + ring.stage * S::kBytes + S::kWeightBytes);
      begin_products();
#pragma unroll
      for (int k = 0; k < kDepth / 16; ++k) {
#pragma unroll
        for (int chunk = 0; chunk < Sums<kTokens>::kChunks; ++chunk) {
          const int rows_before = chunk * Sums<kTokens>::kChunk;
          multiply(sums.of[chunk], a + k * 2, b + k * 2 + (rows_before * kRowBytes >> 4),
                   i > 0 || k > 0);
        }
      }
      commit_products();
      wait_for_products<1>();
      if (last_stage >= 0 && is_first_lane) arrive(ring.empty + last_stage);
      last_stage = ring.stage;
    }
    wait_for_products<0>();
    if (is_first_lane) arrive(ring.empty + last_stage);
    step += num_steps;
    if (first > 0) {
      handover.give(sums);
      continue;
    }
    int last_block = blockIdx.x;
    while (shares.first_step(last_block + 1) < (tile + 1) * shares.depth) ++last_block;
    if (last_block > blockIdx.x) handover.take(sums, shares, last_block - blockIdx.x);
    write_rows<kTokens>(p, sums, tile * kTileFeatures + warpgroup * kWarpgroupFeatures);
  }
}

template <int kTokens>
__global__ void __launch_bounds__(kThreads, 2)
    linear_kernel(const __grid_constant__ CUtensorMap weights,
                  const __grid_constant__ CUtensorMap tokens,
                  const __grid_constant__ LinearParams p) {
  using S = Stages<kTokens>;
  extern __shared__ uint8_t unaligned[];
  const uint32_t stages = (shared_address(unaligned) + kAtomBytes - 1) & ~(kAtomBytes - 1u);
  __shared__ uint64_t full[S::kCount], empty[S::kCount];
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < S::kCount; ++stage) {
      init_barrier(full + stage, 1);
      init_barrier(empty + stage, kConsumers / 32);
    }
    publish_barriers();
  }
  __syncthreads();
  const int depth = (p.in_features + kDepth - 1) / kDepth;
  const int num_tiles = (p.out_features + kTileFeatures - 1) / kTileFeatures;
  const Shares shares{depth, depth * num_tiles};
  const Ring ring{full, empty, S::kCount};
  if (threadIdx.x < kConsumers) {
    // What it writes to, the kernel before may still read.
    wait_for_previous_kernel();
    // Not before x is complete: LoRA's shrink, which has the same input, relies on that.
    allow_next_kernel();
    multiply_share<kTokens>(stages, ring, shares, p);
  } else if (threadIdx.x == kConsumers) {
    copy_share<kTokens>(stages, ring, shares, weights, tokens);
  }
}

// ---- the host's side ----

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// From the driver, which the library is not linked with.
EncodeTiled find_encode_tiled() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult status;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             12000, cudaEnableDefault, &status);
  const bool is_found = error == cudaSuccess && status == cudaDriverEntryPointSuccess;
  return is_found ? reinterpret_cast<EncodeTiled>(function) : nullptr;
}

// Tiles of kDepth columns and so many rows of a matrix; beyond its end there are zeros.
bool map_tiles(CUtensorMap* map, const void* matrix, int64_t rows, int64_t columns, int64_t stride,
               int tile_rows) {
  static const EncodeTiled encode = find_encode_tiled();
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(stride) * sizeof(BFloat16)};
  const cuuint32_t box[] = {kDepth, static_cast<cuuint32_t>(tile_rows)}, steps[] = {1, 1};
  return encode != nullptr &&
         encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(matrix), sizes, strides,
                box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <int kTokens>
const char* launch_linear(const LinearParams& p, void* stream) {
  constexpr int kSharedBytes = Stages<kTokens>::kSharedBytes;
  static const cudaError_t is_allowed = cudaFuncSetAttribute(
      linear_kernel<kTokens>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (is_allowed != cudaSuccess) return cudaGetErrorString(is_allowed);
  CUtensorMap weights, tokens;
  if (!map_tiles(&weights, p.weight, p.out_features, p.in_features, p.in_features, kTileFeatures) ||
      !map_tiles(&tokens, p.x, p.num_tokens, p.in_features, p.x_stride, kTokens)) {
    return "the driver does not make tensor maps of these matrices";
  }
  launch_with_shared(linear_kernel<kTokens>, dim3(p.num_blocks), kThreads, kSharedBytes, stream,
                     weights, tokens, p);
  return last_error();
}

}  // namespace

const char* linear(const LinearParams& p, void* stream) {
  return p.num_tokens <= 16 ? launch_linear<16>(p, stream) : launch_linear<64>(p, stream);
}

}  // namespace loraplex::cuda
