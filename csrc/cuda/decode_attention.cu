// Attention of single query rows over pages of keys and values, for Hopper GPUs: reads the pages
// once, as fast as memory gives them.
//
// All pages of all rows, one after another, are cut into equal shares, one for each multiprocessor,
// which may begin and end inside of a row. A warp copies pages to shared memory, all heads of a
// page at once (they are contiguous), stages ahead of the others, of which each has one key head:
// q k^T on tensor cores, the weighted sum of values in float32. What pages hold does not depend on
// the kernel before, so that the first are on their way while that one still runs: a row's own key
// and value are put into its last page here.
//
// What shares have of a row is put together by the warp that comes last, in the order of shares:
// the result is the same every time.
#include "bulk_copy.cuh"
#include "decode_parts.cuh"
#include "kernels.h"

namespace loraplex::cuda {
namespace {

constexpr int kPageTokens = kAttentionPageTokens;
constexpr int kTokenBytes = kHeadDim * sizeof(BFloat16);  // of a head
constexpr int kMaxStages = 16, kStagedBytes = 192 * 1024;

__device__ void copy_bulk(uint32_t target, const void* source, int bytes, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(target),
      "l"(source), "r"(bytes), "r"(shared_address(barrier)), "l"(kReadOnce)
      : "memory");
}

__device__ uint4 load_shared(uint32_t address) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address));
  return x;
}

// d += a b, 16 x 8 x 16; rows 8 to 15 of a are zeros.
__device__ void multiply(float (&d)[4], uint32_t a0, uint32_t a2, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %5}, "
      "{%7, %8}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(0), "r"(a2), "r"(b0), "r"(b1));
}

__device__ float low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ float high(uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000); }

struct Share {
  int begin, end, first_row, unused;
};
template <class T>
__device__ T load_record(const int32_t* records, int index) {
  const int4 r = __ldg(reinterpret_cast<const int4*>(records) + index);
  return {r.x, r.y, r.z, r.w};
}

// ---- copying ----

// By one warp: keys of a page to a stage, its values to the next.
__device__ void copy_pages(const DecodeAttentionParams& p, const Share& share, uint32_t stages,
                           int stage_bytes, Ring ring) {
  const int lane = threadIdx.x % 32;
  int numbers = 0;  // of 32 pages
  for (int i = share.begin; i < share.end; ++i) {
    const int index = (i - share.begin) % 32;
    if (index == 0) numbers = i + lane < share.end ? __ldg(p.pages + i + lane) : 0;
    const int64_t page = __shfl_sync(~0u, numbers, index);
    for (const void* cache : {p.k_cache, p.v_cache}) {
      ring.wait_until_empty();
      if (lane == 0) {
        expect_bytes(ring.full + ring.stage, stage_bytes);
        copy_bulk(stages + ring.stage * stage_bytes,
                  static_cast<const BFloat16*>(cache) + page * p.page_stride, stage_bytes,
                  ring.full + ring.stage);
      }
      ring.advance();
    }
  }
}

// ---- attending ----

template <int kGroup>
struct Weights {  // of a warp's page
  float of[kPageTokens][kGroup];
  float factor[kGroup];  // for what was summed before
};

// Scores of a page's tokens, 8 half + 2 t and the next, of query g. Lanes take 16-byte pieces of q
// and k: a permutation of head_dim, the same for both.
__device__ void score(float (&scores)[2][4], const uint4 (&query)[4], uint32_t keys,
                      int token_bytes) {
  const int g = threadIdx.x % 32 / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint4 key[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) key[j] = load_shared(keys + (8 * half + g) * token_bytes + 64 * j);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      multiply(scores[half], query[j].x, query[j].y, key[j].x, key[j].y);
      multiply(scores[half], query[j].z, query[j].w, key[j].z, key[j].w);
    }
  }
}

// Scores to weights for all lanes, and what was summed before to the new greatest score.
template <int kGroup>
__device__ void weigh(Attended<kGroup>& a, Weights<kGroup>& weights, const float (&scores)[2][4],
                      float scale, int num_tokens) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  float x[4], most = -INFINITY;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int token = 8 * (i / 2) + 2 * t + i % 2;
    x[i] = token < num_tokens ? scores[i / 2][i % 2] * scale : -INFINITY;
    most = fmaxf(most, x[i]);
  }
  most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
  most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
  const float new_max = fmaxf(a.max, most), factor = exp2f(a.max - new_max);
  a.max = new_max, a.sum *= factor;
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = exp2f(x[i] - new_max), a.sum += x[i];
  __syncwarp();  // All have read the weights of the page before.
  if (g < kGroup) {
#pragma unroll
    for (int i = 0; i < 4; ++i) weights.of[8 * (i / 2) + 2 * t + i % 2][g] = x[i];
    if (t == 0) weights.factor[g] = factor;
  }
  const bool is_same = __all_sync(~0u, g >= kGroup || factor == 1);
  __syncwarp();
  if (is_same) return;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    const float f = weights.factor[i];
#pragma unroll
    for (int d = 0; d < 4; ++d) a.o[i][d] *= f;
  }
}

template <int kGroup>
__device__ void add_values(Attended<kGroup>& a, const Weights<kGroup>& weights, uint32_t values,
                           int token_bytes, int num_tokens) {
  const auto add = [&](int token) {
    uint2 v;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
                 : "=r"(v.x), "=r"(v.y)
                 : "r"(values + token * token_bytes));
    const float column[4] = {low(v.x), high(v.x), low(v.y), high(v.y)};
#pragma unroll
    for (int i = 0; i < kGroup; i += 4) {
      const float4 w = *reinterpret_cast<const float4*>(&weights.of[token][i]);
      const float weight[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int d = 0; d < 4; ++d) a.o[i + j][d] += weight[j] * column[d];
    }
  };
  if (num_tokens == kPageTokens) {
#pragma unroll
    for (int token = 0; token < kPageTokens; ++token) add(token);
  } else {
    // What lies behind the last token may be anything, even no number.
    for (int token = 0; token < num_tokens; ++token) add(token);
  }
}

// The step's own key and value of a row and a key head: 16 bytes of either by each lane, the key's
// by the first 16 lanes.
struct NewToken {
  uint4 part;
  int offset;  // elements, in a page

  __device__ NewToken(const DecodeAttentionParams& p, int index, const Row& row, int head) {
    const int lane = threadIdx.x % 32, column = lane % 16 * 8, token = row.num_tokens - 1;
    const BFloat16* first = lane < 16 ? static_cast<const BFloat16*>(p.k) + index * p.k_stride
                                      : static_cast<const BFloat16*>(p.v) + index * p.v_stride;
    part = *reinterpret_cast<const uint4*>(first + head * kHeadDim + column);
    offset = (token % kPageTokens * p.num_kv_heads + head) * kHeadDim + column;
  }

  __device__ void write_to_cache(const DecodeAttentionParams& p, int page) const {
    void* cache = threadIdx.x % 32 < 16 ? p.k_cache : p.v_cache;
    *reinterpret_cast<uint4*>(static_cast<BFloat16*>(cache) + page * p.page_stride + offset) = part;
  }

  __device__ void write_to_stage(uint32_t stage, bool is_value) const {
    if (threadIdx.x % 32 / 16 == is_value) {
      asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(
                       stage + offset * static_cast<uint32_t>(sizeof(BFloat16))),
                   "r"(part.x), "r"(part.y), "r"(part.z), "r"(part.w)
                   : "memory");
      // The next copy to this stage comes after it.
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncwarp();
  }
};

// ---- the kernel ----

template <int kGroup>
__device__ void attend(const DecodeAttentionParams& p, const Share& share, uint32_t stages,
                       int stage_bytes, Ring ring, Weights<kGroup>& weights, int head) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int token_bytes = p.num_kv_heads * kTokenBytes, first_query = head * p.group;
  const float scale = p.scale * 1.4426950408889634f;  // for powers of 2
  int page = share.begin;
  for (int index = share.first_row; page < share.end; ++index) {
    const Row row = load_record<Row>(p.rows, index);
    uint4 query[4];
    const BFloat16* q = static_cast<const BFloat16*>(p.q) + index * p.q_stride +
                        (first_query + g) * kHeadDim + 8 * t;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      query[j] = g < p.group ? *reinterpret_cast<const uint4*>(q + 32 * j) : make_uint4(0, 0, 0, 0);
    }
    const NewToken own(p, index, row, head);
    const int last_page = row.end <= share.end ? row.end - 1 : -1;  // if it is this share's
    if (last_page >= 0) own.write_to_cache(p, __ldg(p.pages + last_page));
    Attended<kGroup> a;
    for (const int end = min(share.end, row.end); page < end; ++page) {
      const int num_tokens = min(kPageTokens, row.num_tokens - kPageTokens * (page - row.begin));
      const auto wait_for_stage = [&](bool is_value) {
        const uint32_t stage = stages + ring.stage * stage_bytes;
        ring.wait_until_full();
        if (page == last_page) own.write_to_stage(stage, is_value);
        return stage + head * kTokenBytes;
      };
      const auto give_back = [&] {
        __syncwarp();
        if (lane == 0) arrive(ring.empty + ring.stage);
        ring.advance();
      };
      float scores[2][4] = {};
      score(scores, query, wait_for_stage(false) + 16 * t, token_bytes);
      give_back();
      weigh(a, weights, scores, scale, num_tokens);
      add_values(a, weights, wait_for_stage(true) + 8 * lane, token_bytes, num_tokens);
      give_back();
    }
    a.sum += __shfl_xor_sync(~0u, a.sum, 1);
    a.sum += __shfl_xor_sync(~0u, a.sum, 2);
    BFloat16* out = static_cast<BFloat16*>(p.out) +
                    (int64_t{index} * p.num_kv_heads * p.group + first_query) * kHeadDim + 4 * lane;
    if (row.num_shares() == 1) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const float sum = __shfl_sync(~0u, a.sum, 4 * i);
        if (i < p.group) write_columns(out + i * kHeadDim, a.o[i], 1 / sum);
      }
      continue;
    }
    leave(p, a, Parts(p, blockIdx.x, row.begin >= share.begin, head));
    int32_t* counter = p.counters + row.first_share() * p.num_kv_heads + head;
    if (is_last(counter, row.num_shares())) join<kGroup>(p, row, head, out);
  }
}

template <int kGroup>
__global__ void __launch_bounds__(32 * (kMaxAttentionKvHeads + 1))
    decode_attention_kernel(const __grid_constant__ DecodeAttentionParams p, int num_stages) {
  extern __shared__ __align__(128) uint8_t stages[];
  __shared__ uint64_t full[kMaxStages], empty[kMaxStages];
  __shared__ __align__(16) Weights<kGroup> weights[kMaxAttentionKvHeads];
  const int warp = threadIdx.x / 32, stage_bytes = kPageTokens * p.num_kv_heads * kTokenBytes;
  const Share share = load_record<Share>(p.shares, blockIdx.x);
  if (threadIdx.x == 0) {
    for (int s = 0; s < num_stages; ++s) {
      init_barrier(full + s, 1);
      init_barrier(empty + s, p.num_kv_heads);
    }
    publish_barriers();
  }
  __syncthreads();
  const Ring ring{full, empty, num_stages};
  if (warp == p.num_kv_heads) {
    copy_pages(p, share, shared_address(stages), stage_bytes, ring);
  } else {
    wait_for_previous_kernel();
    allow_next_kernel();
    attend<kGroup>(p, share, shared_address(stages), stage_bytes, ring, weights[warp], warp);
  }
}

template <int kGroup>
const char* launch_decode_attention(const DecodeAttentionParams& p, void* stream) {
  static const cudaError_t is_allowed = cudaFuncSetAttribute(
      decode_attention_kernel<kGroup>, cudaFuncAttributeMaxDynamicSharedMemorySize, kStagedBytes);
  if (is_allowed != cudaSuccess) return cudaGetErrorString(is_allowed);
  const int stage_bytes = kPageTokens * p.num_kv_heads * kTokenBytes;
  const int num_stages =
      kStagedBytes / stage_bytes < kMaxStages ? kStagedBytes / stage_bytes : kMaxStages;
  launch_with_shared(decode_attention_kernel<kGroup>, dim3(p.num_blocks), 32 * (p.num_kv_heads + 1),
                     num_stages * stage_bytes, stream, p, num_stages);
  return last_error();
}

}  // namespace

const char* decode_attention(const DecodeAttentionParams& p, void* stream) {
  return p.group <= 4 ? launch_decode_attention<4>(p, stream)
                      : launch_decode_attention<8>(p, stream);
}

}  // namespace loraplex::cuda
