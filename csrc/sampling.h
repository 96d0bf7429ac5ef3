// How a row of logits becomes a token: the algorithm, for one thread of the CPU or a block of them
// on a GPU. Each gives it a Block, which knows its threads and how to go through the row:
//
//   kKeyBits                bits that tell the logits' values apart, 16 or 32
//   size()                  of the row
//   thread(), threads()     this thread, of how many
//   sync()                  wait for the others
//   logit(i)                0 <= i < size()
//   largest()               of the row, but for NaN; the same for all threads
//   each(use)               use(x) for each logit x, in any order
//   high(), low()           two arrays of kBins bins that all threads share
//   add(bins, i, weight)    bins[i] += weight, while other threads do so as well
//   accumulate(bins)        make each bin the sum of those up to it; returns the last
//   tile_begin(t)           index of the first of kTile logits, not all of them of the row
//   sum_tiles(weigh, bins)  bins[t] = sum of weigh(x) over tile t, and accumulate(bins)
//
// A token's weight is exp((logit - largest) / temperature) in fixed point, and all arithmetic on
// weights is of integers. So a sum does not depend on the order of its terms, and a token neither
// on the number of threads nor on the device: only two quotients and a difference of floats, each
// rounded by IEEE's rules, come before.
//
// Both ways to go through a row, by rank and by token id, narrow down by a histogram: the mass of
// each of many bins, then the bin at which the cumulated mass passes the target, then that bin's
// own tokens.
//
// Everything here is in an anonymous namespace, because it is compiled with several instruction
// sets into one library.
#pragma once

#include <math.h>

#include <cstdint>

#include "cpu/kernels.h"

#ifdef __CUDACC__
#define LORAPLEX_SAMPLING __device__ __forceinline__
#else
#define LORAPLEX_SAMPLING inline __attribute__((always_inline))
#endif

namespace loraplex {
namespace {

constexpr int kBinBits = 11;
constexpr int kBins = 1 << kBinBits;
constexpr int kTile = 256;
// A tile may begin up to 7 logits before the row: see tile_begin().
static_assert(kMaxVocabSize + 7 <= kBins * kTile);
// Weights are multiples of 2^-44, so that those of 2^19 tokens add up to 2^63 at most, and that
// what is too small to count is 2^-25 of the mass at most.
constexpr int kWeightBits = 44;
static_assert(kMaxVocabSize <= 1 << (63 - kWeightBits));
// Logarithm of the least weight.
constexpr float kLeastExponent = -30.498474f;

// How to choose of one row.
struct SampleRow {
  float temperature;
  int32_t top_k;
  double top_p, min_p, uniform;
};

// a * b / 2^32 of numbers below 2^32.
LORAPLEX_SAMPLING uint64_t multiply_high(uint64_t a, uint64_t b) {
#ifdef __CUDACC__
  return __umulhi(static_cast<uint32_t>(a), static_cast<uint32_t>(b));
#else
  return a * b >> 32;
#endif
}

// exp(x) * 2^44 for -32 < x <= 0, with a relative error of 3e-8.
LORAPLEX_SAMPLING uint64_t fixed_exp(float x) {
  constexpr uint64_t kLog2e = 0xB8AA3B29;  // * 2^31
  // 2^-f for 0 <= f < 1 is 1 - f * (c0 - f * (c1 - ...)): coefficients, * 2^32.
  constexpr uint32_t kCoefficients[] = {0x00078809, 0x0054A612, 0x0274F388,
                                        0x0E353290, 0x3D7F7506, 0xB17217DF};
  const uint64_t power = static_cast<uint32_t>(static_cast<int32_t>(x * -0x1p26f)) * kLog2e;
  const uint64_t f = power >> 25 & 0xffffffff;
  uint64_t sum = 0;
#ifdef __CUDACC__
#pragma unroll
#endif
  for (uint32_t coefficient : kCoefficients) sum = coefficient - multiply_high(f, sum);
  return (((uint64_t{1} << 32) - multiply_high(f, sum)) << (kWeightBits - 32)) >> (power >> 57);
}

// Ordered like the values, the largest first and NaN last. -0 is +0.
LORAPLEX_SAMPLING uint32_t rank_key(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x + 0.0f);
  if (x != x) return ~uint32_t{0};
  return bits >> 31 ? bits : bits ^ 0x7fffffff;
}

// The value of the key_bits upper bits of a key; the others are 0 in the value.
LORAPLEX_SAMPLING float value_of(uint32_t upper_bits, int key_bits) {
  const int shift = 32 - key_bits;
  const uint32_t key = upper_bits << shift;
  return __builtin_bit_cast(float, (key >> 31 ? key : key ^ 0x7fffffff) >> shift << shift);
}

// The least float of at least this number, which is 0 or less.
LORAPLEX_SAMPLING float round_up(double x) {
  const float rounded = static_cast<float>(x);
  return rounded < x ? nextafterf(rounded, 0.0f) : rounded;
}

// The first of the cumulated bins to pass the target; kBins if none does.
LORAPLEX_SAMPLING int search(const uint64_t* bins, uint64_t target) {
  int begin = 0;
  for (int width = kBins / 2; width > 0; width /= 2) {
    if (bins[begin + width - 1] <= target) begin += width;
  }
  return begin + (bins[begin] <= target);
}

// What of a total lies below this share of it.
LORAPLEX_SAMPLING uint64_t share(double part, uint64_t total) {
  const uint64_t target = static_cast<uint64_t>(part * static_cast<double>(total));
  return target < total ? target : total - 1;
}

struct Weight {
  float temperature, scaled_largest, least;

  LORAPLEX_SAMPLING Weight(const SampleRow& row, float largest)
      : temperature(row.temperature), scaled_largest(largest / row.temperature) {
    const float least_kept = round_up(log(row.min_p));
    least = least_kept > kLeastExponent ? least_kept : kLeastExponent;
  }

  LORAPLEX_SAMPLING uint64_t operator()(float logit) const {
    const float x = logit / temperature - scaled_largest;
    return x >= least ? fixed_exp(x) : 0;
  }
};

struct IsEqual {
  float value;

  LORAPLEX_SAMPLING uint64_t operator()(float logit) const { return logit == value; }
};

// A value in the ranking: what is cumulated before it, and over all tokens that have it.
struct Place {
  float value;
  uint32_t key;
  uint64_t before, own;
};

template <class Block>
LORAPLEX_SAMPLING uint32_t key_of(float x) {
  return rank_key(x) >> (32 - Block::kKeyBits);
}

// The weights of the keys that begin with this prefix, by their next `bits` bits, which are
// followed by `shift` others; cumulated. Returns their sum.
template <class Block, class Weigh>
LORAPLEX_SAMPLING uint64_t rank(Block& block, uint64_t* bins, uint32_t prefix, int bits, int shift,
                                const Weigh& weigh) {
  block.sync();
  for (int i = block.thread(); i < kBins; i += block.threads()) bins[i] = 0;
  block.sync();
  block.each([&](float x) {
    const uint32_t key = key_of<Block>(x);
    if (key >> shift >> bits != prefix) return;
    const uint64_t weight = weigh(x);
    if (weight > 0) block.add(bins, key >> shift & ((1u << bits) - 1), weight);
  });
  return block.accumulate(bins);
}

// The whole row ranked by the first bits of its keys, in the high bins.
template <class Block, class Weigh>
LORAPLEX_SAMPLING uint64_t rank(Block& block, const Weigh& weigh) {
  return rank(block, block.high(), 0, kBinBits, Block::kKeyBits - kBinBits, weigh);
}

// After rank(): the value at which the weights, cumulated in the order of the ranking, pass the
// target, which is less than their sum.
template <class Block, class Weigh>
LORAPLEX_SAMPLING Place find_ranked(Block& block, uint64_t target, const Weigh& weigh) {
  const uint64_t* bins = block.high();
  Place place{};
  for (int bits = kBinBits, shift = Block::kKeyBits - kBinBits;;) {
    const int bin = search(bins, target - place.before);
    const uint64_t before = bin > 0 ? bins[bin - 1] : 0;
    place.key = place.key << bits | bin;
    place.before += before;
    place.own = bins[bin] - before;
    if (shift == 0) break;
    bits = shift < kBinBits ? shift : kBinBits;
    shift -= bits;
    rank(block, block.low(), place.key, bits, shift, weigh);
    bins = block.low();
  }
  place.value = value_of(place.key, Block::kKeyBits);
  return place;
}

// The token at which the weights, cumulated in the order of token ids, pass the target; the tiles'
// sums are cumulated in the high bins.
template <class Block, class Weigh>
LORAPLEX_SAMPLING int32_t find_in_tiles(Block& block, uint64_t target, const Weigh& weigh) {
  const uint64_t* tiles = block.high();
  const int tile = search(tiles, target);
  const int begin = block.tile_begin(tile);
  uint64_t* bins = block.low();
  block.sync();
  for (int i = block.thread(); i < kBins; i += block.threads()) {
    const bool is_inside = i < kTile && begin + i >= 0 && begin + i < block.size();
    bins[i] = is_inside ? weigh(block.logit(begin + i)) : 0;
  }
  block.accumulate(bins);
  const int token_id = begin + search(bins, target - (tile > 0 ? tiles[tile - 1] : 0));
  // Beyond the row only if no weight passes the target: all is NaN.
  return token_id < block.size() ? token_id : 0;
}

// The token number `index` of those with this logit.
struct Choice {
  float value;
  uint64_t index;
};

// Of a row with top_k, top_p or min_p. As it is, if there is no mass.
template <class Block>
LORAPLEX_SAMPLING void choose_ranked(Block& block, const SampleRow& row, const Weight& weigh,
                                     Choice& choice) {
  uint32_t last_key = ~uint32_t{0};
  uint64_t surplus = 0;  // of the last value's tokens, those that top_k leaves out
  if (row.top_k < block.size()) {
    const auto one = [](float) { return uint64_t{1}; };
    rank(block, one);
    const Place last = find_ranked(block, row.top_k - 1, one);
    last_key = last.key;
    surplus = (last.before + last.own - row.top_k) * weigh(last.value);
  }
  const auto weigh_kept = [&](float x) {
    return key_of<Block>(x) <= last_key ? weigh(x) : uint64_t{0};
  };
  uint64_t mass = rank(block, weigh_kept) - surplus;
  if (mass == 0) return;
  if (row.top_p < 1) {
    // The last token that is kept is the first that brings the mass to top_p's share.
    const double needed = ceil(row.top_p * static_cast<double>(mass));
    const uint64_t below = needed > 1 ? static_cast<uint64_t>(needed) - 1 : 0;
    const uint64_t target = below < mass ? below : mass - 1;
    const Place last = find_ranked(block, target, weigh_kept);
    const uint64_t weight = weigh(last.value);
    mass = last.before + ((target - last.before) / weight + 1) * weight;
  }
  const uint64_t target = share(row.uniform, mass);
  const Place place = find_ranked(block, target, weigh_kept);
  choice = {place.value, (target - place.before) / weigh(place.value)};
}

// The token of a row; its definition is in engine/runner/sampler.py. A row without a distribution,
// because of infinities or NaN, gets its largest logit's token.
template <class Block>
LORAPLEX_SAMPLING int32_t choose(Block& block, const SampleRow& row) {
  const float largest = block.largest();
  Choice choice{largest, 0};
  if (row.temperature > 0) {
    const Weight weigh(row, largest);
    if (row.top_k < block.size() || row.top_p < 1 || row.min_p > 0) {
      choose_ranked(block, row, weigh, choice);
    } else {
      const uint64_t mass = block.sum_tiles(weigh, block.high());
      if (mass > 0) return find_in_tiles(block, share(row.uniform, mass), weigh);
    }
  }
  block.sum_tiles(IsEqual{choice.value}, block.high());
  return find_in_tiles(block, choice.index, IsEqual{choice.value});
}

}  // namespace
}  // namespace loraplex
