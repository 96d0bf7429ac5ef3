// y += B v for each row's adapter, in bfloat16 on tensor cores; see lora_tiles.cuh.
#include "lora_tiles.cuh"

namespace loraplex::cuda {
namespace {

__device__ uint32_t transpose(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// Two floats as bfloat16, and what that leaves of them: together nearly exact.
struct SplitPair {
  uint32_t high, low;
};

__device__ SplitPair split_floats(float2 pair) {
  const __nv_bfloat162 rounded = __floats2bfloat162_rn(pair.x, pair.y);
  const __nv_bfloat162 rest =
      __floats2bfloat162_rn(pair.x - __low2float(rounded), pair.y - __high2float(rounded));
  return {*reinterpret_cast<const uint32_t*>(&rounded), *reinterpret_cast<const uint32_t*>(&rest)};
}

// Entries r and r + 1 of a row of v; zeros past the rank.
__device__ float2 load_v(const float* v, int r, int rank) {
  if (v == nullptr || r >= rank) return make_float2(0, 0);
  const float2 pair = *reinterpret_cast<const float2*>(v + r);
  return r + 1 < rank ? pair : make_float2(pair.x, 0);
}

// 64 columns of B for 16 ranks, as they lie in the adapter: of rank tiles 0 and 1, by half.
struct ExpandWeights {
  uint4 of[2][2];

  __device__ void load(const Pages& pages, const Module& module, int first_rank, int num_tiles,
                       int j) {
    const int lane = threadIdx.x % 32, offset = lane / 4 * kTileColumns + lane % 4 * 8;
    const uint32_t tile = module.first_tile + first_rank / kTileRanks * num_tiles + j;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool is_there = first_rank + r * kTileRanks < module.rank;
      const BFloat16* p = is_there ? pages.tile(tile + r * num_tiles) + offset : nullptr;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        of[r][half] = is_there ? load_weights(p + 32 * half) : zeros();
      }
    }
  }
};

// Sums of kRowTiles x 8 rows and 64 columns: by half, and by which of each two columns.
template <int kRowTiles>
struct ExpandSums {
  float of[kRowTiles][2][2][4] = {};

  __device__ void add(const ExpandWeights& weights, const SplitPair (&v)[kRowTiles][2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 w0 = weights.of[0][half], w1 = weights.of[1][half];
      const uint32_t columns[2][4] = {
          {transpose(w0.x), transpose(w0.y), transpose(w1.x), transpose(w1.y)},
          {transpose(w0.z), transpose(w0.w), transpose(w1.z), transpose(w1.w)}};
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const uint32_t (&a)[4] = columns[pair];
#pragma unroll
        for (int n = 0; n < kRowTiles; ++n) {
          float (&d)[4] = of[n][half][pair];
          mma(d, a[0], a[1], a[2], a[3], v[n][0].high, v[n][1].high);
          mma(d, a[0], a[1], a[2], a[3], v[n][0].low, v[n][1].low);
        }
      }
    }
  }

  // A lane holds every other of 8 columns, of two rows: neighbours swap, so that each has all 8
  // columns of one row, which it adds to `before`.
  __device__ uint4 added_to(uint4 before, int n, int half) const {
    const bool is_odd = threadIdx.x / 4 % 2;
    __nv_bfloat162* lanes = reinterpret_cast<__nv_bfloat162*>(&before);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float first = of[n][half][i / 2][i % 2 * 2];
      const float second = of[n][half][i / 2][i % 2 * 2 + 1];
      const float other = __shfl_xor_sync(kFullWarp, is_odd ? first : second, 4);
      const float even = is_odd ? other : first, odd = is_odd ? second : other;
      const float2 old = __bfloat1622float2(lanes[i]);
      lanes[i] = __floats2bfloat162_rn(old.x + even, old.y + odd);
    }
    return before;
  }
};

// The 8 columns of each half that this lane writes, of one row of each row tile.
template <int kRowTiles>
struct ExpandTarget {
  BFloat16* first;
  int64_t row_tile_stride;
  int own_row, end_row, own_column, width;

  __device__ ExpandTarget(const LoraParams& p, int4 item, int m, int j)
      : own_row(item.x + threadIdx.x % 4 * 2 + threadIdx.x / 4 % 2),
        end_row(item.y),
        own_column(j * kTileColumns + threadIdx.x % 32 / 8 * 8),
        width(p.offsets[m + 1] - p.offsets[m]) {
    first = static_cast<BFloat16*>(p.activations) + own_row * p.activation_stride + p.offsets[m] +
            own_column;
    row_tile_stride = 8 * p.activation_stride;
  }

  __device__ bool is_inside(int n, int half) const {
    return own_row + 8 * n < end_row && own_column + 32 * half < width;
  }
  __device__ uint4* at(int n, int half) const {
    return reinterpret_cast<uint4*>(first + n * row_tile_stride + 32 * half);
  }

  // Row tiles from first on, kCount of them.
  template <int kCount>
  __device__ void load(uint4 (&values)[kCount][2], int first) const {
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        values[n][half] = is_inside(first + n, half) ? *at(first + n, half) : zeros();
      }
    }
  }

  template <int kCount>
  __device__ void store(const uint4 (&before)[kCount][2], const ExpandSums<kRowTiles>& sums,
                        int first) const {
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 value = sums.added_to(before[n][half], first + n, half);
        if (is_inside(first + n, half)) *at(first + n, half) = value;
      }
    }
  }
};

// Column tiles of the modules of a group, one after another.
struct ColumnTiles {
  int before[kMaxGroup + 1];  // each module

  // By `per_unit` of a module's.
  __device__ ColumnTiles(const LoraParams& p, int per_unit) {
    const int columns = per_unit * kTileColumns;
    before[0] = 0;
#pragma unroll
    for (int m = 0; m < kMaxGroup; ++m) {
      const int width = m < p.group_size ? p.offsets[m + 1] - p.offsets[m] : 0;
      before[m + 1] = before[m] + (width + columns - 1) / columns;
    }
  }
  __device__ int count() const { return before[kMaxGroup]; }

  // The module of a unit, and the module's first one.
  __device__ int2 module_of(int unit) const {
    int2 found = make_int2(0, 0);
#pragma unroll
    for (int m = 1; m < kMaxGroup; ++m) {
      if (unit >= before[m]) found = make_int2(m, before[m]);
    }
    return found;
  }
};

__device__ int num_column_tiles(const LoraParams& p, int m) {
  return (p.offsets[m + 1] - p.offsets[m] + kTileColumns - 1) / kTileColumns;
}

// A column tile of an item of up to 8 rows, by one warp, 16 ranks at a time.
template <bool kHasMore>  // ranks than 16
__device__ void expand_tile(const LoraParams& p, const Pages& pages, const Module& module,
                            int4 item, int m, int j) {
  const int num_tiles = num_column_tiles(p, m), lane = threadIdx.x % 32;
  const int row = item.x + lane / 4;
  const float* v = row < item.y ? p.v + row * p.v_token_stride + m * p.max_rank : nullptr;
  ExpandWeights weights, ahead;
  weights.load(pages, module, 0, num_tiles, j);
  if (kHasMore) ahead.load(pages, module, 16, num_tiles, j);
  // The weights, which no kernel before this one writes, are on their way.
  wait_for_previous_kernel();
  const ExpandTarget<1> target(p, item, m, j);
  uint4 before[1][2];
  target.load(before, 0);
  ExpandSums<1> sums;
  for (int first_rank = 0; first_rank < module.rank; first_rank += 16) {
    SplitPair pairs[1][2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int r = first_rank + lane % 4 * 2 + 8 * k;
      pairs[0][k] = split_floats(load_v(v, r, module.rank));
    }
    sums.add(weights, pairs);
    if (!kHasMore) break;
    weights = ahead;
    if (first_rank + 32 < module.rank) {
      ahead.load(pages, module, first_rank + 32, num_tiles, j);
    }
  }
  target.store(before, sums, 0);
}

// Items of up to 8 rows, a column tile at a time by each warp. Few units spread over all
// multiprocessors, but over the first block on each, which comes before the others.
// blocks_each: multiprocessor.
__device__ void expand_few_rows(const LoraParams& p, const Geometry& geometry, int num_items,
                                int blocks_each) {
  const ColumnTiles tiles(p, 1);
  const int num_units = num_items * tiles.count(), first_blocks = gridDim.x / blocks_each;
  const int warp = blockIdx.x / first_blocks * kWarps + threadIdx.x / 32;
  for (int unit = warp * first_blocks + blockIdx.x % first_blocks; unit < num_units;
       unit += gridDim.x * kWarps) {
    const int4 item = __ldg(reinterpret_cast<const int4*>(p.items) + unit / tiles.count());
    if (item.y - item.x > 8) continue;
    const int2 found = tiles.module_of(unit % tiles.count());
    const int m = found.x, j = unit % tiles.count() - found.y;
    const Pages pages = find_pages(p, geometry, item);
    const Module module = find_module<true>(p, pages, m);
    if (module.rank > 16) {
      expand_tile<true>(p, pages, module, item, m, j);
    } else if (module.rank > 0) {
      expand_tile<false>(p, pages, module, item, m, j);
    }
  }
}

constexpr int kStagedRanks = 64;
// Words between rows of v in shared memory: no two of a warp's rows begin in the same bank.
constexpr int kStagedStride = kStagedRanks / 2 + 4;

// Items of more rows, kWarps column tiles at a time by one block, which share v.
__device__ void expand_many_rows(const LoraParams& p, const Geometry& geometry, int num_items,
                                 SplitPair* staged) {
  constexpr int kRowTiles = kItemRows / 8;
  const ColumnTiles tiles(p, kWarps);
  const int num_units = num_items * tiles.count();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int unit = blockIdx.x; unit < num_units; unit += gridDim.x) {
    const int4 item = __ldg(reinterpret_cast<const int4*>(p.items) + unit / tiles.count());
    if (item.y - item.x <= 8) continue;
    const int2 found = tiles.module_of(unit % tiles.count());
    const int m = found.x, j = (unit % tiles.count() - found.y) * kWarps + warp;
    const Pages pages = find_pages(p, geometry, item);
    const Module module = find_module<true>(p, pages, m);
    if (module.rank == 0) continue;
    const int num_tiles = num_column_tiles(p, m);
    ExpandWeights weights;
    if (j < num_tiles) weights.load(pages, module, 0, num_tiles, j);
    wait_for_previous_kernel();
    ExpandSums<kRowTiles> sums;
    for (int chunk = 0; chunk < module.rank; chunk += kStagedRanks) {
      __syncthreads();
      for (int index = threadIdx.x; index < kItemRows * kStagedRanks / 2; index += kThreads) {
        const int row = index / (kStagedRanks / 2), pair = index % (kStagedRanks / 2);
        if (chunk + 2 * pair >= (module.rank + 15) / 16 * 16) continue;
        const float* v = item.x + row < item.y
                             ? p.v + (item.x + row) * p.v_token_stride + m * p.max_rank
                             : nullptr;
        staged[row * kStagedStride + pair] = split_floats(load_v(v, chunk + 2 * pair, module.rank));
      }
      __syncthreads();
      if (j >= num_tiles) continue;
      const int end = min(chunk + kStagedRanks, module.rank);
      for (int first_rank = chunk; first_rank < end; first_rank += 16) {
        if (first_rank > 0) weights.load(pages, module, first_rank, num_tiles, j);
        SplitPair pairs[kRowTiles][2];
#pragma unroll
        for (int n = 0; n < kRowTiles; ++n) {
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            const int pair = (first_rank - chunk) / 2 + lane % 4 + 4 * k;
            pairs[n][k] = staged[(8 * n + lane / 4) * kStagedStride + pair];
          }
        }
        sums.add(weights, pairs);
      }
    }
    if (j >= num_tiles) continue;
    const ExpandTarget<kRowTiles> target(p, item, m, j);
    // By two, which is what there are registers for.
#pragma unroll
    for (int first = 0; first < kRowTiles; first += 2) {
      uint4 before[2][2];
      target.load(before, first);
      target.store(before, sums, first);
    }
  }
}

__global__ void __launch_bounds__(kThreads, 2)
    expand_kernel(const __grid_constant__ LoraParams p, const __grid_constant__ Geometry geometry) {
  __shared__ SplitPair staged[kItemRows * kStagedStride];
  allow_next_kernel();
  const int num_items = *p.num_items;
  expand_few_rows(p, geometry, num_items, 2);
  expand_many_rows(p, geometry, num_items, staged);
  // Not all have had to, and this kernel must not seem done before what it waits for is.
  if (blockIdx.x == 0) wait_for_previous_kernel();
}

constexpr int kFewRowsBlocks = 4;  // each multiprocessor

// Where all items have up to 8 rows: with so few registers that blocks find room beside the base
// product, and have their weights when it ends; and that blocks of the next linear find room beside
// these, and begin to read theirs.
__global__ void __launch_bounds__(kThreads, kFewRowsBlocks)
    expand_few_kernel(const __grid_constant__ LoraParams p,
                      const __grid_constant__ Geometry geometry) {
  allow_next_kernel();
  expand_few_rows(p, geometry, *p.num_items, kFewRowsBlocks);
  if (blockIdx.x == 0) wait_for_previous_kernel();
}

}  // namespace

const char* lora_expand(const LoraParams& p, void* stream) {
  if (p.dtype == DType::kFloat32) return lora_expand_float32(p, stream);
  const bool is_fine = p.num_tokens <= kMaxFineRows;
  launch(is_fine ? expand_few_kernel : expand_kernel,
         dim3(num_blocks() / 2 * (is_fine ? kFewRowsBlocks : 2)), kThreads, stream, p,
         make_geometry(p));
  return last_error();
}

}  // namespace loraplex::cuda
