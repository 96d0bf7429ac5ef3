// Sampling on CUDA devices: a block of 1024 threads a row. What is done is in ../sampling.h.
//
// What 256 rows of 128256 bfloat16 should take on an H100: 132 multiprocessors, each of which has
// two rows, one after the other; about 50 instructions weigh a logit, 10 look at one, and 128 a
// cycle are done at 1.7 GHz. Counted, not measured:
//
//   a pass that looks: 128256 * 10 / 128 / 1.7 GHz = 6 us a row, 12 us for all. The logits, 66 MB,
//     come from the L2 cache or memory at 3 to 5 TB/s, in 13 to 22 us: that bounds it, say 20 us.
//   a pass that weighs: 30 us a row, 60 us for all; with a histogram, an addition in shared memory
//     for each logit that counts, about 80 us.
//
//   greedy:       the maximum, the tokens that have it                          2 * 20 =  40 us
//   temperature:  the maximum, the tiles' weights                              20 + 60 =  80 us
//   top_k:        the maximum; counts, and those of a bin; the weights of few, and those of a bin;
//                 the tokens alike                                              6 * 20 = 120 us
//   top_p:        the maximum; all weights, and those of two bins; the tokens alike
//                                                                          4 * 20 + 80 = 160 us
//
// float32 takes twice the bytes, and three looks for two. The worst are rows of one value: a warp's
// additions then are to one address, one after the other, which is 150 us for a pass over a row.
#include "../sampling.h"
#include "device.cuh"
#include "kernels.h"

namespace loraplex::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kFullWarp = ~0u;
static_assert(kBins == 2 * kThreads);

struct Shared {
  uint64_t high[kBins], low[kBins];
  uint64_t of_warp[kWarps];
};

// Logits are read by 16 bytes at multiples of 16 bytes: from where the row begins, or up to
// kWidth - 1 elements before it. These and those behind the row are in the row's own 16 bytes, and
// are not looked at.
template <class T>
class ThreadBlock {
 public:
  static constexpr int kKeyBits = 8 * sizeof(T);

  __device__ ThreadBlock(Shared& shared, const T* logits, int size)
      : shared_(shared),
        before_(reinterpret_cast<uintptr_t>(logits) % 16 / sizeof(T)),
        size_(size),
        begin_(logits - before_) {}

  __device__ int size() const { return size_; }
  __device__ int thread() const { return threadIdx.x; }
  __device__ int threads() const { return kThreads; }
  __device__ void sync() const { __syncthreads(); }
  __device__ float logit(int i) const { return to_float(begin_[before_ + i]); }
  __device__ int tile_begin(int tile) const { return tile * kTile - before_; }
  __device__ uint64_t* high() { return shared_.high; }
  __device__ uint64_t* low() { return shared_.low; }

  template <class Use>
  __device__ __forceinline__ void each(const Use& use) const {
    const int end = before_ + size_;
    int i = threadIdx.x * kWidth;
    Vec<T, kWidth> next{};
    if (i < end) next = load<kWidth>(begin_ + i);
    while (i < end) {
      const Vec<T, kWidth> vector = next;
      const int at = i;
      i += kThreads * kWidth;
      if (i < end) next = load<kWidth>(begin_ + i);
      use_inside(vector, at, use);
    }
  }

  __device__ float largest() const {
    float largest = -INFINITY;
    each([&](float x) { largest = fmaxf(largest, x); });
    for (int offset = 16; offset > 0; offset /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, offset));
    }
    float* of_warp = reinterpret_cast<float*>(shared_.of_warp);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = largest;
    __syncthreads();
    for (int warp = 0; warp < kWarps; ++warp) largest = fmaxf(largest, of_warp[warp]);
    return largest;
  }

  template <class Weigh>
  __device__ __forceinline__ uint64_t sum_tiles(const Weigh& weigh, uint64_t* bins) const {
    const int lane = threadIdx.x % 32, end = before_ + size_;
    __syncthreads();
    for (int tile = threadIdx.x / 32; tile < kBins; tile += kWarps) {
      uint64_t sum = 0;
      for (int part = 0; part < kTile; part += 32 * kWidth) {
        const int i = tile * kTile + part + lane * kWidth;
        if (i >= end) continue;
        use_inside(load<kWidth>(begin_ + i), i, [&](float x) { sum += weigh(x); });
      }
      if (tile * kTile < end) {
        for (int offset = 16; offset > 0; offset /= 2) {
          sum += __shfl_xor_sync(kFullWarp, sum, offset);
        }
      }
      if (lane == 0) bins[tile] = sum;
    }
    return accumulate(bins);
  }

  // In two halves: shared memory adds 32 bits at a time, 64 only by trying again and again. The
  // upper half has its carries in the end, whatever the order was.
  __device__ __forceinline__ void add(uint64_t* bins, int i, uint64_t weight) const {
    unsigned* halves = reinterpret_cast<unsigned*>(bins + i);
    const unsigned low = static_cast<unsigned>(weight);
    unsigned high = static_cast<unsigned>(weight >> 32);
    if (atomicAdd(halves, low) + low < low) ++high;
    if (high > 0) atomicAdd(halves + 1, high);
  }

  // Two bins a thread.
  __device__ uint64_t accumulate(uint64_t* bins) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    __syncthreads();
    const uint64_t first = bins[2 * threadIdx.x], both = first + bins[2 * threadIdx.x + 1];
    const uint64_t in_warp = sum_up_to(both, lane);
    if (lane == 31) shared_.of_warp[warp] = in_warp;
    __syncthreads();
    const uint64_t of_warps = sum_up_to(shared_.of_warp[lane], lane);
    const uint64_t before_warp = __shfl_sync(kFullWarp, of_warps, (warp + 31) % 32);
    const uint64_t sum = in_warp + (warp > 0 ? before_warp : 0);
    bins[2 * threadIdx.x] = sum - both + first;
    bins[2 * threadIdx.x + 1] = sum;
    __syncthreads();
    return bins[kBins - 1];
  }

 private:
  static constexpr int kWidth = 16 / sizeof(T);

  template <class Use>
  __device__ __forceinline__ void use_inside(const Vec<T, kWidth>& vector, int at,
                                             const Use& use) const {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      if (static_cast<unsigned>(at + k - before_) < static_cast<unsigned>(size_)) {
        use(to_float(vector.lanes[k]));
      }
    }
  }

  // The sum of this lane's x and those of the lanes before it.
  static __device__ uint64_t sum_up_to(uint64_t x, int lane) {
    for (int offset = 1; offset < 32; offset *= 2) {
      const uint64_t other = __shfl_up_sync(kFullWarp, x, offset);
      if (lane >= offset) x += other;
    }
    return x;
  }

  Shared& shared_;
  int before_, size_;
  const T* begin_;
};

template <class T>
__global__ void __launch_bounds__(kThreads) sample_kernel(const __grid_constant__ SampleParams p) {
  __shared__ Shared shared;
  wait_for_previous_kernel();
  const int i = blockIdx.x;
  const T* logits = static_cast<const T*>(p.logits) + i * p.logits_stride;
  ThreadBlock<T> block(shared, logits, p.vocab_size);
  const SampleRow row{p.temperature[i], p.top_k[i], p.top_p[i], p.min_p[i], p.uniform[i]};
  const int32_t token_id = choose(block, row);
  if (threadIdx.x == 0) p.token_ids[i] = token_id;
}

}  // namespace

const char* sample(const SampleParams& p, void* stream) {
  if (p.num_rows == 0) return nullptr;
  const dim3 grid(p.num_rows);
  if (p.dtype == DType::kBFloat16)
    launch(sample_kernel<BFloat16>, grid, kThreads, stream, p);
  else
    launch(sample_kernel<float>, grid, kThreads, stream, p);
  return last_error();
}

}  // namespace loraplex::cuda
