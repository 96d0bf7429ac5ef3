// Sampling on the CPU: one thread a row.
#include "../sampling.h"

#include "kernels.h"
#include "simd.h"

namespace loraplex::LORAPLEX_ISA {
namespace {

LORAPLEX_INLINE float to_float(float x) { return x; }
LORAPLEX_INLINE float to_float(BFloat16 x) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16);
}

template <class T>
class OneThread {
 public:
  static constexpr int kKeyBits = 8 * sizeof(T);

  OneThread(const T* logits, int size) : logits_(logits), size_(size) {}

  int size() const { return size_; }
  int thread() const { return 0; }
  int threads() const { return 1; }
  void sync() const {}
  float logit(int i) const { return to_float(logits_[i]); }
  int tile_begin(int tile) const { return tile * kTile; }
  void add(uint64_t* bins, int i, uint64_t weight) const { bins[i] += weight; }
  uint64_t* high() { return high_; }
  uint64_t* low() { return low_; }

  float largest() const {
    float largest = -__builtin_inff();
    for (int i = 0; i < size_; ++i) largest = logit(i) > largest ? logit(i) : largest;
    return largest;
  }

  template <class Use>
  LORAPLEX_INLINE void each(const Use& use) const {
    for (int i = 0; i < size_; ++i) use(logit(i));
  }

  template <class Weigh>
  LORAPLEX_INLINE uint64_t sum_tiles(const Weigh& weigh, uint64_t* bins) const {
    for (int tile = 0; tile < kBins; ++tile) {
      const int end = static_cast<int>(min(tile_begin(tile + 1), size_));
      uint64_t sum = 0;
      for (int i = tile_begin(tile); i < end; ++i) sum += weigh(logit(i));
      bins[tile] = sum;
    }
    return accumulate(bins);
  }

  uint64_t accumulate(uint64_t* bins) const {
    for (int i = 1; i < kBins; ++i) bins[i] += bins[i - 1];
    return bins[kBins - 1];
  }

 private:
  const T* logits_;
  int size_;
  uint64_t high_[kBins], low_[kBins];
};

}  // namespace

void sample(const SampleParams& p) {
  dispatch(p.dtype, [&]<class T>(T*) {
#pragma omp parallel for schedule(dynamic)
    for (int64_t i = 0; i < p.num_rows; ++i) {
      OneThread<T> block(static_cast<const T*>(p.logits) + i * p.logits_stride, p.vocab_size);
      const SampleRow row{p.temperature[i], p.top_k[i], p.top_p[i], p.min_p[i], p.uniform[i]};
      p.token_ids[i] = choose(block, row);
    }
  });
}

}  // namespace loraplex::LORAPLEX_ISA
