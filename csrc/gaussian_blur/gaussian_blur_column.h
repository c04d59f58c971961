// What a thread of the Gaussian blur on CUDA does to a column: the rows it reads near the border,
// and the sums of its open rows.
#pragma once
#include "gaussian_blur/gaussian_blur_tile.h"

namespace msvq {
namespace cuda {

// border_source by walking, for lines not much shorter than the kernel: a division of 64-bit
// integers would take registers that the sums need.
MSVQ_HOST_DEVICE int walked_source(Border border, int i, int n) {
  if (i >= 0 && i < n) return i;
  if (border == Border::constant) return -1;
  if (border == Border::replicate) return i < 0 ? 0 : n - 1;
  if (n == 1) return 0;
  const int edge = border == Border::symmetric ? 1 : 0;
  while (i < 0 || i >= n) {
    if (border == Border::circular)
      i += i < 0 ? n : -n;
    else
      i = i < 0 ? -edge - i : 2 * (n - 1) + edge - i;
  }
  return i;
}

// Sums of a column in blocks of kRows outputs. The rows of step i belong to the blocks
// i - kAhead to i, whose sums lie kRows apart from sum 0 on; block i - kAhead is then complete.
template <int kRadius>
struct BlurColumn {
  static constexpr int kAhead = (2 * kRadius + kRows - 1) / kRows;

  // Adds to the blocks first to end - 1, counted from i - kAhead; the others are not of this task.
  // `open` then holds the sums kRows places further down, `done` is called with those complete.
  template <int kBlock = 0, class Done>
  static MSVQ_DEVICE void add(const float* half, const float (&value)[kRows],
                              float (&open)[2 * kRadius], int first, int end, const Done& done) {
    if (kBlock >= first && kBlock < end) {
      float sum[kRows];
      MSVQ_UNROLL
      for (int i = 0; i < kRows; ++i) {
        const int at = kBlock * kRows + i;
        sum[i] = at < 2 * kRadius ? open[at < 2 * kRadius ? at : 0] : 0.0f;
        MSVQ_UNROLL
        for (int r = 0; r < kRows; ++r) {
          const int j = at - r;  // The taps are symmetric: tap 2 * kRadius - j is tap j.
          if (j >= 0 && j <= 2 * kRadius) sum[i] += tap_at(half, kRadius, j) * value[r];
        }
      }
      if constexpr (kBlock == 0) done(sum);
      MSVQ_UNROLL
      for (int i = 0; i < kRows; ++i) {
        const int to = (kBlock - 1) * kRows + i;
        if (to >= 0 && to < 2 * kRadius) open[to] = sum[i];
      }
    }
    if constexpr (kBlock < kAhead) add<kBlock + 1>(half, value, open, first, end, done);
  }
};

template <>
struct BlurColumn<0> {
  static constexpr int kAhead = 0;
};

}  // namespace cuda
}  // namespace msvq
