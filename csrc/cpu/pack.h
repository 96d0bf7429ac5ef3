// Writes adapters' matrices into images (lora/image.py defines them). Portable code, compiled once.
#pragma once

#include <vector>

#include "kernels.h"

namespace loraplex {

enum class SourceType { kFloat32, kFloat16, kBFloat16 };

// A matrix as a file holds it: A [rank, columns], or B [columns, rank], which is_transposed.
struct PackMatrix {
  SourceType type;
  const void* data;
  int64_t row_stride;
  int64_t rank, columns;
  bool is_transposed;
  float scaling;
  int64_t first_tile;

  int64_t num_tiles() const {
    return (rank + kTileRanks - 1) / kTileRanks * ((columns + kTileColumns - 1) / kTileColumns);
  }
};

struct PackImage {
  DType dtype;
  uint8_t* pages;
  int64_t num_pages, page_bytes;

  int64_t tile_bytes() const {
    return kTileRanks * kTileColumns * (dtype == DType::kBFloat16 ? 2 : 4);
  }
  int64_t tiles_per_page() const { return page_bytes / tile_bytes(); }
};

// Writes every byte of the image: what belongs to no matrix becomes 0. The matrices are in the
// order of their tiles. Returns -1, or the index of the first matrix with a value that is not
// finite in the image; what comes after it is not written then.
int64_t pack_matrices(const PackImage& image, const std::vector<PackMatrix>& matrices);

}  // namespace loraplex
