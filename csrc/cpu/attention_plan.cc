#include <algorithm>

#include "plan.h"

namespace loraplex {
namespace {

// Below this many products of a query row with a key a second thread costs more than it saves.
constexpr int64_t kParallelProducts = 1 << 10;

std::string check_request(const AttentionParams& p, int64_t request, int64_t max_blocks,
                          int64_t num_pages) {
  const auto complain = [=](const std::string& what, const std::string& why) {
    return what + " of request " + std::to_string(request) + " " + why;
  };
  const int64_t num_queries = p.cu_seqlens_q[request + 1] - p.cu_seqlens_q[request];
  const int64_t length = p.seq_lens[request];
  const int64_t num_blocks = (length + p.block_size - 1) / p.block_size;
  if (num_queries < 0) return complain("cu_seqlens_q", "ends before it begins");
  if (length < num_queries) {
    return complain("seq_lens", "is " + std::to_string(length) + ", less than its " +
                                    std::to_string(num_queries) + " query rows");
  }
  if (num_blocks > max_blocks) {
    return complain("seq_lens", "is " + std::to_string(length) + ", more than the " +
                                    std::to_string(max_blocks) + " blocks of block_table hold");
  }
  const int32_t* table = p.block_table + request * p.block_table_stride;
  for (int64_t i = 0; i < num_blocks; ++i) {
    if (table[i] < 0 || table[i] >= num_pages) {
      return complain("block_table", "has page " + std::to_string(table[i]) + ", but there are " +
                                         std::to_string(num_pages) + " pages");
    }
  }
  return "";
}

// The first key that the query sees; the queries after it see none before that.
int32_t first_key(const AttentionParams& p, int32_t request, int32_t query) {
  const int32_t num_queries = p.cu_seqlens_q[request + 1] - p.cu_seqlens_q[request];
  const int64_t end = p.seq_lens[request] - num_queries + query + 1;
  return static_cast<int32_t>(std::max<int64_t>(end - p.window, 0));
}

// A request whose rows are one item would keep one thread busy for as long as its context is: its
// keys are split instead.
void split_keys(AttentionPlan& plan, const AttentionParams& p, int32_t request, int32_t num_rows,
                int64_t& partial) {
  const int32_t begin = first_key(p, request, 0), end = p.seq_lens[request];
  const int32_t num_parts = (end - begin + kAttentionSplit - 1) / kAttentionSplit;
  const int32_t blocks = (end - begin + kAttentionKeys - 1) / kAttentionKeys;
  const int32_t part_keys = (blocks + num_parts - 1) / num_parts * kAttentionKeys;
  for (int32_t head = 0; head < p.num_kv_heads; ++head) {
    plan.merges.push_back({request, head, num_rows, 0, partial});
    for (int32_t key = begin; key < end; key += part_keys) {
      plan.items.push_back(
          {request, head, 0, num_rows, key, std::min(key + part_keys, end), partial});
      partial += num_rows * (p.head_dim + 2);
      ++plan.merges.back().num_parts;
    }
  }
}

void split_rows(AttentionPlan& plan, const AttentionParams& p, int32_t request, int32_t num_rows) {
  const int64_t num_queries = num_rows / p.group;
  // The last rows see the most keys; begun first, they do not keep the other threads waiting.
  for (int32_t end = num_rows; end > 0; end -= kAttentionRows) {
    const int32_t begin = std::max(end - kAttentionRows, 0);
    const int32_t key_begin = first_key(p, request, begin / static_cast<int32_t>(p.group));
    const int32_t key_end =
        static_cast<int32_t>(p.seq_lens[request] - num_queries + (end - 1) / p.group + 1);
    for (int32_t head = 0; head < p.num_kv_heads; ++head) {
      plan.items.push_back({request, head, begin, end, key_begin, key_end, -1});
    }
  }
}

}  // namespace

std::string plan_attention(AttentionPlan& plan, AttentionParams& p, int64_t num_requests,
                           int64_t num_tokens, int64_t max_blocks, int64_t num_pages) {
  plan.items.clear();
  plan.merges.clear();
  if (p.cu_seqlens_q[0] != 0 || p.cu_seqlens_q[num_requests] > num_tokens) {
    return "cu_seqlens_q must go from 0 to at most the " + std::to_string(num_tokens) +
           " rows of q, got " + std::to_string(p.cu_seqlens_q[0]) + " to " +
           std::to_string(p.cu_seqlens_q[num_requests]);
  }
  int64_t partial = 0, products = 0;
  for (int32_t request = 0; request < num_requests; ++request) {
    const std::string error = check_request(p, request, max_blocks, num_pages);
    if (!error.empty()) return error;
    const int32_t num_rows =
        (p.cu_seqlens_q[request + 1] - p.cu_seqlens_q[request]) * static_cast<int32_t>(p.group);
    if (num_rows == 0) continue;
    const int32_t num_keys = p.seq_lens[request] - first_key(p, request, 0);
    products += int64_t{num_rows} * p.num_kv_heads * num_keys;
    if (num_rows <= kAttentionRows && num_keys > kAttentionSplit) {
      split_keys(plan, p, request, num_rows, partial);
    } else {
      split_rows(plan, p, request, num_rows);
    }
  }
  if (plan.partials.size() < static_cast<size_t>(partial)) plan.partials.resize(partial);
  p.items = plan.items.data();
  p.num_items = plan.items.size();
  p.merges = plan.merges.data();
  p.num_merges = plan.merges.size();
  p.partials = plan.partials.data();
  p.parallel = products > kParallelProducts;
  return "";
}

}  // namespace loraplex
