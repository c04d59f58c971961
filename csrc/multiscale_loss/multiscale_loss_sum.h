// What follows the multi-scale loss's pass on a CUDA device: the sum of its sums, and the factor of
// gradients that were stored before it was known.
#pragma once
#include "cuda/block.h"
#include "gaussian_blur/gaussian_blur_tile.h"
#include "multiscale_loss/multiscale_loss_cuda.h"
#include "multiscale_loss/quads.h"

namespace msvq {
namespace cuda {

struct LossSumState {
  double sum[kMaxScales];
};

// One block adds up what the blocks left, in a fixed order, and writes the loss.
struct LossSum {
  const double* partials;
  int64_t count;
  int num_scales;
  double weights[kMaxScales];
  double factor;
  float* loss;

  MSVQ_DEVICE void run(Block<LossSumState>& block, const Shared<double>& sums) const {
    double weighted = 0;  // thread 0's
    MSVQ_UNROLL
    for (int m = 0; m < kMaxScales; ++m) {
      if (m >= num_scales) continue;
      block.each([&](int thread, LossSumState&) {
        double sum = 0;
        for (int64_t i = thread; i < count; i += kLossThreads) sum += partials[i * kMaxScales + m];
        sums[thread] = sum;
      });
      MSVQ_NO_UNROLL
      for (int half = kLossThreads / 2; half > 0; half /= 2)
        block.each([&](int thread, LossSumState&) {
          if (thread < half) sums[thread] += sums[thread + half];
        });
      block.each([&](int thread, LossSumState&) {
        if (thread != 0) return;
        weighted += weights[m] * (sums[0] * factor);
        loss[1 + m] = static_cast<float>(sums[0] * factor);
        loss[0] = static_cast<float>(weighted);
      });
    }
  }
};

// Times factor * *upstream over gradients that were stored without it.
struct LossScale {
  void* grads[kMaxScales];
  int num_scales;
  ImageType type;
  int64_t count;
  float factor;
  const float* upstream;

  MSVQ_DEVICE void run(int64_t first, int64_t stride) const {
    const float scale = factor * *upstream;
    if (scale == 1.0f) return;
    for_float_type(type, [&](auto kind) {
      using T = typename decltype(kind)::type;
      MSVQ_UNROLL
      for (int m = 0; m < kMaxScales; ++m) {
        T* const grad = static_cast<T*>(grads[m]);
        if (!grad) continue;
        const bool aligned = reinterpret_cast<uintptr_t>(grad) % (4 * sizeof(T)) == 0;
        const int64_t quads = aligned ? count / 4 : 0;
        for (int64_t i = first; i < quads; i += stride) {
          uint32_t bits[4];
          float value[4];
          read_quad<true>(grad + 4 * i, bits);
          MSVQ_UNROLL
          for (int k = 0; k < 4; ++k) value[k] = quad_value<T>(bits, k) * scale;
          write_quad(value, grad + 4 * i);
        }
        for (int64_t i = 4 * quads + first; i < count; i += stride)
          narrow(widen(grad[i]) * scale, grad + i);
      }
    });
  }
};

inline LossSum loss_sum(const MultiscaleLossParams& g, int64_t blocks) {
  LossSum sum{g.partials, blocks, static_cast<int>(g.num_scales), {}, g.loss_factor, g.loss};
  for (int m = 0; m < sum.num_scales; ++m) sum.weights[m] = g.weights[m];
  return sum;
}

inline LossScale loss_scale(const MultiscaleLossParams& g) {
  LossScale scale{{},       static_cast<int>(g.num_scales),    g.type,
                  count(g), static_cast<float>(g.grad_factor), g.upstream};
  for (int m = 0; m < scale.num_scales; ++m) scale.grads[m] = g.grads[m];
  return scale;
}

}  // namespace cuda
}  // namespace msvq
