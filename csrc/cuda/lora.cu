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
  int num_multiprocessors;
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
__device__ int num_splits(int num_items, int group_size, int num_multiprocessors) {
  int splits = kMaxSplits;
  while (splits > 1 && num_items * group_size * splits > num_multiprocessors) splits /= 2;
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

// Sums of a warp: kPairs x 16 ranks by kRowTiles x 8 rows.
template <int kRowTiles, int kPairs>
struct ShrinkSums {
  float of[kPairs][kRowTiles][4];
};

// Of one unit, over this warp's column tiles.
template <int kRowTiles, int kPairs, int kUnroll>
__device__ void shrink_tiles(ShrinkSums<kRowTiles, kPairs>& sums, const LoraParams& p,
                             const Pages& pages, uint32_t first_tile, int rank_tiles, int num_tiles,
                             int begin, int end, const BFloat16* const (&rows)[kRowTiles]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int weight_offset = lane / 4 * kTileColumns + lane % 4 * 8, column_offset = lane % 4 * 8;
  for (int first = begin + warp; first < end; first += kWarps * kUnroll) {
    uint4 weights[kUnroll][2 * kPairs][2];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int j = first + u * kWarps;
#pragma unroll
      for (int r = 0; r < 2 * kPairs; ++r) {
        const bool is_there = j < end && r < rank_tiles;
        const BFloat16* tile =
            is_there ? pages.tile(first_tile + r * num_tiles + j) + weight_offset : nullptr;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          weights[u][r][half] = is_there ? load_weights(tile + 32 * half) : zeros();
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int j = first + u * kWarps;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = j * kTileColumns + 32 * half + column_offset;
        const bool is_inside = j < end && column < p.num_columns;
#pragma unroll
        for (int n = 0; n < kRowTiles; ++n) {
          uint4 x = zeros();
          if (is_inside && rows[n] != nullptr) {
            x = __ldg(reinterpret_cast<const uint4*>(rows[n] + column));
          }
#pragma unroll
          for (int pair = 0; pair < kPairs; ++pair) {
            const uint4 w0 = weights[u][2 * pair][half], w1 = weights[u][2 * pair + 1][half];
            mma(sums.of[pair][n], w0.x, w1.x, w0.y, w1.y, x.x, x.y);
            mma(sums.of[pair][n], w0.z, w1.z, w0.w, w1.w, x.z, x.w);
          }
        }
      }
    }
  }
}

// Adds up the warps' sums and writes them to v: a row's `ranks` entries at a time.
template <int kRowTiles, int kPairs>
__device__ void write_sums(const ShrinkSums<kRowTiles, kPairs>& sums, float* shared,
                           const LoraParams& p, int4 item, float* v, int ranks) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  constexpr int kRows = 8 * kRowTiles;
  float* own = shared + warp * 16 * kRows;
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) {
#pragma unroll
    for (int n = 0; n < kRowTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = 8 * n + lane % 4 * 2 + i % 2;
        own[row * 16 + lane / 4 + i / 2 * 8] = sums.of[pair][n][i];
      }
    }
    __syncthreads();
    for (int index = threadIdx.x; index < 16 * kRows; index += kThreads) {
      const int row = item.x + index / 16, r = 16 * pair + index % 16;
      if (row >= item.y || r >= ranks) continue;
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += shared[w * 16 * kRows + index];
      v[row * p.v_token_stride + r] = sum;
    }
    __syncthreads();
  }
}

// One item, one module, one part of the columns.
struct ShrinkUnit {
  Pages pages;
  Module module;
  int4 item;
  int begin, end, num_tiles;  // column tiles, of which there are num_tiles
  float* v;                   // of row 0
};

template <int kRowTiles, int kPairs, int kUnroll>
__device__ void shrink_unit(float* shared, const LoraParams& p, const ShrinkUnit& unit) {
  const BFloat16* rows[kRowTiles];
#pragma unroll
  for (int n = 0; n < kRowTiles; ++n) {
    const int64_t row = unit.item.x + 8 * n + threadIdx.x % 32 / 4;
    rows[n] = row < unit.item.y
                  ? static_cast<const BFloat16*>(p.activations) + row * p.activation_stride
                  : nullptr;
  }
  for (int first_rank = 0; first_rank < unit.module.rank; first_rank += 16 * kPairs) {
    const int ranks = unit.module.rank - first_rank;
    ShrinkSums<kRowTiles, kPairs> sums = {};
    shrink_tiles<kRowTiles, kPairs, kUnroll>(
        sums, p, unit.pages, unit.module.first_tile + first_rank / kTileRanks * unit.num_tiles,
        (ranks + kTileRanks - 1) / kTileRanks, unit.num_tiles, unit.begin, unit.end, rows);
    write_sums<kRowTiles, kPairs>(sums, shared, p, unit.item, unit.v + first_rank, ranks);
  }
}

// Its input is complete when it begins: the base product, which has the same, lets it begin only
// then (or at its own end), so that both run at once. Only the end waits, for those who come after.
__global__ void __launch_bounds__(kThreads, 2)
    shrink_kernel(const __grid_constant__ LoraParams p, const __grid_constant__ Geometry geometry) {
  __shared__ float shared[kWarps * 16 * kItemRows];
  allow_next_kernel();
  const int num_items = *p.num_items;
  const int splits = num_splits(num_items, p.group_size, geometry.num_multiprocessors);
  const int num_units = num_items * p.group_size * splits;
  const int num_tiles = (p.num_columns + kTileColumns - 1) / kTileColumns;
  for (int index = blockIdx.x; index < num_units; index += gridDim.x) {
    const int split = index % splits, m = index / splits % p.group_size;
    const int4 item = __ldg(reinterpret_cast<const int4*>(p.items) + index / splits / p.group_size);
    const Pages pages = find_pages(p, geometry, item);
    const ShrinkUnit unit{pages,
                          find_module<false>(p, pages, m),
                          item,
                          num_tiles * split / splits,
                          num_tiles * (split + 1) / splits,
                          num_tiles,
                          p.v + (m * kMaxSplits + split) * p.max_rank};
    if (item.y - item.x > 8) {
      shrink_unit<kItemRows / 8, 2, 1>(shared, p, unit);
    } else if (unit.module.rank <= 16) {
      shrink_unit<1, 1, 4>(shared, p, unit);
    } else {
      shrink_unit<1, 2, 2>(shared, p, unit);
    }
  }
  wait_for_previous_kernel();
}

// ---- expand ----

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

// Entries r and r + 1 of a row of v, added up over the splits; zeros past the rank.
__device__ float2 load_v(const float* v, int r, int rank, int max_rank, int splits) {
  float2 sum = make_float2(0, 0);
  if (v == nullptr || r >= rank) return sum;
#pragma unroll
  for (int split = 0; split < kMaxSplits; ++split) {
    if (split >= splits) break;
    const float2 part = *reinterpret_cast<const float2*>(v + split * max_rank + r);
    sum.x += part.x, sum.y += part.y;
  }
  if (r + 1 >= rank) sum.y = 0;
  return sum;
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

// Items of up to 8 rows, a column tile at a time by one warp.
__device__ void expand_few_rows(const LoraParams& p, const Geometry& geometry, int num_items,
                                int splits) {
  const ColumnTiles tiles(p, 1);
  const int num_units = num_items * tiles.count(), lane = threadIdx.x % 32;
  // Blocks first, so that few units spread over all multiprocessors.
  for (int unit = threadIdx.x / 32 * gridDim.x + blockIdx.x; unit < num_units;
       unit += gridDim.x * kWarps) {
    const int4 item = __ldg(reinterpret_cast<const int4*>(p.items) + unit / tiles.count());
    if (item.y - item.x > 8) continue;
    const int2 found = tiles.module_of(unit % tiles.count());
    const int m = found.x, j = unit % tiles.count() - found.y;
    const Pages pages = find_pages(p, geometry, item);
    const Module module = find_module<true>(p, pages, m);
    if (module.rank == 0) continue;
    const int num_tiles = num_column_tiles(p, m), row = item.x + lane / 4;
    const float* v =
        row < item.y ? p.v + row * p.v_token_stride + m * kMaxSplits * p.max_rank : nullptr;
    ExpandWeights weights;
    weights.load(pages, module, 0, num_tiles, j);
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
        pairs[0][k] = split_floats(load_v(v, r, module.rank, p.max_rank, splits));
      }
      const ExpandWeights own = weights;
      if (first_rank + 16 < module.rank) weights.load(pages, module, first_rank + 16, num_tiles, j);
      sums.add(own, pairs);
    }
    target.store(before, sums, 0);
  }
}

constexpr int kStagedRanks = 64;
// Words between rows of v in shared memory: no two of a warp's rows begin in the same bank.
constexpr int kStagedStride = kStagedRanks / 2 + 4;

// Items of more rows, kWarps column tiles at a time by one block, which share v.
__device__ void expand_many_rows(const LoraParams& p, const Geometry& geometry, int num_items,
                                 int splits, SplitPair* staged) {
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
                             ? p.v + (item.x + row) * p.v_token_stride + m * kMaxSplits * p.max_rank
                             : nullptr;
        staged[row * kStagedStride + pair] =
            split_floats(load_v(v, chunk + 2 * pair, module.rank, p.max_rank, splits));
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
  const int splits = num_splits(num_items, p.group_size, geometry.num_multiprocessors);
  expand_few_rows(p, geometry, num_items, splits);
  expand_many_rows(p, geometry, num_items, splits, staged);
  // A block without work must not seem done before what it would have waited for is.
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
  return {page_elements, reciprocal, tiles_per_page, num_multiprocessors};
}

}  // namespace

const char* lora_shrink(const LoraParams& p, void* stream) {
  const Geometry geometry = make_geometry(p);
  if (p.dtype == DType::kFloat32) {
    shrink_float32_kernel<<<dim3(geometry.num_multiprocessors, p.group_size), kThreads, 0,
                            static_cast<cudaStream_t>(stream)>>>(p);
  } else {
    // One block each: that is what there is room for beside the base product.
    launch(shrink_kernel, dim3(geometry.num_multiprocessors), kThreads, stream, p, geometry);
  }
  return last_error();
}

const char* lora_expand(const LoraParams& p, void* stream) {
  const Geometry geometry = make_geometry(p);
  if (p.dtype == DType::kFloat32) {
    expand_float32_kernel<<<dim3(geometry.num_multiprocessors, p.group_size), kThreads, 0,
                            static_cast<cudaStream_t>(stream)>>>(p);
  } else {
    launch(expand_kernel, dim3(2 * geometry.num_multiprocessors), kThreads, stream, p, geometry);
  }
  return last_error();
}

}  // namespace loraplex::cuda
