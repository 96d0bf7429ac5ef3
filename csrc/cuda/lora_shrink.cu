// v = A x for each row's adapter, in bfloat16 on tensor cores; see lora_tiles.cuh.
#include <algorithm>

#include "lora_tiles.cuh"

namespace loraplex::cuda {
namespace {

// Few items: their sums over the input are cut up, so that more blocks take part. Beside the
// streamed base product reads take so long that a column tile for every warp is enough; without,
// handing sums over takes longer than to read several.
__device__ int num_splits(int num_tokens, int num_pairs, int num_tiles) {
  const int tiles_each = num_tokens <= kMaxLinearTokens ? 1 : 5;
  int splits = 1;
  while (2 * splits * num_pairs <= static_cast<int>(gridDim.x) &&
         2 * splits * kWarps * tiles_each <= num_tiles) {
    splits *= 2;
  }
  return splits;
}

// One item, one module, one part of the columns.
struct ShrinkUnit {
  Pages pages;
  Module module;
  int first_row, num_rows;
  int begin, end, num_tiles;  // column tiles, of which there are num_tiles
  float* sums;                // where they go, of the first row
  int64_t row_stride;
};

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

// Adds up the warps' sums and writes them where the unit's go.
template <int kRowTiles, int kPairs>
__device__ void write_sums(const ShrinkSums<kRowTiles, kPairs>& sums, float* shared,
                           const ShrinkUnit& unit, int first_rank) {
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
      const int row = index / 16, r = first_rank + 16 * pair + index % 16;
      if (row >= unit.num_rows || r >= unit.module.rank) continue;
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += shared[w * 16 * kRows + index];
      unit.sums[row * unit.row_stride + r] = sum;
    }
    __syncthreads();
  }
}

template <int kRowTiles, int kPairs, int kUnroll>
__device__ void shrink_unit(float* shared, const LoraParams& p, const ShrinkUnit& unit) {
  const BFloat16* rows[kRowTiles];
#pragma unroll
  for (int n = 0; n < kRowTiles; ++n) {
    const int64_t row = 8 * n + threadIdx.x % 32 / 4;
    rows[n] = row < unit.num_rows ? static_cast<const BFloat16*>(p.activations) +
                                        (unit.first_row + row) * p.activation_stride
                                  : nullptr;
  }
  for (int first_rank = 0; first_rank < unit.module.rank; first_rank += 16 * kPairs) {
    const int rank_tiles = (unit.module.rank - first_rank + kTileRanks - 1) / kTileRanks;
    ShrinkSums<kRowTiles, kPairs> sums = {};
    shrink_tiles<kRowTiles, kPairs, kUnroll>(
        sums, p, unit.pages, unit.module.first_tile + first_rank / kTileRanks * unit.num_tiles,
        rank_tiles, unit.num_tiles, unit.begin, unit.end, rows);
    write_sums<kRowTiles, kPairs>(sums, shared, unit, first_rank);
  }
}

// Whether this block is the last of `splits` to come here with this counter, which is zero again
// then.
__device__ bool is_last(int32_t* counter, int splits) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(counter, 1) == splits - 1;
    if (last) *counter = 0;
  }
  __syncthreads();
  __threadfence();
  return last;
}

// v = the sums of all splits, in their order; partials: of the first.
__device__ void add_up_splits(const LoraParams& p, const float* partials, int splits, float* v,
                              int num_rows, int rank) {
  const int vectors = (rank + 3) / 4;
  for (int index = threadIdx.x; index < num_rows * vectors; index += kThreads) {
    const int row = index / vectors, r = index % vectors * 4;
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 8
    for (int split = 0; split < splits; ++split) {
      const float4 part = __ldcg(
          reinterpret_cast<const float4*>(partials + split * kPartialSums + row * kMaxRank + r));
      sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
    *reinterpret_cast<float4*>(v + row * p.v_token_stride + r) = sum;
  }
}

// Its input is complete when it begins: the base product, which has the same, lets it begin only
// then (or at its own end), so that both run at once. Its blocks end when their work does, which
// makes room for expand's; but one waits, for those who come after.
__global__ void __launch_bounds__(kThreads, 2)
    shrink_kernel(const __grid_constant__ LoraParams p, const __grid_constant__ Geometry geometry) {
  __shared__ float shared[kWarps * 16 * kItemRows];
  allow_next_kernel();
  const int num_pairs = *p.num_items * p.group_size;  // of an item and a module
  const int num_tiles = (p.num_columns + kTileColumns - 1) / kTileColumns;
  const int splits = num_splits(p.num_tokens, num_pairs, num_tiles);
  for (int index = blockIdx.x; index < num_pairs * splits; index += gridDim.x) {
    const int pair = index / splits, split = index % splits, m = pair % p.group_size;
    const int4 item = __ldg(reinterpret_cast<const int4*>(p.items) + pair / p.group_size);
    const Pages pages = find_pages(p, geometry, item);
    float* v = p.v + item.x * p.v_token_stride + m * p.max_rank;
    // Where there is one split, straight to v.
    float* partials = p.partials + (index - split) * kPartialSums;
    const ShrinkUnit unit{pages,
                          find_module<false>(p, pages, m),
                          item.x,
                          item.y - item.x,
                          num_tiles * split / splits,
                          num_tiles * (split + 1) / splits,
                          num_tiles,
                          splits == 1 ? v : partials + split * kPartialSums,
                          splits == 1 ? p.v_token_stride : kMaxRank};
    if (unit.num_rows > 8) {
      shrink_unit<kItemRows / 8, 2, 1>(shared, p, unit);
    } else if (unit.module.rank <= 16) {
      shrink_unit<1, 1, 4>(shared, p, unit);
    } else {
      shrink_unit<1, 4, 1>(shared, p, unit);
    }
    if (splits > 1 && is_last(p.counters + pair, splits)) {
      add_up_splits(p, partials, splits, v, unit.num_rows, unit.module.rank);
    }
  }
  if (blockIdx.x == 0) wait_for_previous_kernel();
}

}  // namespace

const char* lora_shrink(const LoraParams& p, void* stream) {
  if (p.dtype == DType::kFloat32) return lora_shrink_float32(p, stream);
  // Beside the streamed base product there is room for one block a multiprocessor.
  const int blocks = p.num_tokens <= kMaxLinearTokens ? num_blocks() / 2 : num_blocks();
  launch(shrink_kernel, dim3(std::min(blocks, p.num_partials)), kThreads, stream, p,
         make_geometry(p));
  return last_error();
}

}  // namespace loraplex::cuda
