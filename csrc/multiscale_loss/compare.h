// Rows of contributions against rows of targets, for the multi-scale loss on the CPU.
//
// Included by files compiled once per instruction set: everything lives in msvq::MSVQ_ISA.
#pragma once
#include <cstdint>

#include "multiscale_loss/multiscale_loss.h"
#include "simd.h"

namespace msvq {
namespace MSVQ_ISA {
namespace {

// A row of every scale: targets, contributions, gradients or null, and factors of the gradients.
struct Rows {
  const float* targets[kMaxScales];
  const float* contributions[kMaxScales];
  float* grads[kMaxScales];
  float factors[kMaxScales];
};

// Compares `n` values of a row, writes the gradients, past the cache or not, and adds the squares
// to `sums`. Takes a copy of the rows: what it refers to would be read again after every store.
template <int kScales, bool kPastCache>
inline void compare_row(const Rows r, int64_t n, double* sums) {
  const auto compare = [&](auto value, auto read, auto write, auto* squares) {
    using Value = decltype(value);
    Value partial{}, grad{}, difference[kScales];
#pragma GCC unroll 4
    for (int m = 0; m < kScales; ++m) {
      partial += read(r.contributions[m]);
      difference[m] = partial - read(r.targets[m]);
      squares[m] += difference[m] * difference[m];
    }
#pragma GCC unroll 4
    for (int m = kScales - 1; m >= 0; --m) {
      grad += r.factors[m] * difference[m];
      if (r.grads[m]) write(r.grads[m], grad);
    }
  };
  vfloat squares[kScales] = {};
  float rest[kScales] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    compare(
        vfloat{}, [i](const float* p) { return load(p + i); },
        [i](float* p, vfloat v) { kPastCache ? store_past_cache(p + i, v) : store(p + i, v); },
        squares);
  for (; i < n; ++i)
    compare(0.0f, [i](const float* p) { return p[i]; }, [i](float* p, float v) { p[i] = v; }, rest);
  for (int m = 0; m < kScales; ++m) {
    double sum = rest[m];
    for (int k = 0; k < kLanes; ++k) sum += static_cast<double>(squares[m][k]);
    sums[m] += sum;
  }
}

}  // namespace
}  // namespace MSVQ_ISA
}  // namespace msvq
