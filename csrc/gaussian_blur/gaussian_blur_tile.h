// What the CUDA kernels that blur have in common: borders, types, and the sums of a thread.
#pragma once
#include "cuda/block.h"
#include "gaussian_blur/gaussian_blur.h"

namespace msvq {
namespace cuda {

constexpr int kRows = 8;  // rows of a step, and outputs of a thread per pass

// The pixel read at position i of a line of n pixels; -1 reads zero. Of 64 bits the remainder is a
// call.
template <class Index>
MSVQ_HOST_DEVICE Index border_source(Border border, Index i, Index n) {
  if (i >= 0 && i < n) return i;
  if (border == Border::constant) return -1;
  if (border == Border::replicate) return i < 0 ? 0 : n - 1;
  if (n == 1) return 0;
  const Index period = border == Border::circular    ? n
                       : border == Border::symmetric ? 2 * n
                                                     : 2 * (n - 1);
  Index j = i % period;
  if (j < 0) j += period;
  const Index mirrored = border == Border::symmetric ? 2 * n - 1 - j : period - j;
  return border == Border::circular || j < mirrored ? j : mirrored;
}

template <class Body>
MSVQ_DEVICE void for_type(ImageType type, const Body& body) {
  if (type == ImageType::float32) return body(Type<float>());
  if (type == ImageType::float16) return body(Type<float16>());
  if (type == ImageType::bfloat16) return body(Type<bfloat16>());
  body(Type<uint8_t>());
}

template <class Body>
MSVQ_DEVICE void for_float_type(ImageType type, const Body& body) {
  if (type == ImageType::float32) return body(Type<float>());
  if (type == ImageType::float16) return body(Type<float16>());
  body(Type<bfloat16>());
}

// Tap j of 2 * radius + 1, from the taps by their distance from the middle.
MSVQ_DEVICE float tap_at(const float* half, int radius, int j) {
  return half[j < radius ? radius - j : j - radius];
}

// kRows neighbouring outputs of a line whose first value is kBefore behind `from`, a multiple of 4;
// kRadius = 0 is any radius.
template <int kRadius, int kBefore = 0>
MSVQ_DEVICE void correlate_line(const float* half, int radius, const Shared<float>& lines, int from,
                                float (&sum)[kRows]) {
  if constexpr (kRadius > 0) {
    MSVQ_UNROLL
    for (int quad = 0; quad < 2 * kRadius + kRows + kBefore; quad += 4) {
      float word[4];
      load_quad(lines, from + quad, word);
      MSVQ_UNROLL
      for (int k = 0; k < 4; ++k) {
        MSVQ_UNROLL
        for (int i = 0; i < kRows; ++i) {
          const int j = quad + k - kBefore - i;
          if (j >= 0 && j <= 2 * kRadius) sum[i] += tap_at(half, kRadius, j) * word[k];
        }
      }
    }
  } else {
    float word[2 * kRows];
    load_quad(lines, from, word);
    load_quad(lines, from + 4, word + 4);
    MSVQ_NO_UNROLL
    for (int j0 = 0; j0 <= 2 * radius; j0 += kRows) {
      load_quad(lines, from + j0 + kRows, word + kRows);
      load_quad(lines, from + j0 + kRows + 4, word + kRows + 4);
      MSVQ_UNROLL
      for (int j = 0; j < kRows; ++j) {
        if (j0 + j > 2 * radius) break;
        const float weight = tap_at(half, radius, j0 + j);
        MSVQ_UNROLL
        for (int i = 0; i < kRows; ++i) sum[i] += weight * word[i + j];
      }
      MSVQ_UNROLL
      for (int i = 0; i < kRows; ++i) word[i] = word[kRows + i];
    }
  }
}

// Adds kRows values of a column, rows y to y + kRows - 1, to the sums they belong to; sum j is of
// the output row y - kRadius + j. The first kRows of them are then done, the others move down.
template <int kRadius>
MSVQ_DEVICE void add_rows(const float* half, const float (&value)[kRows],
                          float (&open)[2 * kRadius], float (&done)[kRows]) {
  float sum[2 * kRadius + kRows];
  MSVQ_UNROLL
  for (int r = 0; r < kRows; ++r) {
    MSVQ_UNROLL
    for (int j = 0; j <= 2 * kRadius; ++j) {
      const float before = r > 0 && j < 2 * kRadius    ? sum[r + j]
                           : r == 0 && j < 2 * kRadius ? open[j]
                                                       : 0.0f;
      // The taps are symmetric: tap 2 * kRadius - j is tap j.
      sum[r + j] = before + tap_at(half, kRadius, j) * value[r];
    }
  }
  MSVQ_UNROLL
  for (int r = 0; r < kRows; ++r) done[r] = sum[r];
  MSVQ_UNROLL
  for (int j = 0; j < 2 * kRadius; ++j) open[j] = sum[kRows + j];
}

}  // namespace cuda
}  // namespace msvq
