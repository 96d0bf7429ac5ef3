// Each row times its own adapter's A (shrink) and B (expand), read tile by tile through page
// tables.
//
// An item's weights are read once for a block of rows that the registers can hold sums for. A row's
// sums are taken in the same order whatever rows share its block.
#include <omp.h>

#include "kernels.h"
#include "simd.h"

namespace loraplex::LORAPLEX_ISA {
namespace {

// Finds tiles of an image in the pool.
template <class T>
struct Image {
  static constexpr int kTileElements = kTileRanks * kTileColumns;

  const uint8_t* pool;
  int64_t page_bytes;
  const int32_t* page_table;
  uint32_t tiles_per_page;

  LORAPLEX_INLINE Image(const LoraParams& p, const LoraItem& item)
      : pool(p.pool),
        page_bytes(p.page_bytes),
        page_table(item.page_table),
        tiles_per_page(p.page_bytes / (kTileElements * sizeof(T))) {}

  LORAPLEX_INLINE const T* tile(uint32_t index) const {
    const uint8_t* page = pool + page_table[index / tiles_per_page] * page_bytes;
    return reinterpret_cast<const T*>(page) + index % tiles_per_page * kTileElements;
  }
};

LORAPLEX_INLINE int32_t num_column_tiles(const LoraItem& item) {
  return (item.num_columns + kTileColumns - 1) / kTileColumns;
}

LORAPLEX_INLINE int32_t num_rank_tiles(const LoraItem& item) {
  return (item.rank + kTileRanks - 1) / kTileRanks;
}

// Asks for a row of a tile, into the second level of cache. Called row by row, beside the work on
// another tile, because a burst would queue up.
template <class T>
LORAPLEX_INLINE void prefetch_row(const T* tile, int rank) {
  const T* row = tile + rank * kTileColumns;
  for (int c = 0; c < kTileColumns; c += 64 / sizeof(T)) __builtin_prefetch(row + c, 0, 2);
}

// What there is to ask for where an item has so many rows that its weights hardly matter.
using NoTile = decltype(nullptr);
LORAPLEX_INLINE void prefetch_row(NoTile, int) {}
constexpr int kMaxPrefetchPasses = 4;

// ---- shrink: v[row, module, rank] = sum over columns of A[rank, column] * x[row, column] ----

constexpr int kShrinkRows = 3;
// Ranks worked on at a time, as many as leave room for kShrinkRows sums each.
constexpr int kShrinkRanks = kManyRegisters ? kTileRanks : kTileRanks / 2;

template <class T, int R>
struct Shrink {
  using Unit = typename UnitOf<T>::Type;
  static constexpr int kVectors = kTileColumns / (kLanes * Unit::kElements);

  const LoraParams& p;
  const LoraItem& item;
  const Image<T> image{p, item};
  const int32_t column_tiles = num_column_tiles(item);

  // Rows row..row + R of x with the 8 ranks of rank tile i. upcoming(j) is the tile to ask for
  // while column tile j is worked on.
  template <class F>
  void run(int64_t row, int32_t i, F upcoming) const {
    const T* x[R];
    const T* last[R];  // the columns of the last tile
    T padded[R][kTileColumns];
    for (int r = 0; r < R; ++r) {
      x[r] = static_cast<const T*>(p.activations) + (row + r) * p.activation_stride;
      last[r] = x[r] + (column_tiles - 1) * kTileColumns;
      if (item.num_columns % kTileColumns != 0) {
        for (int c = 0; c < kTileColumns; ++c) {
          padded[r][c] = c < item.num_columns % kTileColumns ? last[r][c] : T{};
        }
        last[r] = padded[r];
      }
    }
    for (int first = 0; first < kTileRanks; first += kShrinkRanks) {
      Vec sums[R][kShrinkRanks] = {};
      for (int32_t j = 0; j < column_tiles; ++j) {
        const T* columns[R];
        for (int r = 0; r < R; ++r) {
          columns[r] = j + 1 < column_tiles ? x[r] + j * kTileColumns : last[r];
        }
        const T* tile = image.tile(item.first_tile + i * column_tiles + j);
        add_tile(sums, tile, upcoming(j), first, columns);
      }
      for (int r = 0; r < R; ++r) store_sums(sums[r], row + r, i * kTileRanks + first);
    }
  }

  // Adds the products with kShrinkRanks ranks of a tile, from rank `first` on.
  template <class NextTile>
  LORAPLEX_INLINE static void add_tile(Vec (&sums)[R][kShrinkRanks], const T* tile, NextTile next,
                                       int first, const T* const (&columns)[R]) {
#pragma GCC unroll 2
    for (int n = 0; n < kVectors; ++n) {
      Vec x[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) x[r] = load_operand(columns[r], n);
#pragma GCC unroll 8
      for (int rank = 0; rank < kShrinkRanks; ++rank) {
        const Vec weights = load_operand(tile + (first + rank) * kTileColumns, n);
        if (n == 0) prefetch_row(next, first + rank);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sums[r][rank] = Unit::dot(sums[r][rank], weights, x[r]);
      }
    }
  }

  // The n-th vector of a row of a tile.
  LORAPLEX_INLINE static Vec load_operand(const T* row, int n) {
    Vec result;
    if constexpr (Unit::kElements == 2) {
      result = load(reinterpret_cast<const float*>(row) + n * kLanes);
    } else {
      const Wide wide = load_wide(row + n / 2 * 2 * kLanes);
      result = n % 2 == 0 ? wide.first : wide.second;
    }
    keep(result);
    return result;
  }

  LORAPLEX_INLINE void store_sums(Vec (&sums)[kShrinkRanks], int64_t row, int32_t rank) const {
    float totals[kShrinkRanks];
    reduce_add_each(sums, totals);
    float* v = p.v + row * p.v_strides[0] + item.module * p.v_strides[1] + rank;
    if (rank + kShrinkRanks <= item.rank) {
      __builtin_memcpy(v, totals, sizeof(totals));
    } else {
      for (int i = 0; i < item.rank - rank; ++i) v[i] = totals[i];
    }
  }
};

template <class T, class F, int R = kShrinkRows>
void shrink_rows(const LoraParams& p, const LoraItem& item, int64_t row, int32_t i, F upcoming) {
  if (item.row_end - row >= R) {
    Shrink<T, R>{p, item}.run(row, i, upcoming);
  } else if constexpr (R > 1) {
    shrink_rows<T, F, R - 1>(p, item, row, i, upcoming);
  }
}

// `next` is the item that this thread is likely to take up after this one. While a rank tile is
// worked on, the one after it is asked for, some of its tiles in each pass over the rows.
template <class T>
void shrink_item(const LoraParams& p, const LoraItem& item, const LoraItem& next) {
  const Image<T> image(p, item), next_image(p, next);
  const int32_t column_tiles = num_column_tiles(item);  // in all items: they share x
  const int32_t num_passes = ceil_div(item.row_end - item.row_begin, kShrinkRows);
  for (int32_t i = item.tile_begin; i < item.tile_end; ++i) {
    for (int32_t pass = 0; pass < num_passes; ++pass) {
      const auto upcoming = [&](int32_t j) {
        const int32_t tile = item.first_tile + i * column_tiles + j;
        if (j % num_passes != pass) return image.tile(tile);
        if (i + 1 < item.tile_end) return image.tile(tile + column_tiles);
        return next_image.tile(next.first_tile + next.tile_begin * column_tiles + j);
      };
      const int64_t row = item.row_begin + pass * kShrinkRows;
      if (num_passes <= kMaxPrefetchPasses) {
        shrink_rows<T>(p, item, row, i, upcoming);
      } else {
        shrink_rows<T>(p, item, row, i, [](int32_t) { return nullptr; });
      }
    }
  }
}

// ---- expand: y[row, column] += sum over ranks of B[rank, column] * v[row, module, rank] ----

constexpr int kExpandRows = 6;

template <class T, int R>
struct Expand {
  // What is worked on at a time of a tile: as many columns as leave room for R sums of each.
  static constexpr int kWides = kManyRegisters || R <= 2 ? 2 : 1;
  static constexpr int kColumns = kWides * 2 * kLanes;

  const LoraParams& p;
  const LoraItem& item;
  const Image<T> image{p, item};
  const int32_t column_tiles = num_column_tiles(item);

  // Rows row..row + R of y with the columns of column tile j. upcoming(i) is the tile to ask for
  // while rank tile i is worked on.
  template <class F>
  void run(int64_t row, int32_t j, F upcoming) const {
    const float* v[R];
    for (int r = 0; r < R; ++r) {
      v[r] = p.v + (row + r) * p.v_strides[0] + item.module * p.v_strides[1];
    }
    for (int c = 0; c < kTileColumns; c += kColumns) {
      const int32_t column = j * kTileColumns + c;
      if (column >= item.num_columns) break;
      Wide sums[R][kWides] = {};
      for (int32_t rank = 0; rank < item.rank; rank += kTileRanks) {
        const auto next = upcoming(rank / kTileRanks);
        const T* tile = image.tile(item.first_tile + rank / kTileRanks * column_tiles + j);
        const int num_ranks = min(item.rank - rank, kTileRanks);
        for (int i = 0; i < num_ranks; ++i) {
          add_rank(sums, tile + i * kTileColumns + c, v, rank + i);
          if (c == 0) prefetch_row(next, i);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        Wide totals[kWides];  // a copy, whose address may be taken
#pragma GCC unroll 8
        for (int n = 0; n < kWides; ++n) totals[n] = sums[r][n];
        add_to_row(totals, row + r, column);
      }
    }
  }

  LORAPLEX_INLINE static void add_rank(Wide (&sums)[R][kWides], const T* tile_row,
                                       const float* const (&v)[R], int32_t rank) {
    Wide weights[kWides];
#pragma GCC unroll 8
    for (int n = 0; n < kWides; ++n) weights[n] = load_wide(tile_row + n * 2 * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec value = broadcast(v[r][rank]);
#pragma GCC unroll 8
      for (int n = 0; n < kWides; ++n) {
        sums[r][n].first += weights[n].first * value;
        sums[r][n].second += weights[n].second * value;
      }
    }
  }

  LORAPLEX_INLINE void add_to_row(const Wide (&sums)[kWides], int64_t row, int32_t column) const {
    T* y = static_cast<T*>(p.activations) + row * p.activation_stride + p.offsets[item.module];
    const int64_t rest = min(item.num_columns - column, kColumns);
    for_each_wide(rest, [&](int64_t i, auto load, auto store) {
      store(y + column + i, load(y + column + i) + sums[i / (2 * kLanes)]);
    });
  }
};

template <class T, class F, int R = kExpandRows>
void expand_rows(const LoraParams& p, const LoraItem& item, int64_t row, int32_t j, F upcoming) {
  if (item.row_end - row >= R) {
    Expand<T, R>{p, item}.run(row, j, upcoming);
  } else if constexpr (R > 1) {
    expand_rows<T, F, R - 1>(p, item, row, j, upcoming);
  }
}

// How many tiles ahead of its use a tile of B is asked for, at least.
constexpr int kTilesAhead = 8;

template <class T>
void expand_item(const LoraParams& p, const LoraItem& item, const LoraItem& next) {
  const Image<T> image(p, item), next_image(p, next);
  const int32_t column_tiles = num_column_tiles(item), next_tiles = num_column_tiles(next);
  const int32_t ahead = ceil_div(kTilesAhead, num_rank_tiles(item));
  const int32_t num_passes = ceil_div(item.row_end - item.row_begin, kExpandRows);
  for (int32_t j = item.tile_begin; j < item.tile_end; ++j) {
    for (int32_t pass = 0; pass < num_passes; ++pass) {
      const auto upcoming = [&](int32_t i) {
        const int32_t tile = item.first_tile + i * column_tiles + j;
        const int32_t past = j + ahead - item.tile_end;
        if (i % num_passes != pass) return image.tile(tile);
        if (past < 0) return image.tile(tile + ahead);
        const int32_t next_i = min(i, num_rank_tiles(next) - 1);
        const int32_t next_j = min(next.tile_begin + past, next.tile_end - 1);
        return next_image.tile(next.first_tile + next_i * next_tiles + next_j);
      };
      const int64_t row = item.row_begin + pass * kExpandRows;
      if (num_passes <= kMaxPrefetchPasses) {
        expand_rows<T>(p, item, row, j, upcoming);
      } else {
        expand_rows<T>(p, item, row, j, [](int32_t) { return nullptr; });
      }
    }
  }
}

template <class F>
void for_each_item(const LoraParams& p, F f) {
#pragma omp parallel if (p.parallel)
  {
    const int64_t num_threads = omp_get_num_threads();
#pragma omp for schedule(dynamic)
    for (int64_t n = 0; n < p.num_items; ++n) {
      f(p.items[n], p.items[min(n + num_threads, p.num_items - 1)]);
    }
  }
}

}  // namespace

void lora_shrink(const LoraParams& p) {
  dispatch(p.dtype, [&]<class T>(T*) {
    for_each_item(p, [&](const auto& item, const auto& next) { shrink_item<T>(p, item, next); });
  });
}

void lora_expand(const LoraParams& p) {
  dispatch(p.dtype, [&]<class T>(T*) {
    for_each_item(p, [&](const auto& item, const auto& next) { expand_item<T>(p, item, next); });
  });
}

}  // namespace loraplex::LORAPLEX_ISA
