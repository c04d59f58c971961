// The running best of a row: lowest and second lowest score of every vector lane.
#pragma once
#include <cstdint>
#include <cstring>

#include "vector_quantize/packed_codes.h"

namespace msvq {
namespace MSVQ_ISA {

typedef int32_t vint __attribute__((vector_size(kLanes * sizeof(int32_t))));

struct LaneBest {
  vfloat best, second;
  vint vector;  // of `best`: lane i of vector v is slot v * kLanes + i
};

inline void clear(LaneBest* state) {
  *state = {broadcast(__builtin_inff()), broadcast(__builtin_inff()), vint{}};
}

inline void keep_best(vfloat score, int64_t vector, LaneBest* state) {
  const vfloat best = state->best;
  const vfloat loser = best > score ? best : score;
  state->second = state->second < loser ? state->second : loser;
  state->vector = score < best ? vint{} + static_cast<int32_t>(vector) : state->vector;
  state->best = score < best ? score : best;
}

struct RowBest {
  float best, second;
  int64_t slot;
};

#if defined(__AVX512F__)
// The lanes that are not above `limit`, as bits.
inline uint32_t lanes_up_to(vfloat v, float limit) {
  return _mm512_cmp_ps_mask(reinterpret_cast<const __m512&>(v), _mm512_set1_ps(limit), _CMP_LE_OQ);
}

inline RowBest reduce_lanes(const LaneBest& state) {
  const __m512 lanes = reinterpret_cast<const __m512&>(state.best);
  const float best = _mm512_reduce_min_ps(lanes);
  const __mmask16 at = _mm512_cmp_ps_mask(lanes, _mm512_set1_ps(best), _CMP_EQ_OQ);
  const int winner = __builtin_ctz(at | 0x10000u) & 15;
  const __m512 others = _mm512_mask_blend_ps(static_cast<__mmask16>(1u << winner), lanes,
                                             reinterpret_cast<const __m512&>(state.second));
  const float second = _mm512_reduce_min_ps(others);
  return {best, second, static_cast<int64_t>(state.vector[winner]) * kLanes + winner};
}
#else
inline uint32_t lanes_up_to(vfloat v, float limit) {
  float lanes[kLanes];
  store(lanes, v);
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(lanes[i] <= limit) << i;
  return bits;
}

inline RowBest reduce_lanes(const LaneBest& state) {
  float best[kLanes], second[kLanes];
  store(best, state.best);
  store(second, state.second);
  int winner = 0;
  for (int i = 1; i < kLanes; ++i) winner = best[i] < best[winner] ? i : winner;
  float runner_up = second[winner];
  for (int i = 0; i < kLanes; ++i) {
    const float other = i == winner ? runner_up : best[i];
    runner_up = other < runner_up ? other : runner_up;
  }
  return {best[winner], runner_up, static_cast<int64_t>(state.vector[winner]) * kLanes + winner};
}
#endif

}  // namespace MSVQ_ISA
}  // namespace msvq
