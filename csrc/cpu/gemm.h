// A small matrix product for operands that are in the cache: C[rows, columns] = A B, or C * scale +
// A B.
#pragma once

#include "simd.h"

namespace loraplex::LORAPLEX_ISA {
namespace {

// What fits the registers: kBlockRows x kBlockVectors sums, one row of B and one element of A.
constexpr int kBlockRows = 6;
constexpr int kBlockVectors = kManyRegisters ? 4 : 2;

// A is [rows, depth] units, B [depth, columns] units, C [rows, columns] floats; lda, ldb and ldc
// are the strides of their rows. With `scale`, row i of C is first multiplied by scale[i].
struct Gemm {
  const float* a;
  int64_t lda;
  const float* b;
  int64_t ldb;
  float* c;
  int64_t ldc;
  int64_t depth;
  const float* scale;
};

template <class Unit, int R, int V>
void gemm_block(const Gemm& gemm) {
  const Gemm g = gemm;  // a copy, which the stores below cannot change
  Vec sums[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      sums[r][v] = g.scale ? load(g.c + r * g.ldc + v * kLanes) * g.scale[r] : Vec{};
    }
  }
  for (int64_t k = 0; k < g.depth; ++k) {
    Vec b[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      b[v] = load(g.b + k * g.ldb + v * kLanes);
      keep(b[v]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec a = broadcast(g.a[r * g.lda + k]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sums[r][v] = Unit::dot(sums[r][v], a, b[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(g.c + r * g.ldc + v * kLanes, sums[r][v]);
  }
}

template <class Unit, int R, int V>
void gemm_at_most(const Gemm& g, int64_t rows, int64_t vectors) {
  if (rows < R) {
    if constexpr (R > 1) gemm_at_most<Unit, R - 1, V>(g, rows, vectors);
  } else if (vectors < V) {
    if constexpr (V > 1) gemm_at_most<Unit, R, V - 1>(g, rows, vectors);
  } else {
    gemm_block<Unit, R, V>(g);
  }
}

// Columns are worked on in whole vectors.
template <class Unit>
void gemm(const Gemm& g, int64_t rows, int64_t columns) {
  const int64_t vectors = ceil_div(columns, kLanes);
  for (int64_t v = 0; v < vectors; v += kBlockVectors) {
    for (int64_t r = 0; r < rows; r += kBlockRows) {
      Gemm block = g;
      block.a += r * g.lda;
      block.b += v * kLanes;
      block.c += r * g.ldc + v * kLanes;
      if (g.scale) block.scale += r;
      gemm_at_most<Unit, kBlockRows, kBlockVectors>(block, min(rows - r, kBlockRows),
                                                    min(vectors - v, kBlockVectors));
    }
  }
}

}  // namespace
}  // namespace loraplex::LORAPLEX_ISA
