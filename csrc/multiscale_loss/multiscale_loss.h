// The multi-scale loss of contributions and blurred images (Eq. 5-7) with its gradients, one pass.
#pragma once
#include <cstdint>

#include "gaussian_blur/gaussian_blur.h"

namespace msvq {

constexpr int kMaxScales = 4;

// Images are `planes` x `height` x `width` x `inner` values as in gaussian_blur.h. Scale 0 is the
// coarsest. A gradient may lie over its contribution: an element is read and written by one thread.
struct MultiscaleLossParams {
  const void* x;
  ImageType x_type;  // uint8 is read as x / 127.5 - 1
  const void* contributions[kMaxScales];
  void* grads[kMaxScales];  // null: none
  ImageType type;           // of contributions and gradients
  int64_t planes, height, width, inner;
  int64_t num_scales;
  const float* taps;  // 2 * radius + 1 taps, symmetric
  int64_t radius;
  Border border;
  double weights[kMaxScales];
  double loss_factor, grad_factor;  // 1 / count for a mean; a gradient may be finished later
  const float* upstream;            // on the tensors' device, times every gradient; null: 1
  double* partials;                 // CUDA: kMaxLossBlocks * kMaxScales; null: no loss is asked for
  float* loss;                      // the weighted sum; null: none is asked for
  float* per_scale;                 // the term of every scale; null where `loss` is
  int threads;                      // CPU
};

MSVQ_CPU_KERNEL(multiscale_loss, MultiscaleLossParams)

}  // namespace msvq
