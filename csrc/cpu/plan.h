// Cuts a batch into items of work, before the kernels run. Portable code, compiled once. How a
// request is cut depends on that request alone, so that its results do not depend on its company.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace loraplex {

struct AttentionPlan {
  std::vector<AttentionItem> items;
  std::vector<AttentionMerge> merges;
  std::vector<float> partials;
};

// Fills `plan` and points `p` at it. Returns what is wrong with the batch, or "".
std::string plan_attention(AttentionPlan& plan, AttentionParams& p, int64_t num_requests,
                           int64_t num_tokens, int64_t max_blocks, int64_t num_pages);

struct LoraBatch {
  // [num_experts, num_segments + 1]: rows of an expert and a segment follow one another.
  const int32_t* segment_indptr;
  int64_t num_experts, num_segments;
  const int32_t* page_tables;
  int64_t max_pages, page_table_stride;
  int64_t num_pages, num_tokens, max_rank;
  int64_t layer, num_modules;
  const int64_t* modules;
  int64_t group_size;
  const int64_t* widths;  // columns of A (one for the group) or of B (one for each module)
  bool is_expand;
};

// Fills `items` and points `p` at them. Returns what is wrong with the batch, or "".
std::string plan_lora(std::vector<LoraItem>& items, LoraParams& p, const LoraBatch& batch);

}  // namespace loraplex
