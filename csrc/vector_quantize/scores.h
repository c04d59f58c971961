// The running best of a row: lowest and second lowest score of every vector lane.
#pragma once
#include <cstdint>
#include <cstring>

#include "vector_quantize/packed_codes.h"

namespace msvq {
namespace MSVQ_ISA {

// Lane i of vector v is slot v * kLanes + i; v, of integers the slot, stands in the lowest bits of
// the scores (`tag_bits`).
template <class V>
struct LaneBest {
  V best, second;
};
typedef LaneBest<vfloat> FloatBest;

inline void clear(FloatBest* state) {
  *state = {broadcast(__builtin_inff()), broadcast(__builtin_inff())};
}

// The number of a vector and the bits of a score that it leaves.
struct Tag {
  vint vector, rest;
  Tag(int64_t vector, const PackedCodes& codes)
      : vector(vint{} + static_cast<int32_t>(vector)), rest(vint{} - (1 << codes.tag_bits)) {}
};

#if defined(__AVX512F__)  // GCC makes compares and masks of the general form
inline vfloat lower(vfloat a, vfloat b) {
  const __m512 low = _mm512_min_ps((__m512)a, (__m512)b);
  return (vfloat)low;
}
inline vfloat higher(vfloat a, vfloat b) {
  const __m512 high = _mm512_max_ps((__m512)a, (__m512)b);
  return (vfloat)high;
}
inline vfloat tagged(vfloat score, const Tag& tag) {
  constexpr int kAndOr = 0xEA;  // score & rest | vector
  const __m512i bits =
      _mm512_ternarylogic_epi32((__m512i)score, (__m512i)tag.rest, (__m512i)tag.vector, kAndOr);
  return (vfloat)bits;
}
#else
inline vfloat lower(vfloat a, vfloat b) { return a < b ? a : b; }
inline vfloat higher(vfloat a, vfloat b) { return a > b ? a : b; }
inline vfloat tagged(vfloat score, const Tag& tag) {
  vint bits;
  std::memcpy(&bits, &score, sizeof bits);
  bits = (bits & tag.rest) | tag.vector;
  std::memcpy(&score, &bits, sizeof bits);
  return score;
}
#endif

inline void keep_best(vfloat score, const Tag& tag, FloatBest* state) {
  score = tagged(score, tag);
  state->second = lower(state->second, higher(state->best, score));
  state->best = lower(state->best, score);
}

// The slot of a lane's best score.
inline int64_t slot_of(float best, int64_t lane, const PackedCodes& codes) {
  const uint32_t vector = bits_of(best) & ((1u << codes.tag_bits) - 1);
  return static_cast<int64_t>(vector) * kLanes + lane;
}

inline float not_below(double limit) {
  return static_cast<float>(limit * (limit > 0 ? 1 + 1e-6 : 1 - 1e-6));
}

struct RowBest {
  float best, second;
  int64_t slot;
};

#if defined(__AVX512F__)
// The lanes that are not above `limit`, as bits.
inline uint32_t lanes_up_to(vfloat v, double limit) {
  return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(not_below(limit)), _CMP_LE_OQ);
}
inline uint32_t lanes_up_to(vint v, double limit) {
  return _mm512_cmple_epi32_mask((__m512i)v, _mm512_set1_epi32(static_cast<int32_t>(limit)));
}

inline RowBest reduce_lanes(const FloatBest& state, const PackedCodes& codes) {
  const __m512 lanes = (__m512)state.best;
  const float best = _mm512_reduce_min_ps(lanes);
  const __mmask16 at = _mm512_cmp_ps_mask(lanes, _mm512_set1_ps(best), _CMP_EQ_OQ);
  const int winner = __builtin_ctz(at | 0x10000u) & 15;
  const __m512 others =
      _mm512_mask_blend_ps(static_cast<__mmask16>(1u << winner), lanes, (__m512)state.second);
  const float second = _mm512_reduce_min_ps(others);
  return {best, second, slot_of(best, winner, codes)};
}
#else
inline uint32_t lanes_up_to(vfloat v, double limit) {
  const float bound = not_below(limit);
  float lanes[kLanes];
  store(lanes, v);
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(lanes[i] <= bound) << i;
  return bits;
}

inline RowBest reduce_lanes(const FloatBest& state, const PackedCodes& codes) {
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
  return {best[winner], runner_up, slot_of(best[winner], winner, codes)};
}
#endif

}  // namespace MSVQ_ISA
}  // namespace msvq
