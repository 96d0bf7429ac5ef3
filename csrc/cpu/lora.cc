// Each row times its own adapter's A (shrink) and B (expand), read tile by tile through page
// tables.
//
// An item's weights are read once for a block of rows that the registers can hold sums for. A row's
// sums are taken in the same order whatever rows share its block.
#include "kernels.h"
#include "simd.h"

namespace loraplex::LORAPLEX_ISA {
namespace {

constexpr int kCacheLine = 64;

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

template <class T>
LORAPLEX_INLINE void prefetch_tile(const T* tile) {
  const char* bytes = reinterpret_cast<const char*>(tile);
  constexpr int kBytes = Image<T>::kTileElements * sizeof(T);
  for (int i = 0; i < kBytes; i += kCacheLine) __builtin_prefetch(bytes + i);
}

// ---- shrink: v[row, module, rank] = sum over columns of A[rank, column] * x[row, column] ----

constexpr int kShrinkRows = 3;
// Ranks worked on at a time, as many as leave room for kShrinkRows sums each.
constexpr int kShrinkRanks = kManyRegisters ? kTileRanks : kTileRanks / 2;

template <class T, int R>
struct Shrink {
  using Unit = typename UnitOf<T>::Type;
  static constexpr int kStep = kLanes * Unit::kElements;  // columns of one vector

  const LoraParams& p;
  const LoraItem& item;
  const Image<T> image{p, item};
  const int32_t column_tiles = (item.num_columns + kTileColumns - 1) / kTileColumns;

  // Rows row..row + R of x with the 8 ranks of rank tile i.
  void run(int64_t row, int32_t i) const {
    const T* x[R];
    T last[R][kTileColumns];  // the columns of the last tile, 0 where there are none
    const int32_t last_column = (column_tiles - 1) * kTileColumns;
    for (int r = 0; r < R; ++r) {
      x[r] = static_cast<const T*>(p.activations) + (row + r) * p.activation_stride;
      for (int c = 0; c < kTileColumns; ++c) {
        last[r][c] = last_column + c < item.num_columns ? x[r][last_column + c] : T{};
      }
    }
    for (int first = 0; first < kTileRanks; first += kShrinkRanks) {
      Vec sums[R][kShrinkRanks] = {};
      const uint32_t first_tile = item.first_tile + i * column_tiles;
      for (int32_t j = 0; j < column_tiles; ++j) {
        const T* tile = image.tile(first_tile + j);
        if (j + 2 < column_tiles) prefetch_tile(image.tile(first_tile + j + 2));
        const T* columns[R];
        for (int r = 0; r < R; ++r) {
          columns[r] = j + 1 < column_tiles ? x[r] + j * kTileColumns : last[r];
        }
        add_tile(sums, tile + first * kTileColumns, columns);
      }
      for (int r = 0; r < R; ++r) store_sums(sums[r], row + r, i * kTileRanks + first);
    }
  }

  LORAPLEX_INLINE static void add_tile(Vec (&sums)[R][kShrinkRanks], const T* tile,
                                       const T* const (&columns)[R]) {
#pragma GCC unroll 2
    for (int c = 0; c < kTileColumns; c += kStep) {
      Vec x[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) x[r] = load_units<Unit>(columns[r] + c, kStep);
#pragma GCC unroll 8
      for (int rank = 0; rank < kShrinkRanks; ++rank) {
        const Vec weights = load_units<Unit>(tile + rank * kTileColumns + c, kStep);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sums[r][rank] = Unit::dot(sums[r][rank], weights, x[r]);
      }
    }
  }

  LORAPLEX_INLINE void store_sums(Vec (&sums)[kShrinkRanks], int64_t row, int32_t rank) const {
    float totals[kShrinkRanks];
    reduce_add_each(sums, totals);
    float* v = p.v + row * p.v_strides[0] + item.module * p.v_strides[1] + rank;
    for (int i = 0; i < kShrinkRanks && rank + i < item.rank; ++i) v[i] = totals[i];
  }
};

template <class T, int R = kShrinkRows>
void shrink_rows(const LoraParams& p, const LoraItem& item, int64_t row, int32_t i) {
  if (item.row_end - row >= R) {
    Shrink<T, R>{p, item}.run(row, i);
  } else if constexpr (R > 1) {
    shrink_rows<T, R - 1>(p, item, row, i);
  }
}

// ---- expand: y[row, column] += sum over ranks of B[rank, column] * v[row, module, rank] ----

constexpr int kExpandRows = kManyRegisters ? 6 : 3;
constexpr int kExpandVectors = 4;
constexpr int kExpandColumns = kExpandVectors * kLanes;  // worked on at a time, of a tile

template <class T, int R>
struct Expand {
  const LoraParams& p;
  const LoraItem& item;
  const Image<T> image{p, item};
  const int32_t column_tiles = (item.num_columns + kTileColumns - 1) / kTileColumns;

  // Rows row..row + R of y with the columns of column tile j.
  void run(int64_t row, int32_t j) const {
    const float* v[R];
    for (int r = 0; r < R; ++r) {
      v[r] = p.v + (row + r) * p.v_strides[0] + item.module * p.v_strides[1];
    }
    for (int c = 0; c < kTileColumns; c += kExpandColumns) {
      const int32_t column = j * kTileColumns + c;
      if (column >= item.num_columns) break;
      Vec sums[R][kExpandVectors] = {};
      for (int32_t rank = 0; rank < item.rank; rank += kTileRanks) {
        const uint32_t index = item.first_tile + rank / kTileRanks * column_tiles + j;
        const T* tile = image.tile(index);
        if (j + 1 < item.tile_end) prefetch_tile(image.tile(index + 1));
        const int num_ranks = min(item.rank - rank, kTileRanks);
        for (int i = 0; i < num_ranks; ++i) {
          Vec weights[kExpandVectors];
#pragma GCC unroll 8
          for (int n = 0; n < kExpandVectors; ++n) {
            weights[n] = load(tile + i * kTileColumns + c + n * kLanes);
          }
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) {
            const Vec value = broadcast(v[r][rank + i]);
#pragma GCC unroll 8
            for (int n = 0; n < kExpandVectors; ++n) sums[r][n] += weights[n] * value;
          }
        }
      }
      for (int r = 0; r < R; ++r) add_to_row(sums[r], row + r, column);
    }
  }

  LORAPLEX_INLINE void add_to_row(const Vec (&sums)[kExpandVectors], int64_t row,
                                  int32_t column) const {
    T* y = static_cast<T*>(p.activations) + row * p.activation_stride + p.offsets[item.module];
    for (int n = 0; n < kExpandVectors; ++n) {
      T* at = y + column + n * kLanes;
      const int64_t rest = item.num_columns - column - n * kLanes;
      if (rest >= kLanes) {
        store(at, load(at) + sums[n]);
      } else if (rest > 0) {
        store_partial(at, load_partial(at, rest) + sums[n], rest);
      }
    }
  }
};

template <class T, int R = kExpandRows>
void expand_rows(const LoraParams& p, const LoraItem& item, int64_t row, int32_t j) {
  if (item.row_end - row >= R) {
    Expand<T, R>{p, item}.run(row, j);
  } else if constexpr (R > 1) {
    expand_rows<T, R - 1>(p, item, row, j);
  }
}

}  // namespace

void lora_shrink(const LoraParams& p) {
  dispatch(p.dtype, [&]<class T>(T*) {
#pragma omp parallel for schedule(dynamic) if (p.parallel)
    for (int64_t n = 0; n < p.num_items; ++n) {
      const LoraItem& item = p.items[n];
      for (int32_t i = item.tile_begin; i < item.tile_end; ++i) {
        for (int64_t row = item.row_begin; row < item.row_end; row += kShrinkRows) {
          shrink_rows<T>(p, item, row, i);
        }
      }
    }
  });
}

void lora_expand(const LoraParams& p) {
  dispatch(p.dtype, [&]<class T>(T*) {
#pragma omp parallel for schedule(dynamic) if (p.parallel)
    for (int64_t n = 0; n < p.num_items; ++n) {
      const LoraItem& item = p.items[n];
      for (int32_t j = item.tile_begin; j < item.tile_end; ++j) {
        for (int64_t row = item.row_begin; row < item.row_end; row += kExpandRows) {
          expand_rows<T>(p, item, row, j);
        }
      }
    }
  });
}

}  // namespace loraplex::LORAPLEX_ISA
