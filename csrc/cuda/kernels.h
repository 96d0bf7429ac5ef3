// Entry points of the CUDA kernels. Those that have a CPU twin take the same parameters. Each
// enqueues on a stream (a cudaStream_t) and returns an error message, null if all is well.
#pragma once

#include "../cpu/kernels.h"

namespace loraplex::cuda {

// Rows with one adapter, at most kItemRows of them; one int4 on the device. Its pages are
// pages[first_page], pages[first_page + 1], ...
constexpr int kItemRows = 32;
// With up to so many rows in all, items have at most 8 rows.
constexpr int kMaxFineRows = 512;
constexpr int kMaxGroup = 4;
constexpr int kMaxRank = 256;
// Of a block of shrink, where several share an item and a module.
constexpr int kPartialSums = kItemRows * kMaxRank;

// Shrink and expand for all items of a step. Items, their number and pages are on the device, so
// that a graph with this call serves any batch.
struct LoraParams {
  DType dtype;
  const uint8_t* pool;
  int64_t page_bytes;
  const int32_t* items;  // [max_items, 4]: row_begin, row_end, first_page, pages[first_page]
  const int32_t* num_items;
  const int32_t* pages;
  int32_t layer, num_modules;      // of the images' headers
  int32_t group_size;              // modules that share an input
  int32_t modules[kMaxGroup];      // their ids
  int32_t offsets[kMaxGroup + 1];  // expand: their first columns in y
  float* v;                        // [num_tokens, group_size, max_rank]
  int64_t v_token_stride;
  int32_t max_rank;
  // shrink: what blocks hand to the last of those that share an item and a module, [num_partials,
  // kPartialSums], and who is last: counters [num_partials], zeros between launches.
  float* partials;
  int32_t* counters;
  int32_t num_partials;
  void* activations;  // x of shrink, y of expand
  int64_t activation_stride;
  int32_t num_tokens, num_columns;  // of x
};

// y = x W^T + bias, for at most kMaxLinearTokens rows of x, in bfloat16.
constexpr int kMaxLinearTokens = 64;
constexpr int kLinearSums = 128 * kMaxLinearTokens;
struct LinearParams {
  void* y;
  const void *x, *weight, *bias;  // weight [out_features, in_features]; bias may be null
  int64_t y_stride, x_stride;
  int32_t num_tokens, out_features, in_features;
  // What blocks hand to each other: sums [num_blocks, kLinearSums], and flags [num_blocks, 2],
  // which are zeros between launches.
  float* partials;
  int32_t* flags;
  int32_t num_blocks;  // one for each multiprocessor
};

// Attention of single query rows over pages of 16 tokens, in bfloat16, with a head_dim of 128.
constexpr int kAttentionHeadDim = 128, kAttentionPageTokens = 16;
constexpr int kMaxAttentionKvHeads = 12, kMaxAttentionGroup = 8;
// Of a query head in a part of a row: sums, the greatest score, the sum of weights.
constexpr int kAttentionPartSums = kAttentionHeadDim + 2;
struct DecodeAttentionParams {
  void* out;          // [num_rows, num_kv_heads * group, 128]
  const void* q;      // the same, rows q_stride apart
  const void *k, *v;  // the step's own, [num_rows, num_kv_heads, 128], k_stride and v_stride apart
  void *k_cache, *v_cache;  // [num_pages, 16, num_kv_heads, 128], pages page_stride apart
  int64_t q_stride, k_stride, v_stride, page_stride;
  int32_t num_kv_heads, group;  // query heads of a key head
  float scale;
  const int32_t* pages;  // of all rows, one after another
  // [num_rows, 4]: where a row's pages begin and end in `pages`, its tokens, and
  // first share * 2^16 + number of shares.
  const int32_t* rows;
  // [num_blocks, 4]: where a share begins and ends in `pages`, its first row, unused.
  const int32_t* shares;
  // What blocks leave for the one that ends a row: [num_blocks, 2 * num_kv_heads * group *
  // kAttentionPartSums], and who is last: [num_blocks, num_kv_heads], zeros between launches.
  float* partials;
  int32_t* counters;
  int32_t num_blocks;
};

const char* rms_norm(const RmsNormParams&, void* stream);
const char* rope(const RopeParams&, void* stream);
const char* act_and_mul(const ActAndMulParams&, void* stream);
const char* write_kv(const WriteKvParams&, void* stream);
const char* sample(const SampleParams&, void* stream);
const char* linear(const LinearParams&, void* stream);
const char* decode_attention(const DecodeAttentionParams&, void* stream);
const char* lora_shrink(const LoraParams&, void* stream);
const char* lora_expand(const LoraParams&, void* stream);
const char* lora_shrink_float32(const LoraParams&, void* stream);
const char* lora_expand_float32(const LoraParams&, void* stream);

}  // namespace loraplex::cuda
