// The nearest of the codes that the search leaves open, as the definition has it.
#pragma once
#include "vector_quantize/quantize_hopper_search.h"

namespace msvq {
namespace cuda {

// The groups of an open row, one after another.
struct OpenGroups {
  const OpenRow* of;
  int numbers_of_lane;
  uint32_t near;
  int lane = 0, at = 0, last = 0;

  MSVQ_WARPS OpenGroups(const OpenRow* row, int num_codes)
      : of(row),
        numbers_of_lane(columns_of(num_codes) / kProductColumns * kGroupsOfChunk),
        near(row->near_any & 255) {}

  // First code of the next group; -1 after the last.
  MSVQ_WARPS int next() {
    if (at == last) {
      if (near == 0) return -1;
      lane = __ffs(static_cast<int>(near)) - 1;
      near &= near - 1;
      const bool all = of->near_any >> (8 + lane) & 1;
      at = all ? 0 : static_cast<int>(of->numbers[lane / 4] >> (lane % 4 * 8) & 255);
      last = all ? numbers_of_lane : at + 1;
    }
    return group_column(lane, at++);
  }
};

// Squared distance in float32 of row `z` in shared memory; infinite for what is no code.
template <class T>
MSVQ_WARPS float quick_distance(const QuantizeHopperParams& p, const T* z, int code) {
  constexpr int kAtOnce = 4;  // loads
  const float* e = p.codebook + min(code, p.num_codes - 1) * kWidth;
  float distance = 0;
  MSVQ_NO_UNROLL
  for (int first = 0; first < kWidth; first += 4 * kAtOnce) {
    float4 y[kAtOnce];
    MSVQ_UNROLL
    for (int i = 0; i < kAtOnce; ++i) y[i] = load_four(e + first + 4 * i);
    MSVQ_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      const float4 x = read_four(z + first + 4 * i);
      const float a = x.x - y[i].x, b = x.y - y[i].y, c = x.z - y[i].z, d = x.w - y[i].w;
      distance = fmaf(a, a, fmaf(b, b, fmaf(c, c, fmaf(d, d, distance))));
    }
  }
  return distance == distance && code < p.num_codes ? distance : INFINITY;
}

// The nearest of what every `lanes` lanes have, each its best code and how far its second is; -1
// where two agree in five digits: float32 does not tell then.
MSVQ_WARPS int clear_winner(float best, float second, int code, int lanes) {
  const int lane = thread_again() % 32, from = lane & ~(lanes - 1);
  float lowest = best;
  for (int step = 1; step < lanes; step *= 2)
    lowest = fminf(lowest, __shfl_xor_sync(~0u, lowest, step));
  // Its terms are squares: 67 roundings, each of 2^-24 of what is there.
  const float limit = lowest * 1.00001f;
  const uint32_t all = ~0u >> (32 - lanes);
  const uint32_t winners = __ballot_sync(~0u, best <= limit) >> from & all;
  const bool tied = (__ballot_sync(~0u, second <= limit) >> from & all) != 0;
  const int winner = __shfl_sync(~0u, code, from + max(__ffs(static_cast<int>(winners)) - 1, 0));
  const bool clear = !tied && __popc(winners) == 1 && lowest > 1e-28f && lowest < 1e37f;
  return clear ? winner : -1;
}

// For every eight lanes their row's winner among at most two groups; -1 if it has more.
template <class T>
MSVQ_WARPS int winner_of_two(const QuantizeHopperParams& p, const T* z, const OpenRow& row) {
  const int slot = thread_again() % 8;
  const uint32_t near = row.near_any & 255, second = near & (near - 1);
  const uint32_t of = slot < 4 ? near : second;
  const int lane = max(__ffs(static_cast<int>(of)) - 1, 0);
  const int group =
      group_column(lane, static_cast<int>(row.numbers[lane / 4] >> (lane % 4 * 8) & 255));
  const int code = of ? group + code_of_group(slot % 4) : p.num_codes;
  const int winner = clear_winner(quick_distance(p, z, code), INFINITY, code, 8);
  return row.near_any <= 255 && __popc(near) <= 2 ? winner : -1;
}

// The code that this lane compares next, four lanes a group; K if none is left for it.
MSVQ_WARPS int next_code(OpenGroups& groups, int num_codes, int& next) {
  const int lane = thread_again() % 32;
  int code = num_codes;
  for (int i = 0; i < 8 && next >= 0; ++i, next = groups.next())
    if (lane / 4 == i) code = next + code_of_group(lane % 4);
  return code;
}

// The winner of a row by a whole warp.
template <class T>
MSVQ_WARPS int quick_winner(const QuantizeHopperParams& p, const T* z, OpenGroups groups) {
  float best = INFINITY, second = INFINITY;
  int best_code = 0;
  for (int next = groups.next(); next >= 0;) {
    const int code = next_code(groups, p.num_codes, next);
    const float distance = quick_distance(p, z, code);
    second = fminf(second, fmaxf(best, distance));
    if (distance < best) best = distance, best_code = code;
  }
  return clear_winner(best, second, best_code, 32);
}

// The least of the warp, the lowest code on ties.
MSVQ_WARPS void least_of_warp(double& distance, int& code) {
  MSVQ_UNROLL
  for (int step = 1; step < 32; step *= 2) {
    const double other = __shfl_xor_sync(~0u, distance, step);
    const int other_code = __shfl_xor_sync(~0u, code, step);
    if (other < distance || (other == distance && other_code < code))
      distance = other, code = other_code;
  }
}

// float64, in the order of d, no contraction; lowest code on ties, a code with NaN as far as Inf.
// A row that is not finite has code 0, marked.
template <class T>
MSVQ_WARPS int exact_winner(const QuantizeHopperParams& p, const T* z, OpenGroups groups) {
  const int lane = thread_again() % 32;
  if (!__all_sync(~0u, is_finite(read_four(z + lane % 16 * 4)))) return kNotFinite;
  double best = INFINITY;
  int best_code = 0;
  for (int next = groups.next(); next >= 0;) {
    const int code = next_code(groups, p.num_codes, next);
    if (code < p.num_codes) {
      double distance = 0;
      MSVQ_NO_UNROLL
      for (int d = 0; d < kWidth; d += 4) {
        const float4 x = read_four(z + d), e = load_four(p.codebook + code * kWidth + d);
        const float differences[4][2] = {{x.x, e.x}, {x.y, e.y}, {x.z, e.z}, {x.w, e.w}};
        MSVQ_UNROLL
        for (int k = 0; k < 4; ++k) {
          const double off = __dsub_rn(differences[k][0], differences[k][1]);
          distance = __dadd_rn(distance, __dmul_rn(off, off));
        }
      }
      if (distance < best || (distance == best && code < best_code))
        best = distance, best_code = code;
    }
    __syncwarp();
  }
  least_of_warp(best, best_code);
  return best_code;
}

// Copies a lot of open rows, up to kLot, to `rows`; returns the code of row lane % kLot of them.
template <class T>
MSVQ_WARPS int settle_rows(const QuantizeHopperParams& p, const OpenRow* open, int count, T* rows) {
  const int lane = thread_again() % 32, part = lane % 16 * 4;
  MSVQ_UNROLL
  for (int at = lane / 16; at < kLot; at += 2) {
    const T* from = static_cast<const T*>(p.z) + int64_t{open[min(at, count - 1)].row} * p.z_stride;
    copy_four(rows + at * kWidth + part, from + part);
  }
  __syncwarp();
  const int own = min(lane / 8, count - 1);
  const int settled = winner_of_two(p, rows + own * kWidth, open[own]);
  int code = 0;
  MSVQ_NO_UNROLL
  for (int i = 0; i < count; ++i) {
    const OpenGroups groups(open + i, p.num_codes);
    int winner = __shfl_sync(~0u, settled, 8 * i);
    if (winner < 0) winner = quick_winner(p, rows + i * kWidth, groups);
    if (winner < 0) winner = exact_winner(p, rows + i * kWidth, groups);
    if (lane % kLot == i) code = winner;
  }
  return code;
}

}  // namespace cuda
}  // namespace msvq
