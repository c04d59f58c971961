// Sums of taps times lines in register tiles, for the Gaussian blur on the CPU.
#pragma once
#include <cstdint>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "simd.h"

namespace msvq {
namespace MSVQ_ISA {
namespace {

constexpr int kRows = 4;                        // lines of one register tile
constexpr int kVectors = kLanes == 16 ? 4 : 2;  // its vectors; 4 x 4 tiles need 32 registers

template <int kValue>
struct Count {
  static constexpr int value = kValue;
};

// Correlates `size` taps with kT consecutive lines for kU vectors: output t sums
// taps[j] * source(t + j, u) in the order of j. Every vector read is used for kT outputs.
template <int kT, int kU, class Source, class Sink>
inline void correlate(const float* taps, int64_t size, const Source& source, const Sink& sink) {
  vfloat sum[kT][kU] = {};
  if (size < kT) {
    for (int t = 0; t < kT; ++t)
      for (int64_t j = 0; j < size; ++j)
        for (int u = 0; u < kU; ++u) sum[t][u] += broadcast(taps[j]) * source(t + j, u);
  } else {
    const auto add = [&](int64_t line, int first, int last) __attribute__((always_inline)) {
      vfloat value[kU];
#pragma GCC unroll 8
      for (int u = 0; u < kU; ++u) value[u] = source(line, u);
#pragma GCC unroll 8
      for (int t = first; t <= last; ++t) {
        const vfloat tap = broadcast(taps[line - t]);
#pragma GCC unroll 8
        for (int u = 0; u < kU; ++u) sum[t][u] += tap * value[u];
      }
    };
#pragma GCC unroll 8
    for (int line = 0; line < kT - 1; ++line) add(line, 0, line);
    for (int64_t line = kT - 1; line < size; ++line) add(line, 0, kT - 1);
#pragma GCC unroll 8
    for (int over = 0; over < kT - 1; ++over) add(size + over, over + 1, kT - 1);
  }
#pragma GCC unroll 8
  for (int t = 0; t < kT; ++t)
#pragma GCC unroll 8
    for (int u = 0; u < kU; ++u) sink(t, u, sum[t][u]);
}

// Blurs along a line: out[e] = sum_j taps[j] * line[e + j * step], for `vectors` vectors.
inline void blur_line(const float* taps, int64_t size, const float* line, int64_t step,
                      int64_t vectors, float* out) {
  int64_t v = 0;
  const auto run = [&](auto count) __attribute__((always_inline)) {
    constexpr int kU = decltype(count)::value;
    for (; v + kU <= vectors; v += kU) {
      const float* from = line + v * kLanes;
      float* to = out + v * kLanes;
      correlate<1, kU>(
          taps, size, [=](int64_t j, int u) { return load(from + j * step + u * kLanes); },
          [=](int, int u, vfloat sum) { store(to + u * kLanes, sum); });
    }
  };
  run(Count<8>());
  run(Count<4>());
  run(Count<1>());
}

// Blurs across lines: row t of the result is sum_j taps[j] * lines[t + j], for `vectors` vectors.
// Reads kT rows from `ahead`, kLanes elements of `bytes` for every vector, into the cache
// meanwhile: a burst of reads as long as a strip's row would wait for memory instead of computing.
template <int kT>
inline void blur_across(const float* taps, int64_t size, const float* const* lines, int64_t vectors,
                        float* const* out, const char* const* ahead, int64_t bytes) {
  int64_t v = 0;
  const auto run = [&](auto count) __attribute__((always_inline)) {
    constexpr int kU = decltype(count)::value;
    for (; v + kU <= vectors; v += kU) {
      const int64_t at = v * kLanes;
      if (ahead)
        for (int t = 0; t < kT; ++t)
          for (int u = 0; u < kU; ++u) __builtin_prefetch(ahead[t] + (at + u * kLanes) * bytes);
      correlate<kT, kU>(
          taps, size, [=](int64_t j, int u) { return load(lines[j] + at + u * kLanes); },
          [=](int t, int u, vfloat sum) { store(out[t] + at + u * kLanes, sum); });
    }
  };
  run(Count<kVectors>());
  run(Count<1>());
}

// A strip of `columns` vectors is folded when lane l of vector i holds element l * columns + i. In
// this order a shift by one element is the next vector, for any number of channels: blurring along
// the line becomes the same register tile as blurring across lines, with aligned loads only. In the
// natural order nearly every load straddles two cache lines where a vector fills one (AVX-512), and
// costs more than its multiply-add; narrower vectors gain nothing.
#if defined(__AVX512F__)
constexpr bool kFolds = true;

// to[i][l] = from[l][i] for l < 16 and i < 16; writes the first `count` elements of each row.
inline void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride,
                      int64_t count) {
  const __mmask16 mask = static_cast<__mmask16>(count < 16 ? (1 << count) - 1 : 0xffff);
#pragma GCC unroll 4
  for (int g = 0; g < 4; ++g) {
    __m512 z[4];  // rows r, r + 4, r + 8, r + 12 of four columns
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const float* row = from + r * from_stride + 4 * g;
      z[r] = _mm512_castps128_ps512(_mm_loadu_ps(row));
      z[r] = _mm512_insertf32x4(z[r], _mm_loadu_ps(row + 4 * from_stride), 1);
      z[r] = _mm512_insertf32x4(z[r], _mm_loadu_ps(row + 8 * from_stride), 2);
      z[r] = _mm512_insertf32x4(z[r], _mm_loadu_ps(row + 12 * from_stride), 3);
    }
    const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(z[0], z[1]));
    const __m512d high01 = _mm512_castps_pd(_mm512_unpackhi_ps(z[0], z[1]));
    const __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(z[2], z[3]));
    const __m512d high23 = _mm512_castps_pd(_mm512_unpackhi_ps(z[2], z[3]));
    const __m512d columns[4] = {_mm512_unpacklo_pd(low01, low23), _mm512_unpackhi_pd(low01, low23),
                                _mm512_unpacklo_pd(high01, high23),
                                _mm512_unpackhi_pd(high01, high23)};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      _mm512_mask_storeu_ps(to + (4 * g + i) * to_stride, mask, _mm512_castpd_ps(columns[i]));
  }
}

// Folds a line: `total` vectors, those after `columns` being the borders at the line's end.
inline void fold(const float* line, int64_t columns, int64_t total, float* folded) {
  for (int64_t i = 0; i < total; i += kLanes)
    transpose(line + i, columns, folded + i * kLanes, kLanes, kLanes);
}

inline void unfold(const float* folded, int64_t columns, float* line) {
  for (int64_t i = 0; i < columns; i += kLanes)
    transpose(folded + i * kLanes, kLanes, line + i, columns, columns - i);
}
#else
constexpr bool kFolds = false;
inline void fold(const float*, int64_t, int64_t, float*) {}
inline void unfold(const float*, int64_t, float*) {}
#endif

// Blurs along kRows folded lines, `line_size` apart, whose pixels are `step` vectors apart.
inline void blur_folded(const float* taps, int64_t size, const float* lines, int64_t line_size,
                        int64_t step, int64_t columns, float* const* out) {
  const auto run = [&](auto count, int64_t first) __attribute__((always_inline)) {
    constexpr int kT = decltype(count)::value;
    correlate<kT, kRows>(
        taps, size,
        [=](int64_t j, int u) { return load(lines + u * line_size + (first + j * step) * kLanes); },
        [=](int t, int u, vfloat sum) { store(out[u] + (first + t * step) * kLanes, sum); });
  };
  int64_t first = 0;
  for (; first + 4 * step <= columns; first += 4 * step)
    for (int64_t channel = 0; channel < step; ++channel) run(Count<4>(), first + channel);
  for (; first < columns; ++first) run(Count<1>(), first);
}

}  // namespace
}  // namespace MSVQ_ISA
}  // namespace msvq
