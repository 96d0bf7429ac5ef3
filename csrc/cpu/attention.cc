// Paged attention with an online softmax. Prefill chunks and decode rows take the same path: the
// keys of an item are repacked, kAttentionKeys at a time, into the layout that the matrix product
// wants. Repacking costs less than the memory traffic of a decode and little beside the products of
// a prefill.
#include <omp.h>

#include "float8.h"
#include "gemm.h"
#include "kernels.h"
#include "simd.h"

namespace loraplex::LORAPLEX_ISA {
namespace {

constexpr int kKeys = kAttentionKeys;
constexpr float kLowest = -1e30f;  // the maximum of no scores

// Where kKeys keys and their values are.
template <class Cached>
struct KeyRows {
  const Cached* k[kKeys];
  const Cached* v[kKeys];
};

// Working memory of one thread, on its stack. Rows are as long as head_dim needs, at most this.
template <class Cached>
struct Scratch {
  alignas(64) float q[kAttentionRows * kMaxHeadDim];  // [rows, units of head_dim]
  alignas(64) float k[kMaxHeadDim * kKeys];           // [units of head_dim, keys]
  alignas(64) float v[kKeys * kMaxHeadDim];           // [units of keys, head_dim]
  alignas(64) float scores[kAttentionRows * kKeys];   // [rows, keys], then the weights in units
  alignas(64) float sums[kAttentionRows * kMaxHeadDim];
  float max[kAttentionRows], weight[kAttentionRows], rescale[kAttentionRows];
  KeyRows<Cached> located[2];  // the keys that are worked on, and those that come next
};

template <class Cached>
LORAPLEX_INLINE const Cached* row_of(const CacheParams& cache, int64_t page, int64_t offset,
                                     int64_t kv_head) {
  return static_cast<const Cached*>(cache.data) + page * cache.page_stride +
         offset * cache.token_stride + kv_head * cache.head_stride;
}

// Finds an item's keys from key_begin on. Those past its end are zeros.
template <class Cached>
void locate(const AttentionParams& p, const AttentionItem& item, int64_t key_begin,
            KeyRows<Cached>& rows) {
  alignas(64) static const Cached kZeros[kMaxHeadDim] = {};
  const int32_t* table = p.block_table + item.request * p.block_table_stride;
  int64_t block = key_begin / p.block_size, offset = key_begin % p.block_size;
  const int64_t num_keys = max(min(kKeys, item.key_end - key_begin), 0);
  for (int64_t i = 0; i < num_keys; ++block, offset = 0) {
    const Cached* k = row_of<Cached>(p.k_cache, table[block], offset, item.kv_head);
    const Cached* v = row_of<Cached>(p.v_cache, table[block], offset, item.kv_head);
    for (; offset < p.block_size && i < num_keys; ++offset, ++i) {
      rows.k[i] = k;
      rows.v[i] = v;
      k += p.k_cache.token_stride;
      v += p.v_cache.token_stride;
    }
  }
  for (int64_t i = num_keys; i < kKeys; ++i) rows.k[i] = rows.v[i] = kZeros;
}

// Queries and results are of type T, keys and values of type Cached.
template <class T, class Cached>
struct Attention {
  using Unit = typename UnitOf<T>::Type;
  static constexpr int kElements = Unit::kElements;

  const AttentionParams& p;
  const AttentionItem& item;
  Scratch<Cached>& s;
  const int64_t rows = item.row_end - item.row_begin;
  const int64_t units = ceil_div(p.head_dim, kElements);    // of head_dim
  const int64_t stride = ceil_div(units, kLanes) * kLanes;  // the same, in whole vectors
  const int64_t width = stride * kElements;                 // floats of those
  const int64_t first_token = p.cu_seqlens_q[item.request];
  const int64_t num_queries = p.cu_seqlens_q[item.request + 1] - first_token;

  LORAPLEX_INLINE int64_t query_of(int64_t row) const { return (item.row_begin + row) / p.group; }
  LORAPLEX_INLINE int64_t head_of(int64_t row) const {
    return item.kv_head * p.group + (item.row_begin + row) % p.group;
  }
  // The row sees the keys of the request before this one, p.window of them.
  LORAPLEX_INLINE int64_t visible_end(int64_t row) const {
    return p.seq_lens[item.request] - num_queries + query_of(row) + 1;
  }

  // `next` is the item that this thread is likely to take up after this one.
  void run(const AttentionItem& next) {
    load_queries();
    for (int64_t row = 0; row < rows; ++row) {
      s.max[row] = kLowest;
      s.weight[row] = 0;
    }
    KeyRows<Cached>*now = &s.located[0], *soon = &s.located[1];
    locate(p, item, item.key_begin, *now);
    for (int64_t key = item.key_begin; key < item.key_end; key += kKeys) {
      const int64_t num_keys = min(kKeys, item.key_end - key);
      if (key + kKeys < item.key_end) {
        locate(p, item, key + kKeys, *soon);
      } else {
        locate(p, next, next.key_begin, *soon);
      }
      pack_keys(num_keys, now->k, soon->k);
      pack_values(num_keys, now->v, soon->v);
      const Gemm scores{s.q, stride, s.k, kKeys, s.scores, kKeys, units, nullptr};
      gemm<Unit>(scores, rows, num_keys);
      if (p.soft_cap > 0) cap_scores(num_keys);
      for (int64_t row = 0; row < rows; ++row) softmax(row, visible_end(row) - key, num_keys);
      const float* rescale = key == item.key_begin ? nullptr : s.rescale;
      const Gemm sums{s.scores, kKeys, s.v, width, s.sums, width, ceil_div(num_keys, kElements),
                      rescale};
      gemm<Unit>(sums, rows, p.head_dim);
      KeyRows<Cached>* const done = now;
      now = soon;
      soon = done;
    }
    if (item.partial < 0) {
      store_rows();
    } else {
      store_partial_rows();
    }
  }

  void load_queries() {
    for (int64_t row = 0; row < rows; ++row) {
      const T* q = static_cast<const T*>(p.q) + (first_token + query_of(row)) * p.q_strides[0] +
                   head_of(row) * p.q_strides[1];
      for (int64_t unit = 0; unit < units; unit += kLanes) {
        store(s.q + row * stride + unit,
              load_units<Unit>(q + unit * kElements, p.head_dim - unit * kElements));
      }
    }
  }

  // Rows that come next are fetched one by one beside those that are packed: a burst would queue
  // up.
  LORAPLEX_INLINE static void prefetch(const Cached* row, int64_t d) {
    constexpr int kLine = 64 / sizeof(Cached);
    if (d % kLine == 0) __builtin_prefetch(row + d, 0, 2);
  }

  void pack_keys(int64_t num_keys, const Cached* const* k, const Cached* const* next_k) {
    for (int64_t key = 0; key < num_keys; key += kLanes) {
      for (int64_t unit = 0; unit < units; unit += kLanes) {
        const int64_t d = unit * kElements;
        Vec tile[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          tile[i] = load_units<Unit>(k[key + i] + d, p.head_dim - d);
          prefetch(next_k[key + i], d);
        }
        transpose(tile);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(s.k + (unit + i) * kKeys + key, tile[i]);
      }
    }
  }

  // Where a unit is two elements, it holds those of two keys.
  void pack_values(int64_t num_keys, const Cached* const* v, const Cached* const* next_v) {
    for (int64_t key = 0; key < num_keys; key += kElements) {
      float* packed = s.v + key / kElements * width;
      for (int64_t d = 0; d < p.head_dim; d += kLanes * kElements) {
        Vec first = load_units<Unit>(v[key] + d, p.head_dim - d);
        prefetch(next_v[key], d);
        if constexpr (kElements == 2) {
          Vec second = load_units<Unit>(v[key + 1] + d, p.head_dim - d);
          prefetch(next_v[key + 1], d);
          zip_halves(first, second);
          store(packed + d + kLanes, second);
        }
        store(packed + d, first);
      }
    }
  }

  // Leaves the scores in units of soft_cap.
  void cap_scores(int64_t num_keys) {
    const float scale = p.scale / p.soft_cap;
    for (int64_t row = 0; row < rows; ++row) {
      float* scores = s.scores + row * kKeys;
      for (int64_t i = 0; i < num_keys; i += kLanes) {
        store(scores + i, tanh(load(scores + i) * scale));
      }
    }
  }

  // Turns the row's scores into weights of values, relative to the greatest score so far. Of these
  // keys the row sees p.window up to `end`, which may be none, or more than there are.
  void softmax(int64_t row, int64_t end, int64_t num_keys) {
    constexpr float kLog2e = 1.44269504f;
    float* scores = s.scores + row * kKeys;
    const int64_t begin = max(end - p.window, 0);
    const int64_t num_visible = max(min(end, num_keys) - begin, 0);
    const int64_t vectors = ceil_div(num_keys, kLanes);
    // Unsigned, the keys before `begin` are far behind it: one comparison finds all that are seen.
    const UintVec lane = (UintVec)lanes() - uint32_t(begin);
    const float scale = (p.soft_cap > 0 ? p.soft_cap : p.scale) * kLog2e;
    Vec highest = broadcast(kLowest);
    for (int64_t v = 0; v < vectors; ++v) {
      const Vec x = load(scores + v * kLanes) * scale;
      const Vec visible = lane + uint32_t(v * kLanes) < uint32_t(num_visible) ? x : kLowest;
      store(scores + v * kLanes, visible);
      highest = maximum(visible, highest);
    }
    const float new_max = num_visible > 0 ? max_of(s.max[row], reduce_max(highest)) : s.max[row];
    s.rescale[row] = exp2(broadcast(s.max[row] - new_max))[0];
    s.max[row] = new_max;
    Vec total{};
    for (int64_t v = 0; v < vectors; ++v) {
      const Vec weights = exp2(load(scores + v * kLanes) - (num_visible > 0 ? new_max : 0.0f));
      total += weights;
      store_weights(scores, v, weights);
    }
    s.weight[row] = s.weight[row] * s.rescale[row] + reduce_add(total);
  }

  LORAPLEX_INLINE static IntVec lanes() {
    IntVec result;
    for (int i = 0; i < kLanes; ++i) result[i] = i;
    return result;
  }

  LORAPLEX_INLINE static float max_of(float a, float b) { return a > b ? a : b; }

  // bfloat16 weights overwrite scores that have been read already.
  LORAPLEX_INLINE static void store_weights(float* scores, int64_t v, Vec weights) {
    if constexpr (kElements == 1) {
      store(scores + v * kLanes, weights);
    } else {
      store(reinterpret_cast<T*>(scores) + v * kLanes, weights);
    }
  }

  void store_rows() {
    for (int64_t row = 0; row < rows; ++row) {
      T* out = static_cast<T*>(p.out) + (first_token + query_of(row)) * p.out_strides[0] +
               head_of(row) * p.out_strides[1];
      const float scale = 1.0f / s.weight[row];
      for_each_vector(p.head_dim, [&](int64_t d, auto, auto store) {
        store(out + d, load(s.sums + row * width + d) * scale);
      });
    }
  }

  void store_partial_rows() {
    float* sums = p.partials + item.partial;
    for (int64_t row = 0; row < rows; ++row) {
      for_each_vector(p.head_dim, [&](int64_t d, auto, auto store) {
        store(sums + row * p.head_dim + d, load(s.sums + row * width + d));
      });
      sums[rows * p.head_dim + row] = s.max[row];
      sums[rows * p.head_dim + rows + row] = s.weight[row];
    }
  }
};

// Joins the parts of a row whose keys were split, in the order of the keys.
template <class T>
void merge_row(const AttentionParams& p, const AttentionMerge& merge, int64_t row) {
  const int64_t num_rows = merge.num_rows;
  const int64_t part_size = num_rows * (p.head_dim + 2);
  const float* parts = p.partials + merge.partial;
  const float* maxima = parts + num_rows * p.head_dim + row;
  float highest = kLowest;
  for (int64_t i = 0; i < merge.num_parts; ++i) {
    const float x = maxima[i * part_size];
    highest = x > highest ? x : highest;
  }
  float total = 0;
  for (int64_t i = 0; i < merge.num_parts; ++i) {
    const float scale = exp2(broadcast(maxima[i * part_size] - highest))[0];
    total += scale * maxima[i * part_size + num_rows];
  }
  T* out = static_cast<T*>(p.out) +
           (p.cu_seqlens_q[merge.request] + row / p.group) * p.out_strides[0] +
           (merge.kv_head * p.group + row % p.group) * p.out_strides[1];
  for_each_vector(p.head_dim, [&](int64_t d, auto load, auto store) {
    Vec sum{};
    for (int64_t i = 0; i < merge.num_parts; ++i) {
      const Vec scale = exp2(broadcast(maxima[i * part_size] - highest));
      sum += load(parts + i * part_size + row * p.head_dim + d) * scale;
    }
    store(out + d, sum / total);
  });
}

template <class T, class Cached>
void attend(const AttentionParams& p) {
#pragma omp parallel if (p.parallel)
  {
    Scratch<Cached> scratch;
    const int64_t num_threads = omp_get_num_threads();
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < p.num_items; ++i) {
      const int64_t next = min(i + num_threads, p.num_items - 1);
      Attention<T, Cached>{p, p.items[i], scratch}.run(p.items[next]);
    }
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < p.num_merges; ++i) {
      for (int64_t row = 0; row < p.merges[i].num_rows; ++row) {
        merge_row<T>(p, p.merges[i], row);
      }
    }
  }
}

}  // namespace

void attention(const AttentionParams& p) {
  dispatch(p.dtype, [&]<class T>(T*) {
    if (p.has_float8_caches) {
      attend<T, Float8>(p);
    } else {
      attend<T, T>(p);
    }
  });
}

}  // namespace loraplex::LORAPLEX_ISA
