// What multiprocessors that share a row of decode_attention.cu leave for each other, and the row
// that becomes of it.
#pragma once

#include "device.cuh"
#include "kernels.h"

namespace loraplex::cuda {
namespace {

constexpr int kHeadDim = kAttentionHeadDim;

struct Row {
  int begin, end, num_tokens, shares;
  __device__ int first_share() const { return shares >> 16; }
  __device__ int num_shares() const { return shares & 0xFFFF; }
};

// Of a key head's queries, over some of a row's pages. kGroup: at least p.group.
template <int kGroup>
struct Attended {
  float o[kGroup][4] = {};         // 4 of this lane's columns
  float max = -INFINITY, sum = 0;  // of query lane / 4, in powers of 2; of the sum what is of this
                                   // lane's tokens
};

__device__ void write_columns(BFloat16* out, const float (&o)[4], float factor) {
  Vec<BFloat16, 4> y;
#pragma unroll
  for (int d = 0; d < 4; ++d) y.lanes[d] = from_float<BFloat16>(o[d] * factor);
  store(out, y);
}

// Places of a block, for one key head: one for a row that began before its share, one for a row
// that goes on behind it.
struct Parts {
  float *sums, *weights;

  __device__ Parts(const DecodeAttentionParams& p, int block, bool goes_on, int head) {
    const int num_heads = p.num_kv_heads * p.group, query = goes_on * num_heads + head * p.group;
    float* first = p.partials + int64_t{block} * 2 * num_heads * kAttentionPartSums;
    sums = first + query * kHeadDim;
    weights = first + 2 * num_heads * kHeadDim + query * 2;
  }
};

template <int kGroup>
__device__ void leave(const DecodeAttentionParams& p, const Attended<kGroup>& a,
                      const Parts& parts) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    if (i < p.group) {
      __stcg(reinterpret_cast<float4*>(parts.sums + i * kHeadDim) + lane,
             make_float4(a.o[i][0], a.o[i][1], a.o[i][2], a.o[i][3]));
    }
  }
  if (lane % 4 == 0 && lane / 4 < p.group) {
    __stcg(reinterpret_cast<float2*>(parts.weights) + lane / 4, make_float2(a.max, a.sum));
  }
  __threadfence();
  __syncwarp();
}

// A row of which all shares have left their part; out: of this lane's columns.
template <int kGroup>
__device__ void join(const DecodeAttentionParams& p, const Row& row, int head, BFloat16* out) {
  const int lane = threadIdx.x % 32, count = row.num_shares();
  const auto part = [&](int n) { return Parts(p, row.first_share() + n, n == 0, head); };
  float max[kGroup], sum[kGroup], o[kGroup][4];
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    max[i] = -INFINITY, sum[i] = 0;
#pragma unroll
    for (int d = 0; d < 4; ++d) o[i][d] = 0;
  }
  for (int first = 0; first < count; first += 32) {
    // A lane has the weights of one part.
    float factor[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      float2 own = make_float2(-INFINITY, 0);
      if (i < p.group && first + lane < count) {
        own = __ldcg(reinterpret_cast<const float2*>(part(first + lane).weights) + i);
      }
      float most = own.x;
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) {
        most = fmaxf(most, __shfl_xor_sync(~0u, most, offset));
      }
      most = fmaxf(max[i], most);
      const float before = i < p.group ? exp2f(max[i] - most) : 0;
      factor[i] = i < p.group ? exp2f(own.x - most) : 0;
      float all = factor[i] * own.y;
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) all += __shfl_xor_sync(~0u, all, offset);
      max[i] = most, sum[i] = sum[i] * before + all;
#pragma unroll
      for (int d = 0; d < 4; ++d) o[i][d] *= before;
    }
    const int num = min(32, count - first);
#pragma unroll(16 / kGroup)
    for (int n = 0; n < num; ++n) {
      const float* sums = part(first + n).sums;
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const float4 x = i < p.group
                             ? __ldcg(reinterpret_cast<const float4*>(sums + i * kHeadDim) + lane)
                             : make_float4(0, 0, 0, 0);
        const float f = __shfl_sync(~0u, factor[i], n);
        o[i][0] += f * x.x, o[i][1] += f * x.y, o[i][2] += f * x.z, o[i][3] += f * x.w;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    if (i < p.group) write_columns(out + i * kHeadDim, o[i], 1 / sum[i]);
  }
}

// Whether this warp is the last of a row's shares to come here.
__device__ bool is_last(int32_t* counter, int num_shares) {
  int num_before = 0;
  if (threadIdx.x % 32 == 0) {
    num_before = atomicAdd(counter, 1);
    if (num_before + 1 == num_shares) *counter = 0;
  }
  num_before = __shfl_sync(~0u, num_before, 0);
  __threadfence();
  return num_before + 1 == num_shares;
}

}  // namespace
}  // namespace loraplex::cuda
