// Correlations of taps with lines of pixels: the arithmetic of the blur, in register tiles.
#pragma once
#include <cstdint>
#include <cstdlib>

#include "simd.h"

namespace msvq {
namespace MSVQ_ISA {
namespace {

constexpr int kRows = 4;                        // output rows of one vertical register tile
constexpr int kVectors = kLanes == 16 ? 4 : 2;  // its vectors; 4 x 4 tiles need 32 registers

template <int kValue>
struct Count {
  static constexpr int value = kValue;
};

// Zeroed memory, aligned to a cache line.
template <class T>
struct Array {
  explicit Array(int64_t size)
      : base(std::calloc(1, static_cast<size_t>(size) * sizeof(T) + 64)),
        data(reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(base) + 63) & ~uintptr_t{63})) {}
  ~Array() { std::free(base); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  T& operator[](int64_t i) const { return data[i]; }

  void* base;
  T* data;
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

#if defined(__AVX512F__)
// The vector that starts kShift elements into low | high.
template <int kShift>
inline vfloat shifted(vfloat low, vfloat high) {
  if constexpr (kShift == 0) return low;
  return (vfloat)_mm512_alignr_epi32((__m512i)high, (__m512i)low, kShift);
}

// Adds taps kShift .. 15 of a block of 16, of which `size` exist. A load that straddles two cache
// lines takes a load port twice, a shift in registers takes one of the two FMA ports: two loads to
// one shift keep both kinds of port busy.
template <int kShift, int kU>
__attribute__((always_inline)) inline void add_shifted(const float* taps, int64_t size,
                                                       const float* line, const vfloat* value,
                                                       vfloat* sum) {
  if constexpr (kShift < kLanes) {
    if (kShift >= size) return;
    const vfloat tap = broadcast(taps[kShift]);
#pragma GCC unroll 8
    for (int u = 0; u < kU; ++u)
      sum[u] +=
          tap * (kShift == 0 || (kShift + u) % 3 == 0 ? shifted<kShift>(value[u], value[u + 1])
                                                      : load(line + kShift + u * kLanes));
    add_shifted<kShift + 1, kU>(taps, size, line, value, sum);
  }
}

// The sums of blur_line for lines of single-channel pixels; `line` is aligned.
template <int kU>
inline void blur_aligned(const float* taps, int64_t size, const float* line, float* out) {
  vfloat sum[kU] = {};
  for (int64_t first = 0; first < size; first += kLanes) {
    vfloat value[kU + 1];
#pragma GCC unroll 9
    for (int u = 0; u <= kU; ++u) value[u] = load(line + first + u * kLanes);
    add_shifted<0, kU>(taps + first, size - first, line + first, value, sum);
  }
#pragma GCC unroll 8
  for (int u = 0; u < kU; ++u) store(out + u * kLanes, sum[u]);
}
#endif

// Blurs along a line: out[e] = sum_j taps[j] * line[e + j * step], for `vectors` vectors.
inline void blur_line(const float* taps, int64_t size, const float* line, int64_t step,
                      int64_t vectors, float* out) {
  int64_t v = 0;
  const auto run = [&](auto count) __attribute__((always_inline)) {
    constexpr int kU = decltype(count)::value;
    for (; v + kU <= vectors; v += kU) {
      const float* from = line + v * kLanes;
      float* to = out + v * kLanes;
#if defined(__AVX512F__)
      if (step == 1) {
        blur_aligned<kU>(taps, size, from, to);
        continue;
      }
#endif
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
template <int kT>
inline void blur_across(const float* taps, int64_t size, const float* const* lines, int64_t vectors,
                        float* const* out) {
  int64_t v = 0;
  const auto run = [&](auto count) __attribute__((always_inline)) {
    constexpr int kU = decltype(count)::value;
    for (; v + kU <= vectors; v += kU) {
      const int64_t at = v * kLanes;
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
