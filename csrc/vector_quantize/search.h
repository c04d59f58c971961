// The exact nearest code: a filter with a certified error bound, then exact distances for the rest.
//
// Every code's score is a lower bound of half its distance (packed_codes.h). The best code of a
// row is certain if the second lowest bound lies above the best code's upper bound; otherwise every
// code whose lower bound does not is measured, in float32 if that separates them, else in float64
// in the order of the definition.
#pragma once
#include <cstdint>

#include "vector_quantize/amx_filter.h"
#include "vector_quantize/bfloat16_filter.h"
#include "vector_quantize/exact_distance.h"
#include "vector_quantize/scores.h"

namespace msvq {
namespace MSVQ_ISA {

// Rows scored at once, in 2 x kTileRows accumulators.
#if defined(__AVX512F__)
constexpr int kTileRows = 8;
#else
constexpr int kTileRows = 6;
#endif

// Scratch memory of a task. Latents are centred, scaled and negated.
struct Block {
  Scratch<float> x;  // row by row (ld = D) or d by d (ld = kBlockRows)
  Scratch<float> panel, z_row, x_row;
  Scratch<uint32_t> pair;  // x rounded to bfloat16, in the layout of x with two d in a word
  Scratch<uint32_t> pair_row;
  Scratch<uint16_t> hi, lo;  // x split in two bfloat16
  Scratch<LaneBest> state;
  float norm[kBlockRows];        // upper bounds of |x|; inf or NaN if the filter cannot be used
  float error_norm[kBlockRows];  // a score's error is at most this, negated, times |c|
  float margin[kBlockRows];      // what float64 rounds off, and underflow
  int64_t count, ld;
  Ahead ahead;

  explicit Block(const PackedCodes& codes)
      : x(kBlockRows * codes.width),
        panel(codes.filter == Filter::split ? kPanel * codes.width : 0),
        z_row(codes.width),
        x_row(codes.width),
        pair(codes.filter == Filter::bfloat16 ? kBlockRows * (codes.width + 1) / 2 : 0),
        pair_row((codes.width + 1) / 2),
        hi(codes.filter == Filter::split ? kBlockRows * codes.width : 0),
        lo(codes.filter == Filter::split ? kBlockRows * codes.width : 0),
        state(kBlockRows),
        count(0),
        ld(0),
        ahead{} {}
};

template <int kRows, bool kByRow>
inline void score_panel(const float* x, int64_t ld, const float* error_norm, const float* panel,
                        const float* seeds, const float* norms, int64_t width,
                        vfloat (&score)[kRows][2]) {
  const vfloat seed0 = load(seeds), seed1 = load(seeds + kLanes);
  const vfloat norm0 = load(norms), norm1 = load(norms + kLanes);
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    const vfloat e = broadcast(error_norm[r]);
    score[r][0] = seed0 + e * norm0;
    score[r][1] = seed1 + e * norm1;
  }
  for (int64_t d = 0; d < width; ++d) {
    const vfloat c0 = load(panel + d * kPanel), c1 = load(panel + d * kPanel + kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const vfloat b = broadcast(kByRow ? x[r * ld + d] : x[d * ld + r]);
      score[r][0] += b * c0;
      score[r][1] += b * c1;
    }
  }
}

template <int kRows, bool kByRow>
inline void scan_tile(Block* block, int64_t first, const PackedCodes& codes, int64_t p) {
  const Tag first_tag(2 * p, codes), second_tag(2 * p + 1, codes);
  vfloat score[kRows][2];
  const float* x = block->x.data + (kByRow ? first * block->ld : first);
  score_panel<kRows, kByRow>(x, block->ld, block->error_norm + first,
                             codes.panels + p * kPanel * codes.width, &codes.seeds[p * kPanel],
                             &codes.norms[p * kPanel], codes.width, score);
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    LaneBest state = block->state[first + r];
    keep_best(score[r][0], first_tag, &state);
    keep_best(score[r][1], second_tag, &state);
    block->state[first + r] = state;
  }
}

template <bool kByRow>
inline void scan_block(Block* block, const PackedCodes& codes) {
  for (int64_t p = 0; p < codes.panel_count; ++p) {
    prefetch(block->ahead, p, codes.panel_count);
    int64_t first = 0;
    for (; first + kTileRows <= block->count; first += kTileRows)
      scan_tile<kTileRows, kByRow>(block, first, codes, p);
    for (; first + 3 <= block->count; first += 3) scan_tile<3, kByRow>(block, first, codes, p);
    for (; first < block->count; ++first) scan_tile<1, kByRow>(block, first, codes, p);
  }
}

// Fills the running best of the block's rows.
inline void scan(bool by_row, Block* block, const PackedCodes& codes) {
  for (int64_t i = 0; i < kBlockRows; ++i) clear(&block->state[i]);
#ifdef MSVQ_BFLOAT16
  if (codes.filter == Filter::split) {
    const SplitRows split{block->hi.data, block->lo.data};
    return scan_split(split, block->count, block->error_norm, codes, block->state.data);
  }
  if (codes.filter == Filter::bfloat16)
    return scan_pairs(by_row, block->pair.data, block->count, block->error_norm, codes,
                      block->ahead, block->state.data);
#endif
  if (by_row) return scan_block<true>(block, codes);
  scan_block<false>(block, codes);
}

// Scores up to this may belong to the nearest code: the best code's upper bound, and what float64
// rounds off the definition's distances themselves.
inline double score_limit(const RowBest& best, const Block& block, int64_t i,
                          const PackedCodes& codes) {
  const double code_norm = codes.norms[best.slot];
  const double seed = codes.seed_error * 0.51 * code_norm, dot = block.error_norm[i] * -1.01;
  const double limit = best.best + codes.tag_error * __builtin_fabs(best.best) +
                       2 * (seed + dot) * code_norm + block.margin[i];
  return limit + codes.tag_error * __builtin_fabs(limit);
}

// Scores of panel p for row `i` alone, whose values are in `x_row` and `pair_row`.
inline void score_row(Block* block, int64_t i, const PackedCodes& codes, int64_t p, float* scores) {
  const float* panel = codes.panels + p * kPanel * codes.width;
#ifdef MSVQ_BFLOAT16
  if (codes.filter == Filter::bfloat16)
    return score_pairs_of_row(block->pair_row.data, block->error_norm[i], codes, p, scores);
  if (codes.filter == Filter::split) {
    join_panel(panel, codes.width, block->panel.data);
    panel = block->panel.data;
  }
#endif
  vfloat score[1][2];
  score_panel<1, true>(block->x_row.data, codes.width, block->error_norm + i, panel,
                       &codes.seeds[p * kPanel], &codes.norms[p * kPanel], codes.width, score);
  store(scores, score[0][0]);
  store(scores + kLanes, score[0][1]);
}

// Scores the row against every code once more and measures those not above `limit`.
inline void measure_all(Block* block, int64_t i, float limit, const PackedCodes& codes,
                        NearestExact* nearest) {
  const bool all = !(block->norm[i] < __builtin_inff());
  for (int64_t d = 0; d < codes.width; ++d)
    block->x_row[d] = (block->z_row[d] - codes.mean[d]) * -codes.scale;
#ifdef MSVQ_BFLOAT16
  float square, rest;
  if (codes.filter == Filter::bfloat16)
    pair_row(block->z_row.data, codes.mean.data, -codes.scale, codes.width, block->pair_row.data,
             &square, &rest);
#endif
  for (int64_t p = 0; p < codes.panel_count; ++p) {
    const int64_t slot = p * kPanel;
    const int64_t lanes = codes.count - slot < kPanel ? codes.count - slot : kPanel;
    alignas(64) float scores[kPanel] = {};
    uint64_t near = ~uint64_t{0};
    if (!all) {
      score_row(block, i, codes, p, scores);
      near = lanes_up_to(load(scores), limit) |
             static_cast<uint64_t>(lanes_up_to(load(scores + kLanes), limit)) << kLanes;
    }
    for (near &= (uint64_t{1} << lanes) - 1; near != 0; near &= near - 1)
      nearest->add(codes.index[slot + __builtin_ctzll(near)]);
  }
}

// The nearest code of row `i`, whose values are in `z_row`, where the filter leaves several.
inline int64_t resolve(Block* block, int64_t i, double limit, const float* codebook,
                       const PackedCodes& codes) {
  NearestExact nearest(block->z_row.data, codebook, codes.width);
  const float bound = static_cast<float>(limit * (limit > 0 ? 1 + 1e-6 : 1 - 1e-6));
  const LaneBest& state = block->state[i];
  // A lane holds at most one candidate, or all are measured.
  const bool known = block->norm[i] < __builtin_inff() && lanes_up_to(state.second, bound) == 0;
  if (!known) {
    measure_all(block, i, bound, codes, &nearest);
    return nearest.result();
  }
  int64_t candidates[kLanes];
  int count = 0;
  for (uint32_t lanes = lanes_up_to(state.best, bound); lanes != 0; lanes &= lanes - 1) {
    const int lane = __builtin_ctz(lanes);
    candidates[count++] = codes.index[slot_of(state.best[lane], lane, codes)];
  }
  const int64_t clear =
      clearly_nearest(block->z_row.data, codebook, codes.width, candidates, count);
  if (clear >= 0) return clear;
  for (int c = 0; c < count; ++c) nearest.add(candidates[c]);
  return nearest.result();
}

}  // namespace MSVQ_ISA
}  // namespace msvq
