// Gather-matmul through adapters' page tables, on tensor cores: shrink (v = A x), expand (y += B
// v).
//
// A tile of 8 ranks x 64 columns is read straight into registers: lane (g, t) = (lane / 4, lane %
// 4) takes columns 8t..8t+7 of each half of row g. The order in which a matrix product goes through
// its inner dimension is free as long as both sides agree, so these are operands of
// mma.m16n8k16 as they are (shrink), or after a transposition within the warp (expand), and no
// shared memory lies between the adapters and the tensor cores.
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
  int num_blocks;
};

struct Module {
  uint32_t first_tile;
  int rank;
};

__device__ Pages find_pages(const LoraParams& p, const Geometry& geometry, int4 item) {
  return {reinterpret_cast<const BFloat16*>(p.pool), p.pages + item.z, geometry.page_elements,
          geometry.reciprocal, geometry.tiles_per_page};
}

template <bool kIsExpand>
__device__ Module find_module(const LoraParams& p, const Pages& pages, int m) {
  const int4* header =
      reinterpret_cast<const int4*>(pages.pool + pages.pages[0] * pages.page_elements);
  const int4 entry = __ldg(header + p.layer * p.num_modules + p.modules[m]);
  return {static_cast<uint32_t>(kIsExpand ? entry.y : entry.x), entry.z};
}

// Few items: their sums over the input are cut up, so that more multiprocessors take part.
__device__ int num_splits(int num_items, int group_size, int num_blocks) {
  int splits = kMaxSplits;
  while (splits > 1 && num_items * group_size * splits > num_blocks) splits /= 2;
  return splits;
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

// ---- shrink ----

// Sums of one unit: 16 ranks, kRowTiles x 8 rows, over this warp's column tiles.
template <int kRowTiles, int kUnroll>
__device__ void shrink_tiles(float (&sums)[kRowTiles][4], const LoraParams& p, const Pages& pages,
                             uint32_t tiles_0, uint32_t tiles_1, bool has_second, int begin,
                             int end, const BFloat16* const (&rows)[kRowTiles]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int weight_offset = lane / 4 * kTileColumns + lane % 4 * 8, column_offset = lane % 4 * 8;
  for (int first = begin + warp; first < end; first += kWarps * kUnroll) {
    uint4 weights[kUnroll][2][2];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int j = first + u * kWarps;
      const BFloat16* tile_0 = j < end ? pages.tile(tiles_0 + j) + weight_offset : nullptr;
      const BFloat16* tile_1 =
          j < end && has_second ? pages.tile(tiles_1 + j) + weight_offset : nullptr;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        weights[u][half][0] = tile_0 != nullptr ? load_weights(tile_0 + 32 * half) : zeros();
        weights[u][half][1] = tile_1 != nullptr ? load_weights(tile_1 + 32 * half) : zeros();
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int j = first + u * kWarps;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = j * kTileColumns + 32 * half + column_offset;
        const bool is_inside = j < end && column < p.num_columns;
        const uint4 w0 = weights[u][half][0], w1 = weights[u][half][1];
#pragma unroll
        for (int n = 0; n < kRowTiles; ++n) {
          uint4 x = zeros();
          if (is_inside && rows[n] != nullptr) {
            x = __ldg(reinterpret_cast<const uint4*>(rows[n] + column));
          }
          mma(sums[n], w0.x, w1.x, w0.y, w1.y, x.x, x.y);
          mma(sums[n], w0.z, w1.z, w0.w, w1.w, x.z, x.w);
        }
      }
    }
  }
}

// Adds up the warps' sums and writes them to v.
template <int kRowTiles>
__device__ void write_sums(float (&sums)[kRowTiles][4], float* shared, const LoraParams& p,
                           int4 item, int m, int split, int first_rank, int rank) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  constexpr int kRows = 8 * kRowTiles;
  float* own = shared + warp * 16 * kRows;
#pragma unroll
  for (int n = 0; n < kRowTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = 8 * n + lane % 4 * 2 + i % 2;
      own[row * 16 + lane / 4 + i / 2 * 8] = sums[n][i];
    }
  }
  __syncthreads();
  for (int index = threadIdx.x; index < 16 * kRows; index += kThreads) {
    const int row = item.x + index / 16, r = first_rank + index % 16;
    if (row >= item.y || r >= rank) continue;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += shared[w * 16 * kRows + index];
    p.v[row * p.v_token_stride + (m * kMaxSplits + split) * p.max_rank + r] = sum;
  }
  __syncthreads();
}

template <int kRowTiles, int kUnroll>
__device__ void shrink_unit(float* shared, const LoraParams& p, const Geometry& geometry, int4 item,
                            int m, int split, int splits) {
  const Pages pages = find_pages(p, geometry, item);
  const Module module = find_module<false>(p, pages, m);
  wait_for_previous_kernel();
  const int num_tiles = (p.num_columns + kTileColumns - 1) / kTileColumns;
  const int begin = num_tiles * split / splits, end = num_tiles * (split + 1) / splits;
  const BFloat16* rows[kRowTiles];
#pragma unroll
  for (int n = 0; n < kRowTiles; ++n) {
    const int64_t row = item.x + 8 * n + threadIdx.x % 32 / 4;
    rows[n] = row < item.y ? static_cast<const BFloat16*>(p.activations) + row * p.activation_stride
                           : nullptr;
  }
  for (int first_rank = 0; first_rank < module.rank; first_rank += 16) {
    float sums[kRowTiles][4] = {};
    const uint32_t tiles_0 = module.first_tile + first_rank / kTileRanks * num_tiles;
    shrink_tiles<kRowTiles, kUnroll>(sums, p, pages, tiles_0, tiles_0 + num_tiles,
                                     first_rank + kTileRanks < module.rank, begin, end, rows);
    write_sums<kRowTiles>(sums, shared, p, item, m, split, first_rank, module.rank);
  }
}

__global__ void __launch_bounds__(kThreads, 2)
    shrink_kernel(const __grid_constant__ LoraParams p, const __grid_constant__ Geometry geometry) {
  __shared__ float shared[kWarps * 16 * kItemRows];
  allow_next_kernel();
  const int num_items = *p.num_items;
  const int splits = num_splits(num_items, p.group_size, geometry.num_blocks);
  const int num_units = num_items * p.group_size * splits;
  for (int unit = blockIdx.x; unit < num_units; unit += gridDim.x) {
    const int split = unit % splits, m = unit / splits % p.group_size;
    const int4 item = __ldg(reinterpret_cast<const int4*>(p.items) + unit / splits / p.group_size);
    if (item.y - item.x <= 8) {
      shrink_unit<1, 4>(shared, p, geometry, item, m, split, splits);
    } else {
      shrink_unit<kItemRows / 8, 2>(shared, p, geometry, item, m, split, splits);
    }
  }
  // A block without work must not seem done before what it would have waited for is.
  wait_for_previous_kernel();
}

// ---- expand ----

__device__ uint32_t transpose(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// Two floats as bfloat16, and what that leaves of them: together nearly exact.
__device__ void split_floats(float x, float y, uint32_t& high, uint32_t& low) {
  const __nv_bfloat162 rounded = __floats2bfloat162_rn(x, y);
  const __nv_bfloat162 rest =
      __floats2bfloat162_rn(x - __low2float(rounded), y - __high2float(rounded));
  high = *reinterpret_cast<const uint32_t*>(&rounded);
  low = *reinterpret_cast<const uint32_t*>(&rest);
}

// Entries r and r + 1 of a row of v, added up over the splits; zeros past the rank.
__device__ float2 load_v(const float* v, int r, int rank, int max_rank, int splits) {
  float2 sum = make_float2(0, 0);
  if (v == nullptr || r >= rank) return sum;
  for (int split = 0; split < splits; ++split) {
    sum.x += v[split * max_rank + r];
    if (r + 1 < rank) sum.y += v[split * max_rank + r + 1];
  }
  return sum;
}

// y[rows, 64 columns] += v B, for kRowTiles x 8 rows from first_row on, by one warp.
template <int kRowTiles>
__device__ void expand_tile(const LoraParams& p, const Pages& pages, const Module& module, int m,
                            int j, int num_tiles, int first_row, int end_row, int splits) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int width = p.offsets[m + 1] - p.offsets[m];
  const int tile_offset = g * kTileColumns + t * 8;
  uint4 weights[2][2];
  const auto load_ranks = [&](int first_rank) {
    const uint32_t tile = module.first_tile + first_rank / kTileRanks * num_tiles + j;
    const bool has_second = first_rank + kTileRanks < module.rank;
    const BFloat16* tile_0 = pages.tile(tile) + tile_offset;
    const BFloat16* tile_1 = has_second ? pages.tile(tile + num_tiles) + tile_offset : nullptr;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      weights[half][0] = load_weights(tile_0 + 32 * half);
      weights[half][1] = has_second ? load_weights(tile_1 + 32 * half) : zeros();
    }
  };
  // What no kernel before this one writes is on its way already when those have ended.
  load_ranks(0);
  wait_for_previous_kernel();
  // Of the result, this lane writes one row of each row tile, 8 columns of each half.
  BFloat16* y = static_cast<BFloat16*>(p.activations) + p.offsets[m];
  const int own_row = first_row + 2 * t + g % 2, own_column = j * kTileColumns + g / 2 * 8;
  uint4 old[kRowTiles][2];
  const float* v[kRowTiles];
#pragma unroll
  for (int n = 0; n < kRowTiles; ++n) {
    const int row = first_row + 8 * n + g;
    v[n] = row < end_row ? p.v + row * p.v_token_stride + m * kMaxSplits * p.max_rank : nullptr;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool is_inside = own_row + 8 * n < end_row && own_column + 32 * half < width;
      old[n][half] = is_inside
                         ? *reinterpret_cast<const uint4*>(
                               y + (own_row + 8 * n) * p.activation_stride + own_column + 32 * half)
                         : zeros();
    }
  }
  float sums[kRowTiles][2][2][4] = {};
  for (int first_rank = 0; first_rank < module.rank; first_rank += 16) {
    if (first_rank > 0) load_ranks(first_rank);
    uint32_t high[kRowTiles][2], low[kRowTiles][2];
#pragma unroll
    for (int n = 0; n < kRowTiles; ++n) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const float2 pair =
            load_v(v[n], first_rank + 2 * t + 8 * k, module.rank, p.max_rank, splits);
        split_floats(pair.x, pair.y, high[n][k], low[n][k]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 w0 = weights[half][0], w1 = weights[half][1];
      const uint32_t columns[2][4] = {
          {transpose(w0.x), transpose(w0.y), transpose(w1.x), transpose(w1.y)},
          {transpose(w0.z), transpose(w0.w), transpose(w1.z), transpose(w1.w)}};
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const uint32_t (&a)[4] = columns[pair];
#pragma unroll
        for (int n = 0; n < kRowTiles; ++n) {
          mma(sums[n][half][pair], a[0], a[1], a[2], a[3], high[n][0], high[n][1]);
          mma(sums[n][half][pair], a[0], a[1], a[2], a[3], low[n][0], low[n][1]);
        }
      }
    }
  }
  // A lane holds every other of 8 columns, of two rows: neighbours swap, so that each has all 8
  // columns of one row.
  const bool is_odd = g % 2;
#pragma unroll
  for (int n = 0; n < kRowTiles; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint4 out = old[n][half];
      __nv_bfloat162* lanes = reinterpret_cast<__nv_bfloat162*>(&out);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float first = sums[n][half][i / 2][i % 2 * 2];
        const float second = sums[n][half][i / 2][i % 2 * 2 + 1];
        const float other = __shfl_xor_sync(kFullWarp, is_odd ? first : second, 4);
        const float even = is_odd ? other : first, odd = is_odd ? second : other;
        const float2 before = __bfloat1622float2(lanes[i]);
        lanes[i] = __floats2bfloat162_rn(before.x + even, before.y + odd);
      }
      if (own_row + 8 * n < end_row && own_column + 32 * half < width) {
        *reinterpret_cast<uint4*>(y + (own_row + 8 * n) * p.activation_stride + own_column +
                                  32 * half) = out;
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads, 2)
    expand_kernel(const __grid_constant__ LoraParams p, const __grid_constant__ Geometry geometry) {
  allow_next_kernel();
  const int num_items = *p.num_items;
  const int splits = num_splits(num_items, p.group_size, geometry.num_blocks);
  int tiles_before[kMaxGroup + 1];
  tiles_before[0] = 0;
#pragma unroll
  for (int m = 0; m < kMaxGroup; ++m) {
    const int width = m < p.group_size ? p.offsets[m + 1] - p.offsets[m] : 0;
    tiles_before[m + 1] = tiles_before[m] + (width + kTileColumns - 1) / kTileColumns;
  }
  const int num_tiles = tiles_before[kMaxGroup];
  const int num_units = num_items * num_tiles;
  // Blocks first, so that few units spread over all multiprocessors.
  for (int unit = threadIdx.x / 32 * gridDim.x + blockIdx.x; unit < num_units;
       unit += gridDim.x * kWarps) {
    const int tile = unit % num_tiles;
    const int4 item =
        __ldg(reinterpret_cast<const int4*>(p.items) + unit / tiles_before[kMaxGroup]);
    int m = 0, begin = 0, end = tiles_before[1];
#pragma unroll
    for (int next = 1; next < kMaxGroup; ++next) {
      if (tile >= tiles_before[next] && next < p.group_size) {
        m = next, begin = tiles_before[next], end = tiles_before[next + 1];
      }
    }
    const Pages pages = find_pages(p, geometry, item);
    const Module module = find_module<true>(p, pages, m);
    if (module.rank == 0) continue;
    if (item.y - item.x <= 8) {
      expand_tile<1>(p, pages, module, m, tile - begin, end - begin, item.x, item.y, splits);
      continue;
    }
    expand_tile<kItemRows / 8>(p, pages, module, m, tile - begin, end - begin, item.x, item.y,
                               splits);
  }
  wait_for_previous_kernel();
}

// ---- float32: no tensor cores, for exactness ----

struct Float32Module {
  const float* pool;
  const int32_t* pages;
  int64_t page_elements;
  int first_tile, rank, tiles_per_page, num_tiles;

  __device__ float at(int r, int column) const {
    const int tile = first_tile + r / kTileRanks * num_tiles + column / kTileColumns;
    return pool[pages[tile / tiles_per_page] * page_elements +
                tile % tiles_per_page * kTileElements + r % kTileRanks * kTileColumns +
                column % kTileColumns];
  }
};

__device__ Float32Module find_float32_module(const LoraParams& p, int4 item, int m, int columns,
                                             bool is_expand) {
  const int64_t page_elements = p.page_bytes / sizeof(float);
  const float* pool = reinterpret_cast<const float*>(p.pool);
  const int32_t* pages = p.pages + item.z;
  const int4 entry = reinterpret_cast<const int4*>(
      pool + pages[0] * page_elements)[p.layer * p.num_modules + p.modules[m]];
  return {pool,
          pages,
          page_elements,
          is_expand ? entry.y : entry.x,
          entry.z,
          static_cast<int>(page_elements / kTileElements),
          (columns + kTileColumns - 1) / kTileColumns};
}

// One block an (item, module); warps go over (row, rank).
__global__ void shrink_float32_kernel(LoraParams p) {
  for (int item_index = blockIdx.x; item_index < *p.num_items; item_index += gridDim.x) {
    const int4 item = reinterpret_cast<const int4*>(p.items)[item_index];
    const int m = blockIdx.y;
    const Float32Module module = find_float32_module(p, item, m, p.num_columns, false);
    const int count = (item.y - item.x) * module.rank;
    for (int index = threadIdx.x / 32; index < count; index += kWarps) {
      const int row = item.x + index / module.rank, r = index % module.rank;
      const float* x = static_cast<const float*>(p.activations) + row * p.activation_stride;
      float sum = 0;
      for (int i = threadIdx.x % 32; i < p.num_columns; i += 32) sum += module.at(r, i) * x[i];
      for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(kFullWarp, sum, offset);
      if (threadIdx.x % 32 == 0) {
        p.v[row * p.v_token_stride + m * kMaxSplits * p.max_rank + r] = sum;
      }
    }
  }
}

// One block an (item, module); threads go over (row, column).
__global__ void expand_float32_kernel(LoraParams p) {
  for (int item_index = blockIdx.x; item_index < *p.num_items; item_index += gridDim.x) {
    const int4 item = reinterpret_cast<const int4*>(p.items)[item_index];
    const int m = blockIdx.y, width = p.offsets[m + 1] - p.offsets[m];
    const Float32Module module = find_float32_module(p, item, m, width, true);
    if (module.rank == 0) continue;
    for (int index = threadIdx.x; index < (item.y - item.x) * width; index += kThreads) {
      const int row = item.x + index / width, column = index % width;
      const float* v = p.v + row * p.v_token_stride + m * kMaxSplits * p.max_rank;
      float sum = 0;
      for (int r = 0; r < module.rank; ++r) sum += module.at(r, column) * v[r];
      static_cast<float*>(p.activations)[row * p.activation_stride + p.offsets[m] + column] += sum;
    }
  }
}

Geometry make_geometry(const LoraParams& p) {
  static const int num_multiprocessors = [] {
    int device = 0, count = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count;
  }();
  const int64_t page_elements = p.page_bytes / static_cast<int64_t>(sizeof(BFloat16));
  const int tiles_per_page = static_cast<int>(page_elements / kTileElements);
  const uint64_t reciprocal = ((uint64_t{1} << 40) + tiles_per_page - 1) / tiles_per_page;
  return {page_elements, reciprocal, tiles_per_page, 2 * num_multiprocessors};
}

}  // namespace

const char* lora_shrink(const LoraParams& p, void* stream) {
  const Geometry geometry = make_geometry(p);
  if (p.dtype == DType::kFloat32) {
    shrink_float32_kernel<<<dim3(geometry.num_blocks, p.group_size), kThreads, 0,
                            static_cast<cudaStream_t>(stream)>>>(p);
  } else {
    launch(shrink_kernel, dim3(geometry.num_blocks), kThreads, stream, p, geometry);
  }
  return last_error();
}

const char* lora_expand(const LoraParams& p, void* stream) {
  const Geometry geometry = make_geometry(p);
  if (p.dtype == DType::kFloat32) {
    expand_float32_kernel<<<dim3(geometry.num_blocks, p.group_size), kThreads, 0,
                            static_cast<cudaStream_t>(stream)>>>(p);
  } else {
    launch(expand_kernel, dim3(geometry.num_blocks), kThreads, stream, p, geometry);
  }
  return last_error();
}

}  // namespace loraplex::cuda
