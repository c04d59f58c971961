// What follows the multi-scale loss's pass on a CUDA device: the sum of its sums, and the factor of
// gradients that were stored before it was known.
#pragma once
#include "cuda/block.h"
#include "gaussian_blur/gaussian_blur_tile.h"
#include "multiscale_loss/multiscale_loss_cuda.h"
#include "multiscale_loss/quads.h"

namespace msvq {
namespace cuda {

struct LossSumState {};  // nothing is kept from phase to phase

// One block adds up what the blocks left, in a fixed order, and writes the loss.
struct LossSum {
  const double* partials;
  int64_t count;
  int num_scales;
  double weights[kMaxScales];
  double factor;
  float *loss, *per_scale;

  // A thread's sums are of one scale, thread % kMaxScales: all threads read together what lies
  // together, and the barriers serve all scales.
  MSVQ_DEVICE void run(Block<LossSumState>& block, const Shared<double>& sums) const {
    static_assert((kMaxScales & (kMaxScales - 1)) == 0, "half of a block holds whole scales");
    block.each([&](int thread, LossSumState&) {
      double sum = 0, part[4];  // all four are read before one is waited for
      const int64_t end = thread % kMaxScales < num_scales ? count * kMaxScales : 0;
      for (int64_t i = thread; i < end; i += 4 * kLossThreads) {
        MSVQ_UNROLL
        for (int k = 0; k < 4; ++k) {
          const int64_t at = i + k * kLossThreads;
          part[k] = at < end ? partials[at] : 0;
        }
        MSVQ_UNROLL
        for (int k = 0; k < 4; ++k) sum += part[k];
      }
      sums[thread] = sum;
    });
    MSVQ_NO_UNROLL
    for (int half = kLossThreads / 2; half >= kMaxScales; half /= 2)
      block.each([&](int thread, LossSumState&) {
        if (thread < half) sums[thread] += sums[thread + half];
      });
    block.each([&](int thread, LossSumState&) {
      if (thread < num_scales) per_scale[thread] = static_cast<float>(sums[thread] * factor);
      if (thread != 0) return;
      double weighted = 0;
      MSVQ_UNROLL
      for (int m = 0; m < kMaxScales; ++m)
        if (m < num_scales) weighted += weights[m] * (sums[m] * factor);
      *loss = static_cast<float>(weighted);
    });
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
  LossSum sum{};
  sum.partials = g.partials, sum.count = blocks;
  sum.num_scales = static_cast<int>(g.num_scales);
  sum.factor = g.loss_factor;
  sum.loss = g.loss, sum.per_scale = g.per_scale;
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
