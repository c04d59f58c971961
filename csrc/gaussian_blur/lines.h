// Where the CPU kernels that blur find and keep the lines of an image.
//
// Included by files compiled once per instruction set: everything lives in msvq::MSVQ_ISA.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>

#include "gaussian_blur/gaussian_blur.h"

namespace msvq {
namespace MSVQ_ISA {
namespace {

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The pixel read at position i of a line of n pixels; -1 reads zero. See reference.border_index.
inline int64_t border_source(Border border, int64_t i, int64_t n) {
  if (i >= 0 && i < n) return i;
  if (border == Border::constant) return -1;
  if (border == Border::replicate) return i < 0 ? 0 : n - 1;
  if (n == 1) return 0;
  const int64_t period = border == Border::circular    ? n
                         : border == Border::symmetric ? 2 * n
                                                       : 2 * (n - 1);
  int64_t j = i % period;
  if (j < 0) j += period;
  if (border == Border::symmetric) return min(j, 2 * n - 1 - j);
  if (border == Border::reflect) return min(j, period - j);
  return j;
}

constexpr int64_t kLine = 64;  // bytes of a line of cache

// Whether `rows` rows of `values` floats are stored past the cache: so many leave it again before
// anyone reads them, and each line would first be read. Whole lines of the cache only.
inline bool goes_past_cache(const void* out, int64_t values, int64_t rows) {
  constexpr int64_t kEnough = 4 << 20;  // bytes
  const int64_t bytes = values * int64_t{sizeof(float)};
  return kLanes * int64_t{sizeof(float)} == kLine && rows * bytes >= kEnough &&
         (static_cast<int64_t>(reinterpret_cast<uintptr_t>(out)) | bytes) % kLine == 0;
}

// Zeroed memory, aligned to a cache line.
template <class T>
struct Array {
  explicit Array(int64_t size)
      : base(std::calloc(static_cast<size_t>(size) + 64 / sizeof(T), sizeof(T))),
        data(reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(base) + 63) & ~uintptr_t{63})) {
    if (base == nullptr) throw std::bad_alloc();
  }
  ~Array() { std::free(base); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  T& operator[](int64_t i) const { return data[i]; }

  void* base;
  T* data;
};

}  // namespace
}  // namespace MSVQ_ISA
}  // namespace msvq
