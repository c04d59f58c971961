// Squares of values transposed in registers.
//
// Included by files compiled once per instruction set: everything lives in msvq::MSVQ_ISA.
#pragma once
#include "simd.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace msvq {
namespace MSVQ_ISA {

// The lower and upper halves of two vectors, lane by lane in turn.
#define MSVQ_PAIRS_2 0, 2
#define MSVQ_PAIRS_4 0, 4, 1, 5
#define MSVQ_PAIRS_8 0, 8, 1, 9, 2, 10, 3, 11
#define MSVQ_UPPER_2 1, 3
#define MSVQ_UPPER_4 2, 6, 3, 7
#define MSVQ_UPPER_8 4, 12, 5, 13, 6, 14, 7, 15
#ifdef __clang__
#define MSVQ_SHUFFLE(Index, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MSVQ_SHUFFLE(Index, a, b, ...) __builtin_shuffle(a, b, Index{__VA_ARGS__})
#endif
#define MSVQ_INTERLEAVE(V, Index, n)                                                   \
  inline V lower_lanes(V a, V b) { return MSVQ_SHUFFLE(Index, a, b, MSVQ_PAIRS_##n); } \
  inline V upper_lanes(V a, V b) { return MSVQ_SHUFFLE(Index, a, b, MSVQ_UPPER_##n); }
#if defined(__AVX512F__)
MSVQ_INTERLEAVE(vdouble, vlong, 8)
#elif defined(__AVX2__)
MSVQ_INTERLEAVE(vdouble, vlong, 4)
#else
MSVQ_INTERLEAVE(vfloat, vint, 4)
MSVQ_INTERLEAVE(vdouble, vlong, 2)
#endif

// Transposes n x n values: log2(n) perfect shuffles of the rows.
template <class V, int n>
inline void transpose(V (&v)[n]) {
#pragma GCC unroll 4
  for (int step = 1; step < n; step *= 2) {
    V w[n];
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; ++i) {
      w[2 * i] = lower_lanes(v[i], v[i + n / 2]);
      w[2 * i + 1] = upper_lanes(v[i], v[i + n / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) v[i] = w[i];
  }
}

#if defined(__AVX512F__)
// The same with shuffles that need no vector of indices, of 4 x 4 blocks and of the blocks.
inline void transpose(vfloat (&v)[16]) {
  __m512 a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps((__m512)v[i], (__m512)v[i + 1]);
    a[i + 1] = _mm512_unpackhi_ps((__m512)v[i], (__m512)v[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k) {
      const __m512d low = (__m512d)a[i + k], high = (__m512d)a[i + k + 2];
      b[i + 2 * k] = (__m512)_mm512_unpacklo_pd(low, high);
      b[i + 2 * k + 1] = (__m512)_mm512_unpackhi_pd(low, high);
    }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
#pragma GCC unroll 2
    for (int k = 0; k < 16; k += 8) {
      a[i + k] = _mm512_shuffle_f32x4(b[i + k], b[i + k + 4], 0x88);
      a[i + k + 4] = _mm512_shuffle_f32x4(b[i + k], b[i + k + 4], 0xdd);
    }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    v[i] = (vfloat)_mm512_shuffle_f32x4(a[i], a[i + 8], 0x88);
    v[i + 8] = (vfloat)_mm512_shuffle_f32x4(a[i], a[i + 8], 0xdd);
  }
}
#elif defined(__AVX2__)
inline void transpose(vfloat (&v)[8]) {
  __m256 a[8], b[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps((__m256)v[i], (__m256)v[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps((__m256)v[i], (__m256)v[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k) {
      const __m256d low = (__m256d)a[i + k], high = (__m256d)a[i + k + 2];
      b[i + 2 * k] = (__m256)_mm256_unpacklo_pd(low, high);
      b[i + 2 * k + 1] = (__m256)_mm256_unpackhi_pd(low, high);
    }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[i] = (vfloat)_mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    v[i + 4] = (vfloat)_mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
}
#endif

}  // namespace MSVQ_ISA
}  // namespace msvq
