// The definition's distance: float64, summed in order of d, multiply and add rounded separately.
#pragma once
#include <cstdint>

#include "simd.h"
#include "vector_quantize/rows.h"

namespace msvq {
namespace MSVQ_ISA {

constexpr int kDoubles = kLanes / 2;

// Hides a product from the compiler, which may not then contract it with the addition after it.
inline vdouble rounded(vdouble x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#else
  volatile vdouble y = x;
  x = y;
#endif
  return x;
}

// The nearest of `count` codes where it is nearer by more than float32 could hide, else -1.
inline int64_t clearly_nearest(const float* z, const float* codebook, int64_t width,
                               const int64_t* codes, int count) {
  float best = __builtin_inff(), second = best;
  int64_t nearest = -1;
  for (int i = 0; i < count; ++i) {
    const float* e = codebook + codes[i] * width;
    vfloat sum = {};
    float distance = 0;
    int64_t d = 0;
    for (; d + kLanes <= width; d += kLanes) {
      const vfloat difference = load(z + d) - load(e + d);
      sum += difference * difference;
    }
    for (; d < width; ++d) distance += (z[d] - e[d]) * (z[d] - e[d]);
    distance += horizontal_sum(sum);
    // Without a branch, which could not be predicted.
    const float loser = distance < best ? best : distance;
    second = loser < second ? loser : second;
    nearest = distance < best ? codes[i] : nearest;
    best = distance < best ? distance : best;
  }
  // Twice the rounding of a difference, its square and the sum; squares that underflow are far
  // below what `second` must be.
  const float error = static_cast<float>(width + 8) * 0x1p-23f;
  const bool clear = second > 0x1p-60f && second * (1 - error) > best * (1 + error);
  return clear ? nearest : -1;
}

// The nearest of the codes added, the lowest index on ties; kDoubles of them are measured at once.
// Code 0 if none is at a finite distance.
class NearestExact {
 public:
  NearestExact(const float* z, const float* codebook, int64_t width)
      : z_(z), codebook_(codebook), width_(width), best_(__builtin_inf()), code_(0), pending_(0) {}

  void add(int64_t code) {
    codes_[pending_++] = code;
    if (pending_ == kDoubles) measure();
  }

  int64_t result() {
    if (pending_ > 0) measure();
    return code_;
  }

 private:
  void measure() {
    const float* e[kDoubles];
    for (int i = 0; i < kDoubles; ++i)
      e[i] = codebook_ + codes_[i < pending_ ? i : pending_ - 1] * width_;
    vdouble distance = {};
    for (int64_t d = 0; d < width_; ++d) {
      vdouble code;
      for (int i = 0; i < kDoubles; ++i) code[i] = e[i][d];
      const vdouble difference = static_cast<double>(z_[d]) - code;
      distance += rounded(difference * difference);
    }
    for (int i = 0; i < pending_; ++i) {
      if (distance[i] < best_ || (distance[i] == best_ && codes_[i] < code_)) {
        best_ = distance[i];
        code_ = codes_[i];
      }
    }
    pending_ = 0;
  }

  const float* z_;
  const float* codebook_;
  int64_t width_;
  double best_;
  int64_t code_;
  int pending_;
  int64_t codes_[kDoubles];
};

}  // namespace MSVQ_ISA
}  // namespace msvq
