// Sums of taps times lines in register tiles, for the Gaussian blur on the CPU.
#pragma once
#include <cstdint>

#include "simd.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

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

#if defined(__AVX512F__)
constexpr int kHalf = kLanes / 2;

// Blurs kR lines along themselves. Nearly every load of out[e] += taps[j] * line[e + j] straddles
// two lines of cache, which halves the loads a clock can make. So the sum is split by
// j = a * kLanes + b * kHalf + r: the vector at offset r serves every a of its neighbours and both
// b, whose sums meet in the end, half a vector apart.
template <int kGroups, int kR>
inline void blur_lines(const float* taps, int64_t size, const float* line, int64_t line_stride,
                       int64_t vectors, float* const* out) {
  constexpr int kA = (kGroups + 1) / 2;
  const int64_t whole = size - kHalf * (kGroups - 1);  // the r that the last group has a tap for
  vfloat sum[kR][kA][2] = {}, before[kR][2] = {};      // of outputs v - a; of output v - kA
  const auto add = [&](int64_t at, int64_t first, int64_t last, auto groups)
                       __attribute__((always_inline)) {
                         for (int64_t r = first; r < last; ++r) {
                           vfloat value[kR];
#pragma GCC unroll 8
                           for (int t = 0; t < kR; ++t)
                             value[t] = load(line + t * line_stride + at + r);
#pragma GCC unroll 8
                           for (int g = 0; g < decltype(groups)::value; ++g) {
                             const vfloat tap = broadcast(taps[g * kHalf + r]);
#pragma GCC unroll 8
                             for (int t = 0; t < kR; ++t) sum[t][g / 2][g % 2] += tap * value[t];
                           }
                         }
                       };
  for (int64_t v = 0; v < vectors + kA; ++v) {
    add(v * kLanes, 0, whole, Count<kGroups>());
    add(v * kLanes, whole, kHalf, Count<kGroups - 1>());
#pragma GCC unroll 8
    for (int t = 0; t < kR; ++t) {
      vfloat* const done = sum[t][kA - 1];
      if (v >= kA) {
        const vfloat apart = _mm512_shuffle_f32x4(before[t][1], done[1], 0x4e);
        store(out[t] + (v - kA) * kLanes, before[t][0] + apart);
      }
      before[t][0] = done[0];
      before[t][1] = done[1];
#pragma GCC unroll 8
      for (int a = kA - 1; a > 0; --a)
        for (int b = 0; b < 2; ++b) sum[t][a][b] = sum[t][a - 1][b];
      sum[t][0][0] = sum[t][0][1] = vfloat{};
    }
  }
}

// Blurs the lines whose `out` is not null, all kRows of them or one by one, in the same order of
// additions; false where `blur_line` must do it.
inline bool blur_lines(const float* taps, int64_t size, const float* line, int64_t line_stride,
                       int64_t vectors, float* const* out) {
  const auto run = [&](auto groups, auto at_once) __attribute__((always_inline)) {
    constexpr int kR = decltype(at_once)::value;
    for (int t = 0; t < kRows; t += kR) {
      bool all = true;
      for (int k = t; k < t + kR; ++k) all = all && out[k];
      if (all) {
        blur_lines<decltype(groups)::value, kR>(taps, size, line + t * line_stride, line_stride,
                                                vectors, out + t);
        continue;
      }
      for (int k = t; k < t + kR; ++k)
        if (out[k])
          blur_lines<decltype(groups)::value, 1>(taps, size, line + k * line_stride, line_stride,
                                                 vectors, out + k);
    }
    return true;
  };
  switch ((size + kHalf - 1) / kHalf) {
    case 2:
      return run(Count<2>(), Count<4>());
    case 3:
      return run(Count<3>(), Count<4>());
    case 4:
      return run(Count<4>(), Count<4>());
    case 5:
      return run(Count<5>(), Count<2>());
    case 6:
      return run(Count<6>(), Count<2>());
  }
  return false;
}
#endif

// Rows of memory of which a pass reads kLanes elements of `bytes` into the cache for every vector
// that it computes: a burst of reads as long as a strip's row would wait instead of computing.
struct Ahead {
  const char* const* rows;
  int64_t count, bytes;
};

// Blurs across lines: row t of the result is sum_j taps[j] * lines[t + j], for `vectors` vectors.
template <int kT>
inline void blur_across(const float* taps, int64_t size, const float* const* lines, int64_t vectors,
                        float* const* out, const Ahead& ahead) {
  int64_t v = 0;
  const auto run = [&](auto count) __attribute__((always_inline)) {
    constexpr int kU = decltype(count)::value;
    for (; v + kU <= vectors; v += kU) {
      const int64_t at = v * kLanes;
      for (int64_t t = 0; t < ahead.count; ++t)
        for (int u = 0; u < kU; ++u)
          __builtin_prefetch(ahead.rows[t] + (at + u * kLanes) * ahead.bytes);
      correlate<kT, kU>(
          taps, size, [=](int64_t j, int u) { return load(lines[j] + at + u * kLanes); },
          [=](int t, int u, vfloat sum) { store(out[t] + at + u * kLanes, sum); });
    }
  };
  run(Count<kVectors>());
  run(Count<1>());
}

}  // namespace
}  // namespace MSVQ_ISA
}  // namespace msvq
