#include <algorithm>

#include "plan.h"

namespace loraplex {
namespace {

// Rows of an item of prefill, at most: enough to keep a tile in the cache for, few enough to share
// out.
constexpr int32_t kItemRows = 96;
// Bytes of weights in an item of expand, about: what hides the cost of handing out an item.
constexpr int64_t kItemBytes = 16 << 10;
// Below this many bytes or products a second thread costs more than it saves.
constexpr int64_t kParallelBytes = 24 << 10;
constexpr int64_t kParallelProducts = 1 << 18;

int32_t ceil_div(int64_t a, int64_t b) { return static_cast<int32_t>((a + b - 1) / b); }

struct Adapter {
  const LoraParams& p;
  const LoraBatch& batch;
  int64_t segment;

  const int32_t* page_table() const {
    return batch.page_tables + segment * batch.page_table_stride;
  }

  bool has_page(int64_t index) const {
    return index < batch.max_pages && page_table()[index] >= 0 &&
           page_table()[index] < batch.num_pages;
  }

  std::string complain(const std::string& what) const {
    return "the adapter of segment " + std::to_string(segment) + " " + what;
  }

  // The header's entry (a_tile, b_tile, rank, 0) of a module.
  const int32_t* entry(int64_t module) const {
    const uint8_t* header = p.pool + page_table()[0] * p.page_bytes;
    return reinterpret_cast<const int32_t*>(header) +
           (batch.layer * batch.num_modules + module) * 4;
  }

  std::string check(const LoraItem& item, int64_t num_tiles, int64_t tiles_per_page) const {
    if (item.rank < 0 || item.rank > batch.max_rank || item.first_tile < 0) {
      return complain("has rank " + std::to_string(item.rank) + ", allowed is 0 to " +
                      std::to_string(batch.max_rank));
    }
    if (item.rank == 0) return "";
    const int64_t last_page = (item.first_tile + num_tiles - 1) / tiles_per_page;
    for (int64_t i = item.first_tile / tiles_per_page; i <= last_page; ++i) {
      if (!has_page(i)) return complain("lacks page " + std::to_string(i) + " in page_tables");
    }
    return "";
  }
};

void add_items(std::vector<LoraItem>& items, const LoraBatch& batch, LoraItem item,
               int64_t itemsize) {
  const int32_t rank_tiles = ceil_div(item.rank, kTileRanks);
  const int32_t num_tiles = batch.is_expand ? ceil_div(item.num_columns, kTileColumns) : rank_tiles;
  const int64_t bytes_per_tile = rank_tiles * int64_t{kTileRanks} * kTileColumns * itemsize;
  const int32_t step =
      batch.is_expand ? static_cast<int32_t>(std::max<int64_t>(kItemBytes / bytes_per_tile, 1)) : 1;
  const int32_t row_end = item.row_end;
  for (int32_t tile = 0; tile < num_tiles; tile += step) {
    item.tile_begin = tile;
    item.tile_end = std::min(tile + step, num_tiles);
    for (int32_t row = item.row_begin; row < row_end; row += kItemRows) {
      LoraItem part = item;
      part.row_begin = row;
      part.row_end = std::min(row + kItemRows, row_end);
      items.push_back(part);
    }
  }
}

std::string check_bounds(const LoraParams& p, const LoraBatch& batch) {
  const int32_t* indptr = batch.segment_indptr;
  const int64_t last = batch.num_experts * (batch.num_segments + 1) - 1;
  bool is_sorted = indptr[0] == 0;
  for (int64_t i = 0; i < last; ++i) is_sorted &= indptr[i] <= indptr[i + 1];
  if (!is_sorted) return "segment_indptr must begin with 0 and not decrease";
  if (indptr[last] > batch.num_tokens) {
    return "segment_indptr ends with " + std::to_string(indptr[last]) + ", more than the " +
           std::to_string(batch.num_tokens) + " rows";
  }
  if ((batch.layer + 1) * batch.num_modules * 16 > p.page_bytes) {
    return "layer " + std::to_string(batch.layer) +
           " is outside the header, which is one page of " + std::to_string(p.page_bytes) +
           " bytes";
  }
  return "";
}

}  // namespace

std::string plan_lora(std::vector<LoraItem>& items, LoraParams& p, const LoraBatch& batch) {
  items.clear();
  const std::string error = check_bounds(p, batch);
  if (!error.empty()) return error;
  const int64_t itemsize = p.dtype == DType::kBFloat16 ? 2 : 4;
  const int64_t tiles_per_page = p.page_bytes / (kTileRanks * kTileColumns * itemsize);
  const int64_t num_runs = batch.num_experts * (batch.num_segments + 1);
  int64_t bytes = 0, products = 0;
  for (int64_t run = 0; run + 1 < num_runs; ++run) {
    const int64_t expert = run / (batch.num_segments + 1), segment = run % (batch.num_segments + 1);
    const int32_t row_begin = batch.segment_indptr[run], row_end = batch.segment_indptr[run + 1];
    // What follows an expert's last segment has no adapter.
    if (segment == batch.num_segments || row_begin == row_end) continue;
    const Adapter adapter{p, batch, segment};
    if (!adapter.has_page(0)) return adapter.complain("lacks page 0 in page_tables");
    for (int32_t i = 0; i < batch.group_size; ++i) {
      const int32_t* entry = adapter.entry(batch.modules[i]);
      const int64_t width = batch.widths[batch.is_expand ? i : 0];
      const int64_t tiles = int64_t{ceil_div(entry[2], kTileRanks)} * ceil_div(width, kTileColumns);
      const LoraItem item{adapter.page_table(),
                          static_cast<int32_t>(entry[batch.is_expand ? 1 : 0] + expert * tiles),
                          entry[2],
                          static_cast<int32_t>(width),
                          i,
                          row_begin,
                          row_end,
                          0,
                          0};
      const std::string fault = adapter.check(item, tiles, tiles_per_page);
      if (!fault.empty()) return fault;
      if (item.rank == 0) continue;
      add_items(items, batch, item, itemsize);
      bytes += tiles * kTileRanks * kTileColumns * itemsize;
      products += tiles * kTileRanks * kTileColumns * (row_end - row_begin);
    }
  }
  p.items = items.data();
  p.num_items = items.size();
  p.parallel = items.size() > 1 && (bytes > kParallelBytes || products > kParallelProducts);
  return "";
}

}  // namespace loraplex
