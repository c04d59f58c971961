// What the Gaussian blur's CUDA kernels are given, and how a tensor is cut into their tasks.
#pragma once
#include <algorithm>
#include <cstdint>

#include "gaussian_blur/gaussian_blur.h"

namespace msvq {
namespace cuda {

constexpr int kMaxRadius = 64;

// Pieces of an image tensor: pixels x channels x rows of one plane each. A block's threads own the
// columns of a piece, those around its pixels too.
struct BlurStrips {
  Border border;
  bool scaled;     // the adjoint of the reflect border, see BlurStream::is_edge_row
  bool collected;  // the adjoint of the replicate border, see BlurTaps
  bool quads;      // four outputs can be written at a time
  int radius_y, radius_x, pixels, channels, columns, threads;
  int wide;                         // pixels of a line in whole blocks of 8
  int line, line_row;               // words of a channel's line with its borders; of a row of lines
  int line_quad, bytes;             // words of 4 rows of lines; shared memory of a block
  int height, width, inner, pitch;  // pitch: elements of a row of the tensor
  int64_t planes, pitch_quad;       // pitch_quad: of 4 rows
  int rows;
  int64_t count_x, count_y, count_channels, tasks;
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

// Threads that share a multiprocessor's registers: 896 leave each 72, 768 80, 640 96.
template <int kRadius>
constexpr int kBlurThreads = kRadius > 15    ? 640
                             : kRadius == 15 ? 768
                                             : 896;

// What blocks share: `threads` and the bytes of `room` on each of `processors`.
struct BlurDevice {
  int64_t processors;
  int threads, room;
};

inline int to_multiple(int64_t n, int unit) {
  return static_cast<int>((n + unit - 1) / unit * unit);
}

// Rows of lines are 4 words past a multiple of 8 apart, so that the 16-byte accesses of 4
// neighbours on each of two rows meet in no bank. Lines and outputs are kept for two steps of 8
// rows.
inline void lay_out(BlurStrips& s, int pixels) {
  s.pixels = pixels;
  s.wide = to_multiple(pixels, 8);
  s.line = s.wide + to_multiple(2 * s.radius_x + 1, 8);
  s.columns = s.channels * (pixels + 2 * s.radius_x);
  const int outputs = s.channels * s.wide;
  s.threads = to_multiple(s.columns > outputs ? s.columns : outputs, 32);
  s.line_row = s.channels * s.line + 4;
  s.line_quad = 4 * s.line_row;
  s.bytes = 2 * 2 * 8 * 4 * s.line_row + 4 * 8 * 4;
}

// Cuts for the least time, which the busiest multiprocessor takes for its rows; every task also
// waits for its first rows and reads those around its own. The driver keeps 1 KiB of every block.
inline BlurStrips cut(const GaussianBlurParams& g, const BlurDevice& device) {
  BlurStrips s{};
  s.scaled = g.adjoint && g.border == Border::reflect;
  s.collected = g.adjoint && g.border == Border::replicate;
  s.border = s.collected ? Border::constant : g.border;
  s.radius_y = static_cast<int>(g.radius_y);
  s.radius_x = static_cast<int>(g.radius_x);
  s.planes = g.planes;
  s.height = static_cast<int>(g.height), s.width = static_cast<int>(g.width);
  s.inner = static_cast<int>(g.inner), s.pitch = static_cast<int>(g.width * g.inner);
  s.pitch_quad = 4 * g.width * g.inner;
  s.channels = s.inner < 4 ? s.inner : 4;
  s.quads = s.inner == 1 && s.width % 4 == 0 && s.width < INT32_MAX / 8 && !s.scaled &&
            reinterpret_cast<uintptr_t>(g.out) % 16 == 0;
  s.count_channels = (s.inner + s.channels - 1) / s.channels;
  BlurStrips best = s;
  int64_t least = INT64_MAX;
  for (int beside = 1; beside <= 7; ++beside) {
    const int columns = device.threads / 32 / beside * 32 / s.channels;
    int most = (columns - 2 * s.radius_x) / 8 * 8;
    if (most < 8) break;
    do {
      s.count_x = (s.width + most - 1) / most;
      lay_out(s, to_multiple((s.width + s.count_x - 1) / s.count_x, 8));
      most = s.pixels - 8;
    } while (s.bytes + 1024 > device.room && most > 0);
    const int64_t strips = s.planes * s.count_x * s.count_channels;
    const int held = std::min(device.threads / s.threads, device.room / (s.bytes + 1024));
    // Threads that are too few to hide what each waits for take as long as three quarters of all.
    const int64_t work = s.threads + s.channels * s.wide, idle = 2 * (device.threads / 4 * 3);
    for (int n = 1; n <= 64 && n <= (s.height + 7) / 8; ++n) {
      s.rows = to_multiple((s.height + n - 1) / n, 8);
      s.count_y = (s.height + s.rows - 1) / s.rows;
      s.tasks = strips * s.count_y;
      const int64_t load = (s.tasks + device.processors - 1) / device.processors;
      const int64_t waves = (load + held - 1) / held;
      const int64_t busy = load * work > waves * idle ? load * work : waves * idle;
      const int64_t time = busy * (s.rows + s.radius_y + 16);
      if (time < least) least = time, best = s;
      if (load > 8 * held) break;
    }
  }
  return best;
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
BlurParams<kRadius> blur_params(const GaussianBlurParams& g, int64_t processors, int room) {
  BlurParams<kRadius> params{};
  params.x = g.x;
  params.out = g.out;
  params.strips = cut(g, {processors, kBlurThreads<kRadius>, room});
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

// The radius with a kernel of its own, else 0: for axes that differ, and for the adjoints that
// treat the edges apart.
inline int64_t streamed_radius(const GaussianBlurParams& g) {
  const bool apart = g.adjoint && (g.border == Border::reflect || g.border == Border::replicate);
  return g.radius_y == g.radius_x && !apart ? g.radius_x : 0;
}

}  // namespace cuda

// Runs on the stream of the CUDA device with this index; returns a cudaError_t.
int gaussian_blur_cuda(const GaussianBlurParams& params, int device, void* stream);
const char* cuda_error_text(int error);

// The same kernel on the host, as for a device of so many multiprocessors; `reversed` runs the
// threads of every phase from last to first.
void gaussian_blur_cuda_on_host(const GaussianBlurParams& params, int64_t processors,
                                bool reversed);

}  // namespace msvq
