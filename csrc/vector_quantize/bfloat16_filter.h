// The filter's scores from bfloat16 products in float32 (AVX-512-BF16).
//
// Latents and codes are rounded once: half the bytes and twice the rate of float32, and a bound
// that leaves several codes to about one row in six of Gaussian data, to nearly none of trained.
#pragma once
#include "vector_quantize/packed_codes.h"
#include "vector_quantize/scores.h"

#ifdef MSVQ_BFLOAT16

namespace msvq {
namespace MSVQ_ISA {

inline vfloat as_floats(__m512 v) { return reinterpret_cast<const vfloat&>(v); }

// Scores of a panel for kRows rows, whose word of the pair q is x[r * ld + q] or x[q * ld + r].
template <int kRows, bool kByRow>
MSVQ_BFLOAT16_TARGET inline void score_pairs(const uint32_t* x, int64_t ld, const float* error_norm,
                                             const PackedCodes& codes, int64_t p,
                                             vfloat (&score)[kRows][2]) {
  const int64_t count = pairs(codes.width);
  const float* panel = codes.panels + p * kPanel * codes.width;
  const __m512 seed0 = _mm512_loadu_ps(&codes.seeds[p * kPanel]);
  const __m512 seed1 = _mm512_loadu_ps(&codes.seeds[p * kPanel + kLanes]);
  const __m512 norm0 = _mm512_loadu_ps(&codes.norms[p * kPanel]);
  const __m512 norm1 = _mm512_loadu_ps(&codes.norms[p * kPanel + kLanes]);
  __m512 sum[kRows][2];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    const __m512 e = _mm512_set1_ps(error_norm[r]);
    sum[r][0] = _mm512_fmadd_ps(e, norm0, seed0);
    sum[r][1] = _mm512_fmadd_ps(e, norm1, seed1);
  }
#pragma GCC unroll 2
  for (int64_t q = 0; q < count; ++q) {
    const __m512bh c0 = (__m512bh)_mm512_loadu_ps(panel + q * kPanel);
    const __m512bh c1 = (__m512bh)_mm512_loadu_ps(panel + q * kPanel + kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const uint32_t word = kByRow ? x[r * ld + q] : x[q * ld + r];
      const __m512bh b = (__m512bh)_mm512_set1_epi32(static_cast<int>(word));
      sum[r][0] = _mm512_dpbf16_ps(sum[r][0], b, c0);
      sum[r][1] = _mm512_dpbf16_ps(sum[r][1], b, c1);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    score[r][0] = as_floats(sum[r][0]);
    score[r][1] = as_floats(sum[r][1]);
  }
}

// The same for one row, in four sums: one after another its products would wait for each other.
MSVQ_BFLOAT16_TARGET inline void score_pairs_of_row(const uint32_t* x, float error_norm,
                                                    const PackedCodes& codes, int64_t p,
                                                    float* scores) {
  const int64_t count = pairs(codes.width);
  const float* panel = codes.panels + p * kPanel * codes.width;
  for (int64_t half = 0; half < kPanel; half += kLanes) {
    __m512 sum[4] = {_mm512_fmadd_ps(_mm512_set1_ps(error_norm),
                                     _mm512_loadu_ps(&codes.norms[p * kPanel + half]),
                                     _mm512_loadu_ps(&codes.seeds[p * kPanel + half]))};
    for (int64_t q0 = 0; q0 < count; q0 += 4) {
#pragma GCC unroll 4
      for (int64_t i = 0; i < 4; ++i) {
        if (q0 + i >= count) break;
        const __m512bh c = (__m512bh)_mm512_loadu_ps(panel + (q0 + i) * kPanel + half);
        const __m512bh b = (__m512bh)_mm512_set1_epi32(static_cast<int>(x[q0 + i]));
        sum[i] = _mm512_dpbf16_ps(sum[i], b, c);
      }
    }
    const __m512 even = _mm512_add_ps(sum[0], sum[2]), odd = _mm512_add_ps(sum[1], sum[3]);
    _mm512_storeu_ps(scores + half, _mm512_add_ps(even, odd));
  }
}

template <int kRows, bool kByRow>
MSVQ_BFLOAT16_TARGET inline void scan_pairs_tile(const uint32_t* x, int64_t ld,
                                                 const float* error_norm, const PackedCodes& codes,
                                                 int64_t p, LaneBest* state) {
  const Tag first_tag(2 * p, codes), second_tag(2 * p + 1, codes);
  vfloat score[kRows][2];
  score_pairs<kRows, kByRow>(x, ld, error_norm, codes, p, score);
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    LaneBest row = state[r];
    keep_best(score[r][0], first_tag, &row);
    keep_best(score[r][1], second_tag, &row);
    state[r] = row;
  }
}

template <bool kByRow>
MSVQ_BFLOAT16_TARGET inline void scan_pairs_block(const uint32_t* x, int64_t count,
                                                  const float* error_norm, const PackedCodes& codes,
                                                  const Ahead& ahead, LaneBest* state) {
  constexpr int kRows = 8;
  const int64_t ld = kByRow ? pairs(codes.width) : kBlockRows, step = kByRow ? ld : 1;
  for (int64_t p = 0; p < codes.panel_count; ++p) {
    prefetch(ahead, p, codes.panel_count);
    int64_t r = 0;
    for (; r + kRows <= count; r += kRows)
      scan_pairs_tile<kRows, kByRow>(x + r * step, ld, error_norm + r, codes, p, state + r);
    for (; r < count; ++r)
      scan_pairs_tile<1, kByRow>(x + r * step, ld, error_norm + r, codes, p, state + r);
  }
}

// Scores every code for `count` rows.
inline void scan_pairs(bool by_row, const uint32_t* x, int64_t count, const float* error_norm,
                       const PackedCodes& codes, const Ahead& ahead, LaneBest* state) {
  if (by_row) return scan_pairs_block<true>(x, count, error_norm, codes, ahead, state);
  scan_pairs_block<false>(x, count, error_norm, codes, ahead, state);
}

}  // namespace MSVQ_ISA
}  // namespace msvq
#endif
