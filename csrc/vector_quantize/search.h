// The exact nearest code: a float32 filter with a certified error bound, then float64 for the rest.
//
// Every code's score is a lower bound of half its distance (packed_codes.h). The best code of a
// row is certain if the second lowest bound lies above the best code's upper bound; otherwise every
// code whose lower bound does not is measured in float64 in the order of the definition.
#pragma once
#include <cstdint>

#include "vector_quantize/exact_distance.h"
#include "vector_quantize/packed_codes.h"
#include "vector_quantize/rows.h"

namespace msvq {
namespace MSVQ_ISA {

typedef int32_t vint __attribute__((vector_size(kLanes * sizeof(int32_t))));

// Rows scored at once: the accumulators of 2 x kTileRows vectors fill the registers.
#if defined(__AVX512F__)
constexpr int kTileRows = 12;
#else
constexpr int kTileRows = 6;
#endif

// Lowest and second lowest score of each lane so far, and where the lowest was.
struct LaneBest {
  vfloat best, second;
  vint vector;  // lane `i` of vector v is slot v * kLanes + i
};

struct Block {
  int64_t count, ld;
  float* x;           // -(z - mean) * scale: row by row (ld = D), or d by d (ld = kBlockRows)
  float* norm;        // (count,) upper bounds of |x|, inf or NaN if the filter cannot be used
  float* error_norm;  // (count,) -error * |x|
  LaneBest* state;    // (count,)
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
inline void scan_tile(const Block& block, int64_t first, const PackedCodes& codes, int64_t p) {
  vfloat score[kRows][2];
  const float* x = block.x + (kByRow ? first * block.ld : first);
  score_panel<kRows, kByRow>(x, block.ld, block.error_norm + first,
                             codes.panels + p * kPanel * codes.width, &codes.seeds[p * kPanel],
                             &codes.norms[p * kPanel], codes.width, score);
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    LaneBest& state = block.state[first + r];
    vfloat best = state.best, second = state.second;
    vint vector = state.vector;
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const vfloat s = score[r][v];
      const vfloat loser = best > s ? best : s;
      second = second < loser ? second : loser;
      vector = s < best ? vint{} + static_cast<int32_t>(2 * p + v) : vector;
      best = s < best ? s : best;
    }
    state.best = best;
    state.second = second;
    state.vector = vector;
  }
}

template <bool kByRow>
inline void scan_block(const Block& block, const PackedCodes& codes) {
  for (int64_t i = 0; i < block.count; ++i)
    block.state[i] = {broadcast(__builtin_inff()), broadcast(__builtin_inff()), vint{}};
  for (int64_t p = 0; p < codes.panel_count; ++p) {
    int64_t first = 0;
    for (; first + kTileRows <= block.count; first += kTileRows)
      scan_tile<kTileRows, kByRow>(block, first, codes, p);
    for (; first + 3 <= block.count; first += 3) scan_tile<3, kByRow>(block, first, codes, p);
    for (; first < block.count; ++first) scan_tile<1, kByRow>(block, first, codes, p);
  }
}

struct RowBest {
  float best, second;
  int64_t slot;
};

inline RowBest reduce_lanes(const LaneBest& state) {
  float best[kLanes], second[kLanes];
  int32_t vector[kLanes];
  store(best, state.best);
  store(second, state.second);
  std::memcpy(vector, &state.vector, sizeof vector);
  int winner = 0;
  for (int i = 1; i < kLanes; ++i) winner = best[i] < best[winner] ? i : winner;
  float runner_up = second[winner];
  for (int i = 0; i < kLanes; ++i) {
    const float other = i == winner ? runner_up : best[i];
    runner_up = other < runner_up ? other : runner_up;
  }
  return {best[winner], runner_up, static_cast<int64_t>(vector[winner]) * kLanes + winner};
}

// Scores up to this may belong to the nearest code: the best code's upper bound, and what float64
// rounds off the definition's distances themselves.
inline double score_limit(double best, double norm, int64_t slot, const PackedCodes& codes) {
  const double width = static_cast<double>(codes.width);
  const double error = score_error(codes.width) *
                       (0.51 * codes.norms[slot] * codes.norms[slot] + norm * codes.norms[slot]);
  const double both = norm + codes.max_norm;
  const double definition = (width + 8) * 0x1p-52 * both * both;
  const double underflow = 8 * (width + 4) * 0x1p-126 * (1 + norm);
  return best + 2 * error + definition + underflow;
}

// Measures every code whose score is not above `limit`.
template <bool kByRow>
inline int64_t search_row(const Block& block, int64_t row, double limit, const float* z,
                          const float* codebook, const PackedCodes& codes) {
  NearestExact nearest(z, codebook, codes.width);
  const float bound = static_cast<float>(limit * (limit > 0 ? 1 + 1e-6 : 1 - 1e-6));
  const bool all = !(block.norm[row] < __builtin_inff());
  for (int64_t p = 0; p < codes.panel_count; ++p) {
    const int64_t slot = p * kPanel;
    const int64_t lanes = codes.count - slot < kPanel ? codes.count - slot : kPanel;
    if (all) {
      for (int64_t lane = 0; lane < lanes; ++lane) nearest.add(codes.index[slot + lane]);
      continue;
    }
    vfloat score[1][2];
    const float* x = block.x + (kByRow ? row * block.ld : row);
    score_panel<1, kByRow>(x, block.ld, block.error_norm + row,
                           codes.panels + p * kPanel * codes.width, &codes.seeds[slot],
                           &codes.norms[slot], codes.width, score);
    float scores[kPanel];
    store(scores, score[0][0]);
    store(scores + kLanes, score[0][1]);
    for (int64_t lane = 0; lane < lanes; ++lane)
      if (scores[lane] <= bound) nearest.add(codes.index[slot + lane]);
  }
  return nearest.result();
}

}  // namespace MSVQ_ISA
}  // namespace msvq
