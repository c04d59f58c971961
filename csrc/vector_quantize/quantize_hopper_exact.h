// The nearest of the codes that the search leaves open, as the definition has it; a warp per row.
#pragma once
#include "vector_quantize/quantize_hopper.h"

namespace msvq {
namespace cuda {

// The pairs of an open row, one after another; all of it is the same in every lane of the warp.
struct OpenPairs {
  uint32_t near, any;  // bits of the lanes
  const uint8_t* numbers;
  int numbers_of_lane, lane, at, last;

  // First code of the next pair; -1 after the last.
  MSVQ_WARPS int next() {
    if (at == last) {
      if (near == 0) return -1;
      lane = __ffs(static_cast<int>(near)) - 1;
      near &= near - 1;
      const bool all = any >> lane & 1;
      at = all ? 0 : numbers[lane];
      last = all ? numbers_of_lane : at + 1;
    }
    return pair_column(lane, at++);
  }
};

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

// Squared distances in float32, 4 lanes a code: enough unless two agree in five digits. -1 then.
template <class T>
MSVQ_WARPS int clear_winner(const QuantizeHopperParams& p, const T* z, OpenPairs pairs) {
  const int lane = thread_again() % 32, part = lane % 4 * 16;
  float4 x[4];
  MSVQ_UNROLL
  for (int i = 0; i < 4; ++i) x[i] = load_four(z + part + 4 * i);
  float best = INFINITY, second = INFINITY;
  int best_code = 0;
  for (int next = pairs.next(); next >= 0;) {
    int code = p.num_codes;
    for (int i = 0; i < 4 && next >= 0; ++i, next = pairs.next())
      if (lane / 8 == i) code = next + lane / 4 % 2;
    float distance = 0;
    MSVQ_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float4 e = load_four(p.codebook + min(code, p.num_codes - 1) * kWidth + part + 4 * i);
      const float a = x[i].x - e.x, b = x[i].y - e.y, c = x[i].z - e.z, d = x[i].w - e.w;
      distance = fmaf(a, a, fmaf(b, b, fmaf(c, c, fmaf(d, d, distance))));
    }
    distance = distance + __shfl_xor_sync(~0u, distance, 1);
    distance = distance + __shfl_xor_sync(~0u, distance, 2);
    if (!(distance == distance) || code >= p.num_codes) distance = INFINITY;
    second = fminf(second, fmaxf(best, distance));
    if (distance < best) best = distance, best_code = code;
  }
  float lowest = best;
  MSVQ_UNROLL
  for (int step = 4; step < 32; step *= 2)
    lowest = fminf(lowest, __shfl_xor_sync(~0u, lowest, step));
  // Its terms are squares: 20 roundings, each of 2^-24 of what is there.
  const float limit = lowest * 1.00001f;
  const uint32_t winners = __ballot_sync(~0u, best <= limit);
  const bool tied = __any_sync(~0u, second <= limit) || __popc(winners) != 4;
  const int code = __shfl_sync(~0u, best_code, max(__ffs(static_cast<int>(winners)) - 1, 0));
  return tied || !(lowest > 1e-28f && lowest < 1e37f) ? -1 : code;
}

// float64, in the order of d, no contraction; lowest code on ties, a code with NaN as far as Inf.
template <class T>
MSVQ_WARPS int exact_winner(const QuantizeHopperParams& p, const T* z, OpenPairs pairs) {
  const int lane = thread_again() % 32;
  double best = INFINITY;
  int best_code = 0;
  for (int next = pairs.next(); next >= 0;) {
    int code = p.num_codes;
    for (int i = 0; i < 16 && next >= 0; ++i, next = pairs.next())
      if (lane / 2 == i) code = next + lane % 2;
    if (code < p.num_codes) {
      double distance = 0;
      for (int d = 0; d < kWidth; d += 4) {
        const float4 x = load_four(z + d), e = load_four(p.codebook + code * kWidth + d);
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

// The code of an open row, marked if the row is not finite.
template <class T>
MSVQ_WARPS int settle(const QuantizeHopperParams& p, const T* z, const OpenPairs& pairs) {
  const int code = clear_winner(p, z, pairs);
  if (code >= 0) return code;
  if (!__all_sync(~0u, is_finite(load_four(z + thread_again() % 16 * 4)))) return kNotFinite;
  return exact_winner(p, z, pairs);
}

}  // namespace cuda
}  // namespace msvq
