// What the binding and the kernels share: plain argument structs and, for every instruction set
// that was compiled, the same list of entry points. Strides count elements unless the name says
// bytes.
//
// This header is compiled with different -m flags into one library, so that it may hold no inline
// function: the linker would keep one copy of it, perhaps one that the machine cannot run.
#pragma once

#include <cstdint>

namespace loraplex {

enum class DType { kFloat32, kBFloat16 };

struct RmsNormParams {
  DType dtype;
  void* out;
  void* x;         // with a residual: read, then overwritten by the result (out == x)
  void* residual;  // null without one
  const void* weight;
  float eps;
  float offset;                         // added to the weight
  int64_t num_tokens, num_heads, size;  // rows are num_tokens x num_heads
  int64_t x_strides[2], out_strides[2], residual_strides[2];
};

struct RopeParams {
  DType dtype;
  const int64_t* positions;
  void* tensors[2];  // q and k, both [num_tokens, num_heads, head_dim], in place
  int64_t strides[2][2];
  int64_t num_heads[2];
  int64_t num_tokens;
  const float* cos_sin_cache;  // [max_position, 2 * half]
  int64_t half;                // dimensions i and i + half turn together
};

enum class Activation { kSilu, kGeluTanh };

// Both are x * sigmoid(y): y is x for SiLU, and x * kGeluLinear * (1 + kGeluSquare * x^2) for GELU
// by its tanh, as 0.5 * (1 + tanh(y / 2)) is sigmoid(y).
constexpr float kGeluLinear = 1.59576912f, kGeluSquare = 0.044715f;

struct ActAndMulParams {
  Activation activation;
  DType dtype;
  void* out;
  const void* gate_up;
  int64_t num_tokens, size;
  int64_t out_stride, gate_up_stride;
};

// One of the K and V caches: [num_pages, block_size, num_kv_heads, head_dim], last stride 1.
struct CacheParams {
  void* data;
  int64_t page_stride, token_stride, head_stride;
};

struct WriteKvParams {
  DType dtype;
  const void* new_rows[2];  // k and v, [num_tokens, num_kv_heads, head_dim]
  int64_t strides[2][2];
  CacheParams caches[2];
  bool has_float8_caches;  // of float8 e4m3fn; else of dtype
  const int64_t* slot_mapping;
  int64_t num_tokens, num_kv_heads, head_dim, block_size;
};

// A row of attention is one (query, head of the group) pair of a request and KV head; row i is
// query i / group, head i % group. An item is a run of rows against a run of keys.
struct AttentionItem {
  int32_t request, kv_head;
  int32_t row_begin, row_end;
  int32_t key_begin, key_end;
  int64_t partial;  // -1: the item's rows are complete; else where its part goes in `partials`
};

// Rows whose keys were split over num_parts items, the parts one after another in `partials`.
struct AttentionMerge {
  int32_t request, kv_head;
  int32_t num_rows, num_parts;
  int64_t partial;
};

struct AttentionParams {
  DType dtype;
  void* out;
  const void* q;
  int64_t out_strides[2], q_strides[2];
  CacheParams k_cache, v_cache;
  bool has_float8_caches;  // of float8 e4m3fn; else of dtype
  const int32_t* block_table;
  int64_t block_table_stride;
  const int32_t* cu_seqlens_q;
  const int32_t* seq_lens;
  int64_t num_kv_heads, group, head_dim, block_size;
  int64_t window;  // keys that a row sees, its own the last of them
  float scale;
  float soft_cap;  // 0: none; else scores become soft_cap * tanh(score / soft_cap)
  const AttentionItem* items;
  int64_t num_items;
  const AttentionMerge* merges;
  int64_t num_merges;
  float* partials;  // a part: num_rows x head_dim sums, then num_rows maxima, then num_rows weights
  bool parallel;
};

// What one item of shrink or expand needs of one adapter's matrix. Tile (i, j) of the matrix, ranks
// 8i.. and columns 64j.., is tile first_tile + i * num_column_tiles + j of the image.
struct LoraItem {
  const int32_t* page_table;
  int32_t first_tile;
  int32_t rank;
  int32_t num_columns;
  int32_t module;  // index in the group
  int32_t row_begin, row_end;
  int32_t tile_begin, tile_end;  // shrink: rank tiles i; expand: column tiles j
};

struct LoraParams {
  DType dtype;
  const uint8_t* pool;
  int64_t page_bytes;
  const LoraItem* items;
  int64_t num_items;
  float* v;
  int64_t v_strides[2];  // of tokens and modules
  void* activations;     // x of shrink, y of expand
  int64_t activation_stride;
  const int64_t* offsets;  // expand: first output column of each module
  bool parallel;
};

constexpr int kTileRanks = 8;
constexpr int kTileColumns = 64;
constexpr int kMaxHeadDim = 256;
constexpr int kAttentionRows = 48;    // rows of an item, at most
constexpr int kAttentionKeys = 64;    // keys worked on at a time
constexpr int kAttentionSplit = 512;  // keys of an item, about, where one item's rows are all rows

// A token for each of num_rows rows of logits; see csrc/sampling.h.
struct SampleParams {
  DType dtype;
  int64_t* token_ids;
  const void* logits;
  int64_t logits_stride;  // of rows
  int32_t vocab_size;
  int64_t num_rows;
  const float* temperature;
  const int32_t* top_k;
  const double* top_p;
  const double* min_p;
  const double* uniform;
};

constexpr int kMaxVocabSize = (1 << 19) - 8;

// Weights w[n, k] = decode(values[n, k]) * scales[n, g] + middles[n, g], g being the group of k.
// Groups are of whole blocks. Byte i of a block of 4 bits has weight i in its low bits, and weight
// i + kGroupedBlock4 / 2 in its high ones.
constexpr int kGroupedBlock4 = 32, kGroupedBlock8 = 16;

enum class GroupedCode { kTable4, kInt8, kFloat8 };  // 8 bits less 128; float8 e4m3fn

struct GroupedParams {
  DType dtype;
  void* out;       // x W^T [num_rows, out_features]; without x: W
  const float* x;  // [num_rows, in_features]
  const uint8_t* values;
  const void* scales;   // [out_features, in_features / group_size], of dtype
  const void* middles;  // likewise; null: 0
  const float* table;   // 16 entries, for kTable4
  GroupedCode code;
  int64_t num_rows, out_features, in_features, group_size;
};

struct Kernels {
  const char* isa;
  void (*rms_norm)(const RmsNormParams&);
  void (*rope)(const RopeParams&);
  void (*act_and_mul)(const ActAndMulParams&);
  void (*write_kv)(const WriteKvParams&);
  void (*attention)(const AttentionParams&);
  void (*lora_shrink)(const LoraParams&);
  void (*lora_expand)(const LoraParams&);
  void (*sample)(const SampleParams&);
  void (*grouped)(const GroupedParams&);
};

#define LORAPLEX_DECLARE_KERNELS(isa)       \
  namespace isa {                           \
  void rms_norm(const RmsNormParams&);      \
  void rope(const RopeParams&);             \
  void act_and_mul(const ActAndMulParams&); \
  void write_kv(const WriteKvParams&);      \
  void attention(const AttentionParams&);   \
  void lora_shrink(const LoraParams&);      \
  void lora_expand(const LoraParams&);      \
  void sample(const SampleParams&);         \
  void grouped(const GroupedParams&);       \
  }

LORAPLEX_DECLARE_KERNELS(portable)
#ifdef LORAPLEX_X86
LORAPLEX_DECLARE_KERNELS(avx2)
LORAPLEX_DECLARE_KERNELS(avx512)
LORAPLEX_DECLARE_KERNELS(avx512bf16)
#endif

}  // namespace loraplex
