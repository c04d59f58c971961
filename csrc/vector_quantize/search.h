// The exact nearest code: a filter with a certified error bound, then exact distances for the rest.
//
// Every code's score is half its distance up to a term of the row, less the error that it may have
// (packed_codes.h), or with an error that the row bounds (int16_filter.h). The best code of a row
// is certain if no other can be nearer; otherwise every code that can is measured, in float32 if
// that separates them, else in float64 in the order of the definition.
#pragma once
#include <cstdint>

#include "vector_quantize/amx_filter.h"
#include "vector_quantize/exact_distance.h"
#include "vector_quantize/int16_filter.h"
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
  Scratch<float> x;  // row by row or d by d
  Scratch<float> panel, z_row, x_row;
  Scratch<uint16_t> hi, lo;  // x split in two bfloat16
  Scratch<FloatBest> state;
#if defined(__AVX512F__)
  Int16Rows integers;
#endif
  float norm[kBlockRows];        // upper bounds of |x|; inf or NaN if the filter cannot be used
  float error_norm[kBlockRows];  // a score's error is at most this, negated, times |c|
  float margin[kBlockRows];      // what float64 rounds off, and underflow
  int64_t count;
  bool by_row;
  Ahead ahead;

  explicit Block(const PackedCodes& codes)
      : x(kBlockRows * codes.width),
        panel(codes.filter == Filter::split ? kPanel * codes.width : 0),
        z_row(codes.width),
        x_row(codes.width),
        hi(codes.filter == Filter::split ? kBlockRows * codes.width : 0),
        lo(codes.filter == Filter::split ? kBlockRows * codes.width : 0),
        state(kBlockRows),
#if defined(__AVX512F__)
        integers(codes),
#endif
        count(0),
        by_row(false),
        ahead{} {
  }
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
  const int64_t ld = kByRow ? codes.width : kBlockRows;
  const float* x = block->x.data + (kByRow ? first * ld : first);
  score_panel<kRows, kByRow>(x, ld, block->error_norm + first,
                             codes.panels + p * kPanel * codes.width, &codes.seeds[p * kPanel],
                             &codes.norms[p * kPanel], codes.width, score);
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    FloatBest state = block->state[first + r];
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
inline void scan(Block* block, const PackedCodes& codes) {
#if defined(__AVX512F__)
  if (codes.filter == Filter::int16) {
    if (block->by_row) return scan_pairs<true>(block->count, codes, block->ahead, &block->integers);
    return scan_pairs<false>(block->count, codes, block->ahead, &block->integers);
  }
#endif
  for (int64_t i = 0; i < kBlockRows; ++i) clear(&block->state[i]);
#ifdef MSVQ_AMX
  if (codes.filter == Filter::split) {
    const SplitRows split{block->hi.data, block->lo.data};
    return scan_split(split, block->count, block->error_norm, codes, block->state.data);
  }
#endif
  if (block->by_row) return scan_block<true>(block, codes);
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

// The rows' best codes, and those rows that other codes may be nearer to, with the score up to
// which they are. Which rows are certain is not predictable, so nothing here branches on it.
inline int64_t find_open_rows(const Block& block, const PackedCodes& codes, int64_t* nearest,
                              int64_t* open, double* limits) {
  int64_t opened = 0;
#if defined(__AVX512F__)
  if (codes.filter == Filter::int16) {
    const int32_t number = (1 << codes.tag_bits) - 1;
    for (int64_t first = 0; first < block.count; first += kLanes) {
      const Int16Best row = reduce_lanes(&block.integers.state[first]);
      const int64_t left = block.count - first;
      for (int64_t i = 0; i < kLanes && i < left; ++i) {
        const int32_t best = row.best[i], second = row.second[i];
        const uint32_t apart = static_cast<uint32_t>(second) - static_cast<uint32_t>(best);
        const uint32_t window = block.integers.window[first + i];
        nearest[first + i] = codes.index[best & number];
        limits[first + i] = static_cast<double>(best) + window;
        open[opened] = first + i;
        opened += apart <= window;
      }
    }
    return opened;
  }
#endif
  for (int64_t i = 0; i < block.count; ++i) {
    const RowBest best = reduce_lanes(block.state[i], codes);
    limits[i] = score_limit(best, block, i, codes);
    nearest[i] = codes.index[best.slot];
    open[opened] = i;
    opened += !(best.second > limits[i]);
  }
  return opened;
}

// The slots of row `i` that score up to `limit`, where no lane can hold more than one; else -1.
inline int candidates_of(const Block& block, int64_t i, double limit, const PackedCodes& codes,
                         int64_t* slots) {
  if (!(block.norm[i] < __builtin_inff())) return -1;
  int count = 0;
#if defined(__AVX512F__)
  if (codes.filter == Filter::int16) {
    const Int16Best& row = block.integers.state[i];
    const int32_t number = (1 << codes.tag_bits) - 1;
    if (lanes_up_to(row.second, limit) != 0) return -1;
    for (uint32_t lanes = lanes_up_to(row.best, limit); lanes != 0; lanes &= lanes - 1)
      slots[count++] = row.best[__builtin_ctz(lanes)] & number;
    return count;
  }
#endif
  const FloatBest& row = block.state[i];
  if (lanes_up_to(row.second, limit) != 0) return -1;
  for (uint32_t lanes = lanes_up_to(row.best, limit); lanes != 0; lanes &= lanes - 1) {
    const int lane = __builtin_ctz(lanes);
    slots[count++] = slot_of(row.best[lane], lane, codes);
  }
  return count;
}

// The slots of panel p that score up to `limit` for row `i`, as bits. The row's values are in
// `x_row`, but for int16.
inline uint64_t slots_up_to(double limit, Block* block, int64_t i, const PackedCodes& codes,
                            int64_t p) {
#if defined(__AVX512F__)
  if (codes.filter == Filter::int16) {
    if (block->by_row) return slots_up_to<true>(limit, block->integers, i, codes, p);
    return slots_up_to<false>(limit, block->integers, i, codes, p);
  }
#endif
  const float* panel = codes.panels + p * kPanel * codes.width;
#ifdef MSVQ_AMX
  if (codes.filter == Filter::split) {
    join_panel(panel, codes.width, block->panel.data);
    panel = block->panel.data;
  }
#endif
  vfloat score[1][2];
  score_panel<1, true>(block->x_row.data, codes.width, block->error_norm + i, panel,
                       &codes.seeds[p * kPanel], &codes.norms[p * kPanel], codes.width, score);
  return lanes_up_to(score[0][0], limit) | static_cast<uint64_t>(lanes_up_to(score[0][1], limit))
                                               << kLanes;
}

// Scores the row against every code once more and measures those not above `limit`.
inline void measure_all(Block* block, int64_t i, double limit, const PackedCodes& codes,
                        NearestExact* nearest) {
  const bool all = !(block->norm[i] < __builtin_inff());
  for (int64_t d = 0; d < codes.width && codes.filter != Filter::int16; ++d)
    block->x_row[d] = (block->z_row[d] - codes.mean[d]) * -codes.scale;
  for (int64_t p = 0; p < codes.panel_count; ++p) {
    const int64_t slot = p * kPanel;
    const int64_t lanes = codes.count - slot < kPanel ? codes.count - slot : kPanel;
    uint64_t near = all ? ~uint64_t{0} : slots_up_to(limit, block, i, codes, p);
    for (near &= (uint64_t{1} << lanes) - 1; near != 0; near &= near - 1)
      nearest->add(codes.index[slot + __builtin_ctzll(near)]);
  }
}

// The nearest code of row `i`, whose values are in `z_row`, where the filter leaves several. Counts
// rows that are scored again.
inline int64_t resolve(Block* block, int64_t i, double limit, const float* codebook,
                       const PackedCodes& codes, int64_t* again) {
  NearestExact nearest(block->z_row.data, codebook, codes.width);
  int64_t candidates[kLanes];
  const int count = candidates_of(*block, i, limit, codes, candidates);
  if (count < 0) {
    ++*again;
    measure_all(block, i, limit, codes, &nearest);
    return nearest.result();
  }
  for (int c = 0; c < count; ++c) candidates[c] = codes.index[candidates[c]];
  const int64_t clear =
      clearly_nearest(block->z_row.data, codebook, codes.width, candidates, count);
  if (clear >= 0) return clear;
  for (int c = 0; c < count; ++c) nearest.add(candidates[c]);
  return nearest.result();
}

}  // namespace MSVQ_ISA
}  // namespace msvq
