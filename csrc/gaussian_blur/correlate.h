// Sums of taps times lines in register tiles, for the Gaussian blur on the CPU.
#pragma once
#include <cstdint>

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

}  // namespace
}  // namespace MSVQ_ISA
}  // namespace msvq
