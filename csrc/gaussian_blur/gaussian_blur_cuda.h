// What the Gaussian blur's CUDA kernels are given, and how a tensor is cut into their tasks.
#pragma once
#include <cstdint>

#include "gaussian_blur/gaussian_blur.h"

namespace msvq {
namespace cuda {

constexpr int kMaxRadius = 64;

// Pieces of an image tensor: pixels x channels x rows of one plane each.
struct BlurStrips {
  ImageType type;
  Border border;
  bool scaled;     // the adjoint of the reflect border, see BlurStream::edge_scaled
  bool collected;  // the adjoint of the replicate border, see BlurTaps
  bool streamed;   // sums in registers; else a ring of rows
  int radius_y, radius_x, pixels, channels;
  int64_t planes, height, width, inner;
  int64_t rows, count_x, count_y, count_channels, tasks;
};

// Taps by their distance from the middle. A tail is the sum of the taps that a pixel, by its
// distance from the edge, gives to what lies outside and to the edge: the adjoint of the replicate
// border is the constant border with these in the first and last output.
template <int kRadius>
struct BlurTaps {
  static constexpr int kSize = (kRadius ? kRadius : kMaxRadius) + 1;
  float across[kSize], along[kSize], tail_across[kSize], tail_along[kSize];
};

template <int kRadius>
struct BlurParams {
  const void* x;
  void* out;
  BlurStrips strips;
  BlurTaps<kRadius> taps;
};

// Cuts for `blocks` blocks that run at a time: the number of row segments with the least time, when
// every segment also blurs the 2 * radius rows around it.
inline BlurStrips cut(const GaussianBlurParams& g, bool streamed, int64_t blocks) {
  BlurStrips s{};
  s.type = g.type;
  s.scaled = g.adjoint && g.border == Border::reflect;
  s.collected = g.adjoint && g.border == Border::replicate;
  s.border = s.collected ? Border::constant : g.border;
  s.streamed = streamed;
  s.radius_y = static_cast<int>(g.radius_y);
  s.radius_x = static_cast<int>(g.radius_x);
  s.planes = g.planes, s.height = g.height, s.width = g.width, s.inner = g.inner;
  s.channels = static_cast<int>(g.inner < 4 ? g.inner : 4);
  s.pixels = 128 / s.channels / 8 * 8;
  s.count_x = (g.width + s.pixels - 1) / s.pixels;
  s.count_channels = (g.inner + s.channels - 1) / s.channels;
  const int64_t strips = s.planes * s.count_x * s.count_channels;
  int64_t best = INT64_MAX;
  for (int64_t n = 1; n <= 64 && n <= (g.height + 7) / 8; ++n) {
    const int64_t rows = ((g.height + n - 1) / n + 7) / 8 * 8;
    const int64_t count = (g.height + rows - 1) / rows;
    const int64_t time = (strips * count + blocks - 1) / blocks * (rows + 2 * g.radius_y);
    if (time >= best) continue;
    best = time, s.rows = rows, s.count_y = count;
  }
  s.tasks = strips * s.count_y;
  return s;
}

inline void half_taps(const float* taps, int64_t radius, int64_t length, float* half, float* tail) {
  double sum = 0;
  for (int64_t j = 0; j <= radius; ++j) {
    sum += taps[j];
    half[radius - j] = taps[j];
    tail[radius - j] = static_cast<float>(sum);
  }
  if (length > 1) return;
  for (int64_t j = radius + 1; j <= 2 * radius; ++j) sum += taps[j];
  tail[0] = static_cast<float>(sum);
}

template <int kRadius>
BlurParams<kRadius> blur_params(const GaussianBlurParams& g, int64_t blocks) {
  BlurParams<kRadius> params{};
  params.x = g.x;
  params.out = g.out;
  params.strips = cut(g, kRadius > 0, blocks);
  half_taps(g.taps_y, g.radius_y, g.height, params.taps.across, params.taps.tail_across);
  half_taps(g.taps_x, g.radius_x, g.width, params.taps.along, params.taps.tail_along);
  return params;
}

template <int kValue>
struct Radius {
  static constexpr int value = kValue;
};

// Calls body with the radius that has a kernel of its own (the paper's kernels), or with 0.
template <class Body>
auto for_radius(int64_t radius, const Body& body) {
  switch (radius) {
    case 5:
      return body(Radius<5>());
    case 7:
      return body(Radius<7>());
    case 10:
      return body(Radius<10>());
    case 15:
      return body(Radius<15>());
    case 22:
      return body(Radius<22>());
    default:
      return body(Radius<0>());
  }
}

}  // namespace cuda

// Runs on the stream of the CUDA device with this index; returns a cudaError_t.
int gaussian_blur_cuda(const GaussianBlurParams& params, int device, void* stream);
const char* cuda_error_text(int error);

// The same kernel on the host, as for a device that runs `blocks` blocks at a time; `reversed` runs
// the threads of every phase from last to first.
void gaussian_blur_cuda_on_host(const GaussianBlurParams& params, int64_t blocks, bool reversed);

}  // namespace msvq
