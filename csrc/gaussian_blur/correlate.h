// The Gaussian blur of kLanes lines on the CPU: down by register tiles of lines, then along by the
// same tiles of columns.
//
// The vertical pass leaves every column as a vector of the tile's rows, transposed in registers, so
// that the horizontal pass is the same sum over columns as the vertical one over rows.
#pragma once
#include <cstdint>
#include <type_traits>

#include "simd.h"
#include "transpose.h"

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

// Correlates 2 * radius + 1 symmetric taps with kRows consecutive lines for one vector: output t
// sums the taps times source(t), source(t + 1), ... Both lines of a tap are added before they are
// multiplied, from the middle outwards, which halves the multiplications: processors that add and
// multiply in different units take half the time, others the same. The lines of all outputs stay
// in registers; a step reads one more at either end.
template <int... kPhases, class Source, class Sink>
__attribute__((always_inline)) inline void correlate_symmetric(const float* taps, int64_t radius,
                                                               const Source& source,
                                                               const Sink& sink,
                                                               Phases<kPhases...>) {
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
      sum[t] =
          multiply_add(tap, up[(t + kRows - kPhase) % kRows] + down[(t + kPhase) % kRows], sum[t]);
    return true;
  };
  int64_t d = 0;
  while (((++d <= radius && step(d, Count<kPhases>())) && ...)) continue;
#pragma GCC unroll 8
  for (int t = 0; t < kRows; ++t) sink(t, sum[t]);
}

// pick(Count<radius>()) of the paper's radii, of others pick(Count<0>()): a loop whose end the
// compiler knows takes a tenth less.
template <class Pick>
inline auto with_radius(int64_t radius, const Pick& pick) {
  switch (radius) {
    case 5:
      return pick(Count<5>());
    case 7:
      return pick(Count<7>());
    case 10:
      return pick(Count<10>());
    case 15:
      return pick(Count<15>());
    case 22:
      return pick(Count<22>());
    default:
      return pick(Count<0>());
  }
}

// Rows of memory of which a pass reads kLanes elements of `bytes` into the cache for every vector
// that it computes: a burst of reads as long as a strip's row would wait instead of computing.
struct Ahead {
  const char* const* rows;
  int64_t count, bytes;
};

// One register tile: kRows sums of vectors to `to`. Functions of their own, and results by way of
// memory, because a compiler that sees two tiles keeps the sums of the first in registers that the
// second needs.
template <int kRadius>
__attribute__((noinline)) void sum_lines(const float* taps, int64_t radius,
                                         const float* const* lines, int64_t at, float* to) {
  correlate_symmetric(
      taps, kRadius > 0 ? kRadius : radius,
      [=](int64_t j) __attribute__((always_inline)) { return load(lines[j] + at); },
      [=](int t, vfloat sum) __attribute__((always_inline)) { store(to + t * kLanes, sum); },
      RowPhases());
}
template <bool kNeighbours, int kRadius>
__attribute__((noinline)) void sum_columns(const float* taps, int64_t radius, const float* from,
                                           int64_t channels, float* to) {
  const int64_t step = kNeighbours ? kLanes : channels * kLanes;
  correlate_symmetric(
      taps, kRadius > 0 ? kRadius : radius,
      [=](int64_t j) __attribute__((always_inline)) { return load(from + j * step); },
      [=](int t, vfloat sum) __attribute__((always_inline)) { store(to + t * step, sum); },
      RowPhases());
}

inline void load_tile(const float* from, vfloat (&tile)[kLanes]) {
#pragma GCC unroll 16
  for (int t = 0; t < kLanes; ++t) tile[t] = load(from + t * kLanes);
  transpose(tile);
}

// Blurs kLanes lines down, output t from lines[t] to lines[t + 2 * radius], and stores the result
// by columns: columns[e * kLanes + t] is element e of output t. `elements` counts in whole vectors.
inline void blur_down(const float* taps, int64_t radius, const float* const* lines,
                      int64_t elements, float* columns, const Ahead& ahead = {}) {
  const auto sum = with_radius(radius, [](auto r) { return sum_lines<decltype(r)::value>; });
  alignas(64) float sums[kLanes * kLanes];
  for (int64_t at = 0; at < elements; at += kLanes) {
    // Not into the first cache, where equal columns of an image's rows share too few places.
    for (int64_t t = 0; t < ahead.count; ++t)
      __builtin_prefetch(ahead.rows[t] + at * ahead.bytes, 0, 2);
    for (int t = 0; t < kLanes; t += kRows) sum(taps, radius, lines + t, at, sums + t * kLanes);
    vfloat tile[kLanes];
    load_tile(sums, tile);
#pragma GCC unroll 16
    for (int t = 0; t < kLanes; ++t) store(columns + (at + t) * kLanes, tile[t]);
  }
}

// Blurs columns of `channels` elements a pixel along, output pixel i from pixels i to i + 2 *
// radius, each over the first column that it needs and that no later one does.
inline void blur_in_place(const float* taps, int64_t radius, float* columns, int64_t pixels,
                          int64_t channels) {
  const auto sum =
      with_radius(radius, [](auto r) { return sum_columns<false, decltype(r)::value>; });
  for (int64_t k = 0; k < channels; ++k)
    for (int64_t i = 0; i < pixels; i += kRows) {
      float* const at = columns + (i * channels + k) * kLanes;
      sum(taps, radius, at, channels, at);
    }
}

// Hands columns over by rows: sink(at, rows), where rows[t] holds elements at ... of line t.
template <class Sink>
inline void read_by_rows(const float* columns, int64_t elements, const Sink& sink) {
  for (int64_t at = 0; at < elements; at += kLanes) {
    vfloat rows[kLanes];
    load_tile(columns + at * kLanes, rows);
    sink(at, rows);
  }
}

// Both, without the way through memory where there is one channel.
template <class Sink>
inline void blur_along(const float* taps, int64_t radius, float* columns, int64_t pixels,
                       int64_t channels, const Sink& sink) {
  if (channels > 1) {
    blur_in_place(taps, radius, columns, pixels, channels);
    return read_by_rows(columns, pixels * channels, sink);
  }
  alignas(64) float sums[kLanes * kLanes];
  const auto sum =
      with_radius(radius, [](auto r) { return sum_columns<true, decltype(r)::value>; });
  for (int64_t at = 0; at < pixels; at += kLanes) {
    for (int t = 0; t < kLanes; t += kRows)
      sum(taps, radius, columns + (at + t) * kLanes, 1, sums + t * kLanes);
    vfloat rows[kLanes];
    load_tile(sums, rows);
    sink(at, rows);
  }
}

}  // namespace
}  // namespace MSVQ_ISA
}  // namespace msvq
