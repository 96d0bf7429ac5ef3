// LoRA in float32: no tensor cores, for exactness.
#include "lora_tiles.cuh"

namespace loraplex::cuda {
namespace {

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
        p.v[row * p.v_token_stride + m * p.max_rank + r] = sum;
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
      const float* v = p.v + row * p.v_token_stride + m * p.max_rank;
      float sum = 0;
      for (int r = 0; r < module.rank; ++r) sum += module.at(r, column) * v[r];
      static_cast<float*>(p.activations)[row * p.activation_stride + p.offsets[m] + column] += sum;
    }
  }
}

}  // namespace

const char* lora_shrink_float32(const LoraParams& p, void* stream) {
  shrink_float32_kernel<<<dim3(num_blocks(), p.group_size), kThreads, 0,
                          static_cast<cudaStream_t>(stream)>>>(p);
  return last_error();
}

const char* lora_expand_float32(const LoraParams& p, void* stream) {
  expand_float32_kernel<<<dim3(num_blocks(), p.group_size), kThreads, 0,
                          static_cast<cudaStream_t>(stream)>>>(p);
  return last_error();
}

}  // namespace loraplex::cuda
