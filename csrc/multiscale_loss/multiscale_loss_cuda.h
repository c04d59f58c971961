// What the multi-scale loss's CUDA kernels are given, and how a tensor is cut into their tasks.
#pragma once
#include <cstdint>

#include "gaussian_blur/gaussian_blur_cuda.h"
#include "multiscale_loss/multiscale_loss.h"

namespace msvq {

constexpr int kMaxLossBlocks = 4096;  // each leaves kMaxScales sums in `partials`

namespace cuda {

constexpr int kLossThreads = 256;

// Level l of a task is x blurred l times; the last is the coarsest target. A ring of rows in shared
// memory holds each level until the contributions meet it.
struct LossStrips {
  ImageType x_type, type;
  Border border;
  int radius, levels, pixels, channels;      // levels: how many blurs
  int line[kMaxScales], row[kMaxScales];     // words of a channel's line; of a row
  int ring[kMaxScales], base[kMaxScales];    // rows kept; first word
  int wide[kMaxScales], column[kMaxScales];  // outputs per channel in eights; first of a row's
  int columns, blurred_row, blurred_rows, words, elements;
  int64_t planes, height, width, inner;
  int64_t rows, count_x, count_y, count_channels, tasks;
};

template <int kRadius>
struct LossParams {
  const void* x;
  const void* contributions[kMaxScales];
  void* grads[kMaxScales];
  LossStrips strips;
  float taps[(kRadius ? kRadius : kMaxRadius) + 1];  // by their distance from the middle
  float factors[kMaxScales];                         // of the differences in the gradients
  const float* upstream;
  double* partials;
};

inline int eights(int n) { return (n + 7) / 8 * 8; }

inline int loss_shared_bytes(const LossStrips& s) {
  const int words = s.words + s.blurred_rows * s.blurred_row;
  return words * 4 + (s.elements + 3) / 4 * 4 * 8 + 16 * 8 + kLossThreads * 8;
}

// Lays out strips of `pixels` columns; false if a block has too few threads for their sums.
inline bool lay_out(LossStrips& s, bool streamed, int channels, int pixels) {
  const int last = s.levels;
  s.channels = channels;
  s.pixels = pixels;
  s.columns = s.words = 0;
  for (int l = 0; l <= last; ++l) {
    const int outputs = pixels + 2 * s.radius * (last - l);
    s.wide[l] = eights(outputs);
    s.column[l] = s.columns;
    if (l > 0) s.columns += channels * s.wide[l];
  }
  for (int l = 0; l <= last; ++l) {
    s.line[l] = l < last ? s.wide[l + 1] + eights(2 * s.radius + 1) : s.wide[l];
    // 4 words past a multiple of 8: 16-byte accesses of 4 neighbours on two rows meet in no bank.
    s.row[l] = channels * s.line[l] + 4;
    s.ring[l] = eights((last - l) * (8 + s.radius) + 8) + (l == 0 ? 8 : 0);
    s.base[l] = s.words;
    s.words += s.ring[l] * s.row[l];
  }
  s.blurred_row = s.columns + 4;
  s.blurred_rows = last == 0 ? 0 : streamed ? 8 : eights(2 * s.radius + 8);
  s.elements = channels * (pixels + 2 * s.radius * last);
  return s.columns <= kLossThreads && channels * pixels <= kLossThreads;
}

// The widest strips of which `room` bytes of shared memory hold one, none wider than the image.
inline bool widest(LossStrips& s, bool streamed, int room) {
  for (int channels = static_cast<int>(s.inner < 4 ? s.inner : 4); channels > 0; --channels) {
    const int64_t most = kLossThreads / channels / 8 * 8;
    for (int pixels = static_cast<int>(s.width < most ? (s.width + 7) / 8 * 8 : most); pixels > 0;
         pixels -= 8) {
      if (!lay_out(s, streamed, channels, pixels) || loss_shared_bytes(s) > room) continue;
      if (pixels < 16 && s.width > 8 && channels > 1) break;  // fewer channels waste less
      return true;
    }
  }
  return false;
}

// Cuts for `blocks` blocks that run at a time and blocks of at most `room` bytes of shared memory;
// false if that is too little. Two blocks share a multiprocessor unless strips get narrow.
inline bool cut(const MultiscaleLossParams& g, bool streamed, int64_t blocks, int room,
                LossStrips& s) {
  s.x_type = g.x_type, s.type = g.type, s.border = g.border;
  s.levels = static_cast<int>(g.num_scales) - 1;
  s.radius = s.levels ? static_cast<int>(g.radius) : 0;
  s.planes = g.planes, s.height = g.height, s.width = g.width, s.inner = g.inner;
  // The driver keeps 1 KiB of every block's share.
  const bool half = widest(s, streamed, room / 2 - 1024) && (s.pixels >= 40 || s.pixels >= s.width);
  if (!half && !widest(s, streamed, room)) return false;
  s.count_x = (g.width + s.pixels - 1) / s.pixels;
  lay_out(s, streamed, s.channels, eights(static_cast<int>((g.width - 1) / s.count_x + 1)));
  s.count_x = (g.width + s.pixels - 1) / s.pixels;
  s.count_channels = (g.inner + s.channels - 1) / s.channels;
  const int64_t strips = s.planes * s.count_x * s.count_channels;
  const int64_t around = s.levels * (2 * s.radius + 8);
  int64_t best = INT64_MAX;
  for (int64_t n = 1; n <= 64 && n <= (g.height + 7) / 8; ++n) {
    const int64_t rows = ((g.height + n - 1) / n + 7) / 8 * 8;
    const int64_t count = (g.height + rows - 1) / rows;
    const int64_t time = (strips * count + blocks - 1) / blocks * (rows + around);
    if (time >= best) continue;
    best = time, s.rows = rows, s.count_y = count;
  }
  s.tasks = strips * s.count_y;
  return true;
}

template <int kRadius>
bool loss_params(const MultiscaleLossParams& g, int64_t blocks, int room,
                 LossParams<kRadius>& params) {
  if (!cut(g, kRadius > 0, blocks, room, params.strips)) return false;
  params.x = g.x;
  for (int64_t m = 0; m < g.num_scales; ++m) {
    params.contributions[m] = g.contributions[m];
    params.grads[m] = g.grads[m];
    params.factors[m] = static_cast<float>(2 * g.weights[m] * g.grad_factor);
  }
  for (int j = 0; j <= params.strips.radius; ++j) params.taps[params.strips.radius - j] = g.taps[j];
  params.upstream = g.upstream;
  params.partials = g.partials;
  return true;
}

// Blocks that share the tasks, each with its place in `partials`.
inline int64_t loss_blocks(const LossStrips& s) {
  return s.tasks < kMaxLossBlocks ? s.tasks : kMaxLossBlocks;
}

inline int64_t count(const MultiscaleLossParams& g) {
  return g.planes * g.height * g.width * g.inner;
}

// The radius with a kernel of its own, else 0. The replicate border blurs a level's edge again for
// every row above it, and needs a kernel that keeps the rows.
inline int64_t streamed_radius(const MultiscaleLossParams& g) {
  return g.border == Border::replicate || g.num_scales == 1 ? 0 : g.radius;
}

// Whether blocks of `room` bytes of shared memory can hold a strip.
inline bool loss_fits(int64_t num_scales, int64_t radius, Border border, int64_t room) {
  if (num_scales < 1 || num_scales > kMaxScales || radius > kMaxRadius) return false;
  MultiscaleLossParams g{};
  g.num_scales = num_scales, g.radius = radius, g.border = border;
  g.planes = g.height = g.inner = 1, g.width = kLossThreads;
  LossStrips strips{};
  return for_radius(streamed_radius(g), [&](auto kind) {
    return cut(g, decltype(kind)::value > 0, 1, static_cast<int>(room), strips);
  });
}

}  // namespace cuda

// Run on the stream of the CUDA device with this index; return a cudaError_t.
int multiscale_loss_cuda(const MultiscaleLossParams& params, int device, void* stream);
// Multiplies the gradients by grad_factor * *upstream; reads none where that is 1.
int multiscale_loss_scale_cuda(const MultiscaleLossParams& params, int device, void* stream);

// The same kernels on the host: see gaussian_blur_cuda.h. `room` as in cuda::cut; false if it is
// too little.
bool multiscale_loss_cuda_on_host(const MultiscaleLossParams& params, int64_t blocks, int room,
                                  bool reversed);
void multiscale_loss_scale_cuda_on_host(const MultiscaleLossParams& params);

}  // namespace msvq
