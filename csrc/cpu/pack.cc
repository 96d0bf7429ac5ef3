#include "pack.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <type_traits>

namespace loraplex {
namespace {

// Ranks of B that are converted at a time: what stays in the first cache.
constexpr int64_t kChunkRanks = 32;

// Elements in memory: of any alignment, since nothing aligns the tensors of a file.
struct [[gnu::packed, gnu::may_alias]] Float32 {
  static constexpr int32_t kFirstInfinite = 0x7f800000;
  uint32_t bits;

  float to_float() const { return std::bit_cast<float>(bits); }
  static Float32 round(uint32_t bits) { return {bits}; }
};

struct [[gnu::packed, gnu::may_alias]] BFloat16 {
  static constexpr int32_t kFirstInfinite = 0x7f7f8000;
  uint16_t bits;

  float to_float() const { return std::bit_cast<float>(uint32_t{bits} << 16); }
  // To nearest and ties to even; of what is not finite nothing is asked.
  static BFloat16 round(uint32_t bits) {
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  }
};

struct [[gnu::packed, gnu::may_alias]] Float16 {
  uint16_t bits;

  float to_float() const {
    constexpr uint32_t kRebias = 112 << 23;  // 127 - 15, the difference of the exponents' biases
    constexpr uint32_t kSmallest = 113 << 23;
    const uint32_t magnitude = (bits & 0x7fffu) << 13;
    const uint32_t normal = magnitude + kRebias + (magnitude < 31u << 23 ? 0 : kRebias);
    const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude + kSmallest) -
                                                       std::bit_cast<float>(kSmallest));
    // By masks: of a branch with a subtraction in it compilers make no vectors.
    const uint32_t is_subnormal = -static_cast<uint32_t>(magnitude < 1u << 23);
    const uint32_t value = (subnormal & is_subnormal) | (normal & ~is_subnormal);
    return std::bit_cast<float>(value | (bits & 0x8000u) << 16);
  }
};

typedef uint16_t HalfVec __attribute__((vector_size(16), aligned(2), may_alias));

// source[c * stride + r] to target[r * kTileColumns + c], r and c from 0 to 7.
void transpose_block(BFloat16* target, const BFloat16* source, int64_t stride) {
  HalfVec rows[8], next[8];
  for (int c = 0; c < 8; ++c) rows[c] = *reinterpret_cast<const HalfVec*>(source + c * stride);
#pragma GCC unroll 3
  for (int round = 0; round < 3; ++round) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const HalfVec a = rows[i], b = rows[i + 4];
      next[2 * i] = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
      next[2 * i + 1] = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
    }
    for (int i = 0; i < 8; ++i) rows[i] = next[i];
  }
  for (int r = 0; r < 8; ++r) *reinterpret_cast<HalfVec*>(target + r * kTileColumns) = rows[r];
}

// Returns whether all of the results are finite.
template <class Source, class Target>
bool convert(Target* __restrict__ target, const Source* __restrict__ source, int64_t n,
             float scaling) {
  int32_t num_infinite = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = std::bit_cast<uint32_t>(source[i].to_float() * scaling);
    target[i] = Target::round(bits);
    num_infinite |= static_cast<int32_t>(bits & 0x7fffffff) >= Target::kFirstInfinite;
  }
  return num_infinite == 0;
}

template <class Target>
struct Packer {
  const PackImage& image;
  const PackMatrix& matrix;
  int64_t column_tiles = (matrix.columns + kTileColumns - 1) / kTileColumns;

  // Ranks 8i.. and columns 64j.. of the matrix.
  Target* tile(int64_t i, int64_t j) const {
    const int64_t number = matrix.first_tile + i * column_tiles + j;
    const int64_t page = number / image.tiles_per_page(), rest = number % image.tiles_per_page();
    return reinterpret_cast<Target*>(image.pages + page * image.page_bytes +
                                     rest * image.tile_bytes());
  }

  int64_t num_columns(int64_t j) const {
    return std::min<int64_t>(matrix.columns - j * kTileColumns, kTileColumns);
  }

  template <class Source>
  bool pack_a() const {
    bool is_finite = true;
    const Source* source = static_cast<const Source*>(matrix.data);
    for (int64_t rank = 0; rank < matrix.rank; rank += kTileRanks) {
      const int64_t num_ranks = std::min<int64_t>(matrix.rank - rank, kTileRanks);
      for (int64_t j = 0; j < column_tiles; ++j) {
        Target* target = tile(rank / kTileRanks, j);
        const int64_t n = num_columns(j);
        if (num_ranks < kTileRanks || n < kTileColumns) std::memset(target, 0, image.tile_bytes());
        for (int64_t r = 0; r < num_ranks; ++r) {
          const Source* row = source + (rank + r) * matrix.row_stride + j * kTileColumns;
          is_finite &= convert(target + r * kTileColumns, row, n, matrix.scaling);
        }
      }
    }
    return is_finite;
  }

  template <class Source>
  bool pack_b() const {
    bool is_finite = true;
    Target chunk[kTileColumns * kChunkRanks];
    for (int64_t j = 0; j < column_tiles; ++j) {
      const int64_t n = num_columns(j);
      const Source* rows =
          static_cast<const Source*>(matrix.data) + j * kTileColumns * matrix.row_stride;
      for (int64_t rank = 0; rank < matrix.rank; rank += kChunkRanks) {
        const int64_t width = std::min(matrix.rank - rank, kChunkRanks);
        if (width == matrix.row_stride) {
          is_finite &= convert(chunk, rows, n * width, matrix.scaling);
        } else {
          for (int64_t c = 0; c < n; ++c) {
            const Source* row = rows + c * matrix.row_stride + rank;
            is_finite &= convert(chunk + c * width, row, width, matrix.scaling);
          }
        }
        for (int64_t r = 0; r < width; r += kTileRanks) {
          const int64_t num_ranks = std::min<int64_t>(width - r, kTileRanks);
          transpose(tile((rank + r) / kTileRanks, j), chunk + r, width, num_ranks, n);
        }
      }
    }
    return is_finite;
  }

  // chunk[c * width + r] to tile[r][c].
  void transpose(Target* target, const Target* chunk, int64_t width, int64_t num_ranks,
                 int64_t num_columns) const {
    if (num_ranks < kTileRanks || num_columns < kTileColumns) {
      std::memset(target, 0, image.tile_bytes());
    } else if constexpr (std::is_same_v<Target, BFloat16>) {
      for (int64_t c = 0; c < kTileColumns; c += 8) {
        transpose_block(target + c, chunk + c * width, width);
      }
      return;
    }
    for (int64_t r = 0; r < num_ranks; ++r) {
      for (int64_t c = 0; c < num_columns; ++c) {
        target[r * kTileColumns + c] = chunk[c * width + r];
      }
    }
  }

  template <class Source>
  bool pack() const {
    return matrix.is_transposed ? pack_b<Source>() : pack_a<Source>();
  }
};

template <class Target>
bool pack_matrix(const PackImage& image, const PackMatrix& matrix) {
  const Packer<Target> packer{image, matrix};
  switch (matrix.type) {
    case SourceType::kFloat32:
      return packer.template pack<Float32>();
    case SourceType::kFloat16:
      return packer.template pack<Float16>();
    default:
      return packer.template pack<BFloat16>();
  }
}

// Tiles begin..end, and the tails of the pages that end among them.
void clear_tiles(const PackImage& image, int64_t begin, int64_t end) {
  const auto offset = [&](int64_t tile) {
    return tile / image.tiles_per_page() * image.page_bytes +
           tile % image.tiles_per_page() * image.tile_bytes();
  };
  std::memset(image.pages + offset(begin), 0, offset(end) - offset(begin));
}

void clear_page_tails(const PackImage& image) {
  const int64_t used = image.tiles_per_page() * image.tile_bytes();
  for (int64_t page = 0; page < image.num_pages; ++page) {
    std::memset(image.pages + page * image.page_bytes + used, 0, image.page_bytes - used);
  }
}

}  // namespace

int64_t pack_matrices(const PackImage& image, const std::vector<PackMatrix>& matrices) {
  const bool is_bfloat16 = image.dtype == DType::kBFloat16;
  int64_t next_tile = 0;
  for (size_t i = 0; i < matrices.size(); ++i) {
    const PackMatrix& matrix = matrices[i];
    clear_tiles(image, next_tile, matrix.first_tile);
    next_tile = matrix.first_tile + matrix.num_tiles();
    const bool is_finite =
        is_bfloat16 ? pack_matrix<BFloat16>(image, matrix) : pack_matrix<Float32>(image, matrix);
    if (!is_finite) return i;
  }
  clear_tiles(image, next_tile, image.num_pages * image.tiles_per_page());
  clear_page_tails(image);
  return -1;
}

}  // namespace loraplex
