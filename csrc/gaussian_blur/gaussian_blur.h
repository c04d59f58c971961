// Separable Gaussian blur of images (Eq. 7-8), forward and adjoint.
//
// An image tensor is `planes` x `height` x `width` x `inner` values, densely packed: NCHW has
// planes = N*C and inner = 1, channels_last has planes = N and inner = C. Borders and the adjoint
// are those of msvq_fast/ops/gaussian_blur/reference.py.
#pragma once
#include <cstdint>

#include "simd.h"

namespace msvq {

enum class Border { reflect, symmetric, replicate, circular, constant };
enum class ImageType { float32, float16, bfloat16, uint8 };

struct GaussianBlurParams {
  const void* x;
  void* out;
  ImageType type;
  int64_t planes, height, width, inner;
  const float* taps_y;  // 2 * radius_y + 1 taps, symmetric
  const float* taps_x;  // 2 * radius_x + 1 taps, symmetric
  int64_t radius_y, radius_x;
  Border border;
  bool adjoint;
  int threads;
};

MSVQ_CPU_KERNEL(gaussian_blur, GaussianBlurParams)

}  // namespace msvq
