// Sums of taps times lines in register tiles, for the Gaussian blur on the CPU.
#pragma once
#include <cstdint>
#include <type_traits>

#include "simd.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace msvq {
namespace MSVQ_ISA {
namespace {

// Lines of a register tile, which a pass finishes at a time; 8 need 26 registers.
constexpr int kRows = kLanes == 16 ? 8 : 4;

template <int kValue>
struct Count {
  static constexpr int value = kValue;
};
template <int...>
struct Phases {};
using RowPhases =
    std::conditional_t<kRows == 8, Phases<1, 2, 3, 4, 5, 6, 7, 0>, Phases<1, 2, 3, 0>>;

// Correlates `size` taps with consecutive lines for kU vectors, in the order of the taps.
template <int kU, class Source, class Sink>
inline void correlate(const float* taps, int64_t size, const Source& source, const Sink& sink) {
  vfloat sum[kU] = {};
  for (int64_t j = 0; j < size; ++j)
#pragma GCC unroll 8
    for (int u = 0; u < kU; ++u) sum[u] += broadcast(taps[j]) * source(j, u);
#pragma GCC unroll 8
  for (int u = 0; u < kU; ++u) sink(u, sum[u]);
}

// Correlates 2 * radius + 1 symmetric taps with kRows consecutive lines for one vector: output t
// sums the taps times source(t), source(t + 1), ... Both lines of a tap are added before they are
// multiplied, from the middle outwards, which halves the multiplications: processors that add and
// multiply in different units take half the time, others the same. The lines of all outputs stay
// in registers; a step reads one more at either end.
template <int... kPhases, class Source, class Sink>
inline void correlate_symmetric(const float* taps, int64_t radius, const Source& source,
                                const Sink& sink, Phases<kPhases...>) {
  // At distance d from the middle output t adds up[(t - d) % kRows] and down[(t + d) % kRows].
  vfloat sum[kRows], up[kRows], down[kRows];
  const float* const middle = taps + radius;
#pragma GCC unroll 8
  for (int t = 0; t < kRows; ++t) {
    up[t] = down[t] = source(radius + t);
    sum[t] = broadcast(*middle) * up[t];
  }
  const auto step = [&](int64_t d, auto phase) __attribute__((always_inline)) {
    constexpr int kPhase = decltype(phase)::value;  // d % kRows
    up[(kRows - kPhase) % kRows] = source(radius - d);
    down[(kRows - 1 + kPhase) % kRows] = source(radius + kRows - 1 + d);
    const vfloat tap = broadcast(middle[d]);
#pragma GCC unroll 8
    for (int t = 0; t < kRows; ++t)
      sum[t] += tap * (up[(t + kRows - kPhase) % kRows] + down[(t + kPhase) % kRows]);
    return true;
  };
  int64_t d = 0;
  while (((++d <= radius && step(d, Count<kPhases>())) && ...)) continue;
#pragma GCC unroll 8
  for (int t = 0; t < kRows; ++t) sink(t, sum[t]);
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
      correlate<kU>(
          taps, size, [=](int64_t j, int u) { return load(from + j * step + u * kLanes); },
          [=](int u, vfloat sum) { store(to + u * kLanes, sum); });
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

// Blurs across lines: row t of the result is 2 * radius + 1 taps times lines[t], lines[t + 1], ...
inline void blur_across(const float* taps, int64_t radius, const float* const* lines,
                        int64_t vectors, float* const* out, const Ahead& ahead) {
  for (int64_t at = 0; at < vectors * kLanes; at += kLanes) {
    // Not into the first cache, where equal columns of an image's rows share too few places.
    for (int64_t t = 0; t < ahead.count; ++t)
      __builtin_prefetch(ahead.rows[t] + at * ahead.bytes, 0, 2);
    correlate_symmetric(
        taps, radius, [=](int64_t j) { return load(lines[j] + at); },
        [=](int t, vfloat sum) { store(out[t] + at, sum); }, RowPhases());
  }
}

}  // namespace
}  // namespace MSVQ_ISA
}  // namespace msvq
