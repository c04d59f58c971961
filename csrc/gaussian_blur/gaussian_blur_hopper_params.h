// What the Gaussian blur's kernel for Hopper is given (gaussian_blur_hopper.h).
#pragma once
#include <cstdint>

#include "gaussian_blur/gaussian_blur.h"

namespace msvq {
namespace cuda {

constexpr int kBand = 16;         // outputs of a product
constexpr int kBandHalo = 16;     // rows and columns around them; the largest radius
constexpr int kBandLeast = 14;    // the least: fewer taps cost less elsewhere, here they do not
constexpr int kBandBlocks = 3;    // blocks of 16 that outputs are sums of
constexpr int kBandPixels = 128;  // of a strip
constexpr int kBandColumns = kBandPixels + 2 * kBandHalo;
constexpr int kBandWarps = kBandColumns / kBand;
constexpr int kBandThreads = 32 * kBandWarps;
constexpr int kBandHeld = 2;       // thread blocks that share a multiprocessor
constexpr int kBandSteps = 64;     // of 16 rows that a block computes in one go
constexpr int kBandStart = 4;      // more steps that a plane costs
constexpr int kBandTapScale = 12;  // taps are multiplied by 2^12

struct BandParams {
  const void* x;
  void* out;
  Border border;
  bool pairs, out_pairs;  // two columns can be read, written at a time
  int height, width, radius;
  int count_x, groups;        // strips of a plane; blocks that share the units of one strip
  int steps, units;           // of 16 rows: of a plane, of all planes
  float half[kBandHalo + 1];  // taps by their distance from the middle
};

// Whether the kernel takes these images: not float32, whose two parts take it more operations, nor
// images that leave most of a strip empty.
inline bool is_banded(const GaussianBlurParams& g) {
  const bool apart = g.adjoint && (g.border == Border::reflect || g.border == Border::replicate);
  const bool is_half = g.type == ImageType::float16 || g.type == ImageType::bfloat16;
  bool fits = g.radius_y == g.radius_x && g.radius_x >= kBandLeast && g.radius_x <= kBandHalo &&
              !apart && g.inner == 1 && is_half && g.width >= kBandPixels / 4 * 3 &&
              (g.height + 256) * (g.width + 256) < INT32_MAX && g.planes * g.height < INT32_MAX;
  for (int64_t j = 0; fits && j <= 2 * g.radius_x; ++j) fits = g.taps_x[j] == g.taps_y[j];
  return fits;
}

inline BandParams band_params(const GaussianBlurParams& g, int64_t processors) {
  BandParams p{};
  p.x = g.x, p.out = g.out, p.border = g.border;
  p.height = static_cast<int>(g.height), p.width = static_cast<int>(g.width);
  p.radius = static_cast<int>(g.radius_x);
  p.pairs = g.width % 2 == 0 && reinterpret_cast<uintptr_t>(g.x) % 4 == 0;
  p.out_pairs = g.width % 2 == 0 && reinterpret_cast<uintptr_t>(g.out) % 4 == 0;
  p.steps = (p.height + kBand - 1) / kBand;
  p.units = static_cast<int>(g.planes * p.steps);
  p.count_x = (p.width + kBandPixels - 1) / kBandPixels;
  const int64_t groups = kBandHeld * processors / p.count_x;
  p.groups = static_cast<int>(groups < 1 ? 1 : groups < p.units ? groups : p.units);
  for (int64_t j = 0; j <= g.radius_x; ++j) p.half[j] = g.taps_x[g.radius_x + j];
  return p;
}

}  // namespace cuda

// Runs on the stream of the CUDA device with this index, where is_banded; returns a cudaError_t.
int gaussian_blur_hopper(const GaussianBlurParams& params, int device, void* stream);

// The same kernel on the host, as for a device of so many multiprocessors; see run_block for order.
void gaussian_blur_hopper_on_host(const GaussianBlurParams& params, int64_t processors, int order);

}  // namespace msvq
