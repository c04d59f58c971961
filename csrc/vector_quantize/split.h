// Latents and codes split in two bfloat16 numbers each, hi + lo, as the matrix unit (AMX) reads
// them.
#pragma once
#include "transpose.h"
#include "vector_quantize/rows.h"

#if defined(__AVX512F__) && defined(__linux__)
#define MSVQ_AMX
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace msvq {
namespace MSVQ_ISA {

// Whether the processor has bfloat16 tiles and the kernel lets this process use them.
inline bool amx_available() {
  static const bool available = [] {
    uint32_t a = 7, b, c = 0, d;
    asm volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    if ((d >> 22 & 1u) == 0 || (d >> 24 & 1u) == 0) return false;
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return available;
}

// Rounds to bfloat16, kept in the upper half of each word.
inline __m512i round_bfloat16(__m512 x) {
  const __m512i u = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  return _mm512_and_si512(sum, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
}

// The pair (even d, odd d) of every lane in one word.
inline __m512i pair(__m512i even, __m512i odd) {
  return _mm512_or_si512(_mm512_srli_epi32(even, 16), odd);
}

struct Split {
  __m512i hi, lo;
};
inline Split split(__m512 x) {
  const __m512i hi = round_bfloat16(x);
  return {hi, round_bfloat16(_mm512_sub_ps(x, _mm512_castsi512_ps(hi)))};
}

inline void store_upper_halves(uint16_t* out, __m512i x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(x, 16)));
}

// Latents of a block, row by row: hi[i * D + d], lo likewise.
struct SplitRows {
  uint16_t* hi;
  uint16_t* lo;
};

inline void split_row(const float* x, int64_t width, int64_t row, const SplitRows& out) {
  for (int64_t d = 0; d < width; d += 16) {
    const Split s = split(_mm512_loadu_ps(x + d));
    store_upper_halves(out.hi + row * width + d, s.hi);
    store_upper_halves(out.lo + row * width + d, s.lo);
  }
}

// The same from x[d * kBlockRows + row]: pairs of d in one word, transposed 16 x 16.
inline void split_columns(const float* x, int64_t width, int64_t count, const SplitRows& out) {
  for (int64_t row = 0; row < count; row += 16) {
    for (int64_t d0 = 0; d0 < width; d0 += 32) {
      vfloat hi[16], lo[16];  // as they are, bits
      for (int i = 0; i < 16; ++i) {
        const float* p = x + (d0 + 2 * i) * kBlockRows + row;
        const Split a = split(_mm512_loadu_ps(p)), b = split(_mm512_loadu_ps(p + kBlockRows));
        hi[i] = (vfloat)pair(a.hi, b.hi);
        lo[i] = (vfloat)pair(a.lo, b.lo);
      }
      transpose(hi);
      transpose(lo);
      for (int64_t i = 0; i < 16; ++i) {
        _mm512_storeu_si512(out.hi + (row + i) * width + d0, (__m512i)hi[i]);
        _mm512_storeu_si512(out.lo + (row + i) * width + d0, (__m512i)lo[i]);
      }
    }
  }
}

// Splits the codes of a panel: 32 d of 16 codes, (d, d + 1) pairs in one word, are one tile of 1 KB
// and the tiles lie in the order [d / 32][hi, lo][half of the panel].
inline void split_panel(const float* columns, int64_t width, float* panel) {
  for (int64_t d = 0; d < width; d += 2)
    for (int64_t half = 0; half < 2; ++half) {
      const float* c = columns + d * kPanel + half * kLanes;
      const Split a = split(_mm512_loadu_ps(c)), b = split(_mm512_loadu_ps(c + kPanel));
      float* tile = panel + (d / 32 * 4 + half) * 256 + d % 32 / 2 * 16;
      _mm512_storeu_si512(tile, pair(a.hi, b.hi));
      _mm512_storeu_si512(tile + 512, pair(a.lo, b.lo));
    }
}

// What split_panel() kept of the codes, as columns again.
inline void join_panel(const float* panel, int64_t width, float* columns) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  for (int64_t d = 0; d < width; d += 2)
    for (int64_t half = 0; half < 2; ++half) {
      const float* tile = panel + (d / 32 * 4 + half) * 256 + d % 32 / 2 * 16;
      const __m512i hi = _mm512_loadu_si512(tile), lo = _mm512_loadu_si512(tile + 512);
      float* c = columns + d * kPanel + half * kLanes;
      _mm512_storeu_ps(c, _mm512_castsi512_ps(_mm512_slli_epi32(hi, 16)) +
                              _mm512_castsi512_ps(_mm512_slli_epi32(lo, 16)));
      _mm512_storeu_ps(c + kPanel, _mm512_castsi512_ps(_mm512_and_si512(hi, upper)) +
                                       _mm512_castsi512_ps(_mm512_and_si512(lo, upper)));
    }
}

}  // namespace MSVQ_ISA
}  // namespace msvq
#endif
