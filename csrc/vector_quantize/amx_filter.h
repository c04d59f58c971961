// The filter's scores from the matrix unit (AMX): products of bfloat16 pairs in float32.
//
// Latents and codes are split in two bfloat16 numbers each, x = hi + lo, and x.c is taken as
// hi.hi + lo.hi + hi.lo: sixteen significant bits at several times the rate of float32.
#pragma once
#include "vector_quantize/packed_codes.h"
#include "vector_quantize/scores.h"

#ifdef MSVQ_AMX

namespace msvq {
namespace MSVQ_ISA {

struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Scores of 32 rows and 32 codes: score[(rows / 16 * 2 + codes / 16) * 256 + ...].
__attribute__((target("amx-tile,amx-bf16"))) inline void multiply_tiles(
    const uint16_t* hi, const uint16_t* lo, const float* panel, const float* seeds, int64_t width,
    float* score) {
  const int64_t stride = width * 2;
  // A stride of 0 reads the seeds of the codes into every row.
  _tile_loadd(0, seeds, 0);
  _tile_loadd(1, seeds + 16, 0);
  _tile_loadd(2, seeds, 0);
  _tile_loadd(3, seeds + 16, 0);
  for (int64_t d = 0; d < width; d += 32, panel += 1024) {
    _tile_loadd(4, hi + d, stride);
    _tile_loadd(5, hi + d + 16 * width, stride);
    _tile_loadd(6, panel + 512, 64);
    _tile_loadd(7, panel + 768, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    _tile_loadd(6, panel, 64);
    _tile_loadd(7, panel + 256, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    _tile_loadd(4, lo + d, stride);
    _tile_loadd(5, lo + d + 16 * width, stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, score, 64);
  _tile_stored(1, score + 256, 64);
  _tile_stored(2, score + 512, 64);
  _tile_stored(3, score + 768, 64);
}

inline void keep_best(const float* score, const PackedCodes& codes, const float* error_norm,
                      int64_t p, FloatBest* state) {
  const Tag first_tag(2 * p, codes), second_tag(2 * p + 1, codes);
  const vfloat norm0 = load(&codes.norms[p * kPanel]);
  const vfloat norm1 = load(&codes.norms[p * kPanel + kLanes]);
  for (int64_t r = 0; r < 32; ++r) {
    const float* s = score + (r / 16 * 512) + r % 16 * 16;
    const vfloat e = broadcast(error_norm[r]);
    FloatBest row = state[r];
    keep_best(load(s) + e * norm0, first_tag, &row);
    keep_best(load(s + 256) + e * norm1, second_tag, &row);
    state[r] = row;
  }
}

// Scores every code for `count` rows. The vector units reduce the scores of one group of tiles
// while the matrix unit multiplies the next.
__attribute__((target("amx-tile,amx-bf16"))) inline void scan_split(const SplitRows& x,
                                                                    int64_t count,
                                                                    const float* error_norm,
                                                                    const PackedCodes& codes,
                                                                    FloatBest* state) {
  alignas(64) const TileConfig config;
  alignas(64) float score[2][1024];
  _tile_loadconfig(&config);
  const int64_t groups = (count + 31) / 32, steps = groups * codes.panel_count;
  for (int64_t step = 0; step <= steps; ++step) {
    if (step < steps) {
      const int64_t p = step / groups, row = step % groups * 32;
      multiply_tiles(x.hi + row * codes.width, x.lo + row * codes.width,
                     codes.panels + p * kPanel * codes.width, &codes.seeds[p * kPanel], codes.width,
                     score[step % 2]);
    }
    if (step > 0) {
      const int64_t p = (step - 1) / groups, row = (step - 1) % groups * 32;
      keep_best(score[(step - 1) % 2], codes, error_norm + row, p, state + row);
    }
  }
  _tile_release();
}

}  // namespace MSVQ_ISA
}  // namespace msvq
#endif
