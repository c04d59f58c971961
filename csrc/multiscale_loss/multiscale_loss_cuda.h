// The multi-scale loss on CUDA devices: which kernel runs, and its launch.
#pragma once
#include <cstdint>
#include <type_traits>

#include "multiscale_loss/multiscale_loss_ring_strips.h"
#include "multiscale_loss/multiscale_loss_strips.h"

namespace msvq {
namespace cuda {

inline int64_t count(const MultiscaleLossParams& g) {
  return g.planes * g.height * g.width * g.inner;
}

// The kernel that keeps the sums of a radius in registers; of radius 0 the one that keeps rows.
template <int kRadiusValue, int kScalesValue>
struct LossKernel {
  static constexpr int kRadius = kRadiusValue, kScales = kScalesValue;
};

// The replicate border blurs a level's edge again for every row above it, and needs the kernel that
// keeps the rows.
template <class Body>
auto for_loss_kernel(int64_t num_scales, int64_t radius, Border border, const Body& body) {
  const bool streamed = border != Border::replicate && num_scales > 1;
  return for_radius(streamed ? radius : 0, [&](auto found) {
    constexpr int kRadius = decltype(found)::value;
    if constexpr (kRadius == 0) {
      return body(LossKernel<0, 0>());
    } else {
      if (num_scales == 2) return body(LossKernel<kRadius, 2>());
      if (num_scales == 3) return body(LossKernel<kRadius, 3>());
      return body(LossKernel<kRadius, 4>());
    }
  });
}

// Whether blocks of `room` bytes of shared memory can hold a strip.
inline bool loss_fits(int64_t num_scales, int64_t radius, Border border, int64_t room) {
  if (num_scales < 1 || num_scales > kMaxScales || radius > kMaxRadius) return false;
  MultiscaleLossParams g{};
  g.num_scales = num_scales, g.radius = radius, g.border = border;
  g.planes = g.height = g.inner = 1, g.width = kLossThreads;
  return for_loss_kernel(num_scales, radius, border, [&](auto kernel) {
    std::conditional_t<decltype(kernel)::kRadius == 0, RingStrips, LossStrips> strips{};
    return cut(g, 1, static_cast<int>(room), strips);
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
