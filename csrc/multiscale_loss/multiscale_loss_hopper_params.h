// What the multi-scale loss's kernel for Hopper is given (multiscale_loss_hopper.h).
#pragma once
#include <cstdint>

#include "gaussian_blur/gaussian_blur_hopper_params.h"
#include "multiscale_loss/multiscale_loss_cuda.h"

namespace msvq {
namespace cuda {

constexpr int kLossBandScales = 3;
// Pairs of blocks of 16 pixels, of a strip: one for every warp. On each side a strip reads a pair
// more of x, of which the nearer block is blurred once too.
constexpr int kLossBandPairs = 8;
constexpr int kLossBandWarps = kLossBandPairs + 2;
constexpr int kLossBandThreads = 32 * kLossBandWarps;
constexpr int kLossBandAhead = 4;   // blocks of rows read before the first is compared
constexpr int kLossBandSteps = 64;  // compared in one go
constexpr int kLossBandAround = 2;  // steps that the rows above a block's first cost it

struct LossBandParams {
  const float* x;
  const float* contributions[kLossBandScales];
  float* grads[kLossBandScales];
  int wanted;        // bits of the gradients that are stored
  float* levels[2];  // x blurred twice and once, of a pyramid in place of a loss
  Border border;
  int height, width, radius;
  int strip_pairs, count_x;        // pairs of blocks of a strip; strips of a plane
  int steps;                       // of 16 rows, of a plane
  int strips, blocks;              // of all planes; thread blocks that share their steps
  int share, rest;                 // steps of a thread block; thread blocks that have one more
  float half[kBandHalo + 1];       // taps by their distance from the middle
  float twice[2 * kBandHalo + 1];  // of two blurs
  float factors[kLossBandScales];  // of the differences in the gradients
  const float* upstream;
  double* partials;
};

// Whether the kernel takes these images. The borders are those that fold: there the blur of the
// folded image is the folded blur.
inline bool is_banded(const MultiscaleLossParams& g) {
  const bool folds =
      g.border == Border::reflect || g.border == Border::symmetric || g.border == Border::circular;
  bool fits = g.num_scales == kLossBandScales && g.type == ImageType::float32 &&
              g.x_type == g.type && g.inner == 1 && folds && g.radius >= kBandLeast &&
              g.radius <= kBandHalo && g.width % (2 * kBand) == 0 && g.height % kBand == 0 &&
              g.width >= kBandPixels / 4 * 3 && g.height > 0 && g.height < kBand << 14 &&
              g.planes > 0 && g.height < (int64_t{1} << 30) / g.width &&
              g.planes < (int64_t{1} << 31) / (g.height * g.width);
  const auto check = [&](const void* tensor) {
    fits = fits && reinterpret_cast<uintptr_t>(tensor) % 16 == 0;
  };
  check(g.x);
  for (int64_t m = 0; fits && m < g.num_scales; ++m) check(g.contributions[m]), check(g.grads[m]);
  return fits;
}

inline LossBandParams loss_band_params(const MultiscaleLossParams& g, int64_t processors) {
  LossBandParams p{};
  p.x = static_cast<const float*>(g.x), p.border = g.border;
  p.height = static_cast<int>(g.height), p.width = static_cast<int>(g.width);
  p.radius = static_cast<int>(g.radius);
  for (int m = 0; m < kLossBandScales; ++m) {
    p.contributions[m] = static_cast<const float*>(g.contributions[m]);
    p.grads[m] = static_cast<float*>(g.grads[m]);
    p.wanted |= g.grads[m] ? 1 << m : 0;
    p.factors[m] = static_cast<float>(2 * g.weights[m] * g.grad_factor);
  }
  const int wide = p.width / (2 * kBand);
  p.count_x = (wide + kLossBandPairs - 1) / kLossBandPairs;
  p.strip_pairs = (wide + p.count_x - 1) / p.count_x;
  p.steps = p.height / kBand;
  p.strips = static_cast<int>(g.planes * p.count_x);
  const int64_t units = int64_t{p.strips} * p.steps;
  const int64_t most = processors < kMaxLossBlocks ? processors : kMaxLossBlocks;
  p.blocks = static_cast<int>(most < 1 ? 1 : most < units ? most : units);
  const int cost = p.strips * (p.steps + kLossBandAround);
  p.share = cost / p.blocks, p.rest = cost % p.blocks;
  for (int64_t j = 0; j <= g.radius; ++j) p.half[j] = g.taps[g.radius + j];
  for (int64_t j = 0; j <= 2 * g.radius; ++j) {
    double sum = 0;
    for (int64_t k = j; k <= 2 * g.radius; ++k)
      sum += double{g.taps[k]} * g.taps[2 * g.radius + j - k];
    p.twice[j] = static_cast<float>(sum);
  }
  p.upstream = g.upstream;
  p.partials = g.partials;
  return p;
}

// The blur as the first of two, `twice` being for the second's output.
inline MultiscaleLossParams pyramid_as_loss(const GaussianBlurParams& g) {
  MultiscaleLossParams loss{};
  loss.x = g.x, loss.type = loss.x_type = g.type, loss.num_scales = kLossBandScales;
  loss.planes = g.planes, loss.height = g.height, loss.width = g.width, loss.inner = g.inner;
  loss.taps = g.taps_x, loss.radius = g.radius_x, loss.border = g.border;
  return loss;
}
inline bool is_banded_twice(const GaussianBlurParams& g, const void* twice) {
  bool fits = !g.adjoint && g.radius_y == g.radius_x && is_banded(pyramid_as_loss(g)) &&
              reinterpret_cast<uintptr_t>(g.out) % 8 == 0 &&
              reinterpret_cast<uintptr_t>(twice) % 8 == 0;
  for (int64_t j = 0; fits && j <= 2 * g.radius_x; ++j) fits = g.taps_x[j] == g.taps_y[j];
  return fits;
}
inline LossBandParams pyramid_params(const GaussianBlurParams& g, void* twice, int64_t processors) {
  LossBandParams p = loss_band_params(pyramid_as_loss(g), processors);
  p.levels[0] = static_cast<float*>(twice), p.levels[1] = static_cast<float*>(g.out);
  return p;
}

}  // namespace cuda

// Runs on the stream of the CUDA device with this index, where is_banded; returns a cudaError_t.
int multiscale_loss_hopper(const MultiscaleLossParams& params, int device, void* stream);

// Likewise two blurs, one after the other, where is_banded_twice.
int gaussian_pyramid_hopper(const GaussianBlurParams& params, void* twice, int device,
                            void* stream);

// The same kernels on the host, as for a device of so many multiprocessors; see run_block for
// order.
void multiscale_loss_hopper_on_host(const MultiscaleLossParams& params, int64_t processors,
                                    int order);
void gaussian_pyramid_hopper_on_host(const GaussianBlurParams& params, void* twice,
                                     int64_t processors, int order);

}  // namespace msvq
