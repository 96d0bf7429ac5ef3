// float8 e4m3fn, one byte an element: a sign, 4 bits of exponent and 3 of mantissa, no infinities,
// NaN where all 7 bits of the size are set. Only the KV cache has it: it is read as float32, or as
// bfloat16 for dot products of that, and written rounded.
#pragma once

#include "simd.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace loraplex::LORAPLEX_ISA {
namespace {

typedef uint8_t ByteVec __attribute__((vector_size(kLanes)));
typedef uint8_t ByteVecInMemory __attribute__((vector_size(kLanes), aligned(1), may_alias));

struct Float8 {
  uint8_t bits;
};

// Each element's bits in a lane of its own. For the generic conversion GCC takes many more
// instructions.
LORAPLEX_INLINE IntVec load_bits(const Float8* p) {
#if defined(__AVX512F__)
  // (The mask of all lanes is for GCC 12, which warns of the operation without it.)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (IntVec)_mm512_maskz_cvtepu8_epi32(0xffff, bytes);
#elif defined(__AVX2__)
  return (IntVec)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  const ByteVec bytes = *reinterpret_cast<const ByteVecInMemory*>(p);
  return __builtin_convertvector(__builtin_convertvector(bytes, HalfVec), IntVec);
#endif
}

LORAPLEX_INLINE Vec load(const Float8* p) {
  const IntVec bits = load_bits(p), size = bits & 0x7f;
  // The bias of the exponent is 7, of a float's it is 127.
  const IntVec normal = (size << 20) + (120 << 23);
  const Vec subnormal = __builtin_convertvector(size, Vec) * 0x1p-9f;
  const IntVec number = size < 8 ? (IntVec)subnormal : normal;
  const IntVec nan = (size == 0x7f) & 0x7fc00000;
  return (Vec)(number | nan | (bits & 0x80) << 24);
}

#ifdef __AVX512BF16__

// With sign and size put where bfloat16 has them, a number lacks this in its exponent, whose bias
// is 127 and not 7. Subnormal numbers and NaN lack what is in the table, by the low 5 bits of
// their size.
constexpr uint16_t kBias = 120 << 7;
alignas(64) constexpr uint16_t kSpecialBias[32] = {
    0, 0x3af0, 0x3b60, 0x3b90, 0x3bc0, 0x3bd0, 0x3be0, 0x3bf0, 0, 0, 0, 0, 0, 0, 0, 0,
    0, 0,      0,      0,      0,      0,      0,      0,      0, 0, 0, 0, 0, 0, 0, 0x77d0};

// Elements as bfloat16, two in each lane.
LORAPLEX_INLINE Vec load_pairs(const Float8* p) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const Halves bits = (Halves)_mm512_cvtepi8_epi16(bytes);
  const __m512i table = _mm512_load_si512(kSpecialBias);
  const Halves special = (Halves)_mm512_permutexvar_epi16((__m512i)bits, table);
  // Less 8, subnormals wrap around to what is greater than all numbers, as NaN is.
  const Halves rank = (bits << 9) - (8 << 9);
  const Halves bias = rank > (0x76 << 9) ? special : kBias;
  return (Vec)((bits << 4 & 0x87f0) + bias);
}

#endif

// Rounds to nearest and ties to even; what is beyond the greatest number becomes that.
LORAPLEX_INLINE void store(Float8* p, Vec x) {
  constexpr uint32_t kGreatest = 0x43e00000;        // 448
  constexpr uint32_t kSmallestNormal = 0x3c800000;  // 2 ** -6
  constexpr float kRound = 0x1p14f;  // adding it leaves multiples of 2 ** -9 in the low bits
  const UintVec bits = (UintVec)x, size = bits & 0x7fffffff;
  const UintVec finite = size < kGreatest ? size : kGreatest;
  const UintVec normal = ((finite + 0x7ffff + ((finite >> 20) & 1)) >> 20) - (120 << 3);
  const UintVec subnormal = (UintVec)((Vec)finite + kRound) - (UintVec)broadcast(kRound);
  const UintVec number = finite < kSmallestNormal ? subnormal : normal;
  const UintVec result = (size > 0x7f800000 ? number | 0x7f : number) | bits >> 31 << 7;
  *reinterpret_cast<ByteVecInMemory*>(p) =
      __builtin_convertvector(__builtin_convertvector(result, HalfVec), ByteVec);
}

}  // namespace
}  // namespace loraplex::LORAPLEX_ISA
