// Blocks of rows: reading latents and writing code vectors in either layout.
//
// Latents whose D values are neighbours (channels_last, (..., D)) are handled row by row, the
// others (NCHW) d by d, so that both are read and written in runs and never permuted in memory.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>

#include "elements.h"
#include "vector_quantize/vector_quantize.h"

namespace msvq {
namespace MSVQ_ISA {

// A multiple of every tile's rows; the running best of so many rows stays in the first cache.
#if defined(__AVX512F__)
constexpr int64_t kBlockRows = 64;
#else
constexpr int64_t kBlockRows = 48;
#endif

// Codes scored together.
constexpr int64_t kPanel = 2 * kLanes;

// Uninitialised scratch memory that frees itself. (Not std::aligned_alloc: Windows has none.)
template <class T>
struct Scratch {
  static constexpr std::align_val_t kLine{64};
  T* data;
  explicit Scratch(int64_t n)
      : data(static_cast<T*>(
            ::operator new((static_cast<size_t>(n) * sizeof(T) + 127) / 64 * 64, kLine))) {}
  ~Scratch() { ::operator delete(data, kLine); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T& operator[](int64_t i) { return data[i]; }
  const T& operator[](int64_t i) const { return data[i]; }
};

template <class T>
struct Rows {
  T* data;
  RowStrides strides;
  int64_t inner;

  bool by_row() const { return strides.d == 1; }
  T* at(int64_t row) const {
    return data + row / inner * strides.outer + row % inner * strides.inner;
  }
  // Calls body(first, count, pointer) for the runs of rows [row, row + count) that share `outer`.
  template <class Body>
  void runs(int64_t row, int64_t count, const Body& body) const {
    for (int64_t done = 0; done < count;) {
      const int64_t left = inner - (row + done) % inner;
      const int64_t run = left < count - done ? left : count - done;
      body(done, run, at(row + done));
      done += run;
    }
  }
};

// Memory that is wanted next: a block of rows as runs of bytes at a fixed distance.
struct Ahead {
  const char* start;
  int64_t runs, bytes, stride;
};

template <class T>
inline Ahead block_ahead(const Rows<T>& z, int64_t row, int64_t width) {
  const char* start = reinterpret_cast<const char*>(z.at(row));
  constexpr int64_t size = sizeof(T);
  if (!z.by_row()) return {start, width, kBlockRows * size, z.strides.d * size};
  return {start, kBlockRows, width * size,
          (z.inner > 1 ? z.strides.inner : z.strides.outer) * size};
}

// Asks for part `i` of `n`. Addresses past the tensor are harmless.
inline void prefetch(const Ahead& ahead, int64_t i, int64_t n) {
  for (int64_t run = ahead.runs * i / n; run < ahead.runs * (i + 1) / n; ++run)
    for (int64_t byte = 0; byte < ahead.bytes; byte += 64)
      __builtin_prefetch(ahead.start + run * ahead.stride + byte, 0, 2);
}

// A row's values in float32, in `scratch` where they are not yet.
inline const float* widened(const float* p, int64_t, float*) { return p; }
template <class T>
inline const float* widened(const T* p, int64_t width, float* scratch) {
  widen_row(p, scratch, width);
  return scratch;
}

// One row in float32.
template <class T>
inline void read_row(const Rows<const T>& z, int64_t row, int64_t width, float* out) {
  const T* p = z.at(row);
  if (z.by_row()) {
    widen_row(p, out, width);
  } else {
    for (int64_t d = 0; d < width; ++d) out[d] = widen(p[d * z.strides.d]);
  }
}

// Rows [row, row + count) of column d in float32, for latents kept d by d.
template <class T>
inline void read_column(const Rows<const T>& z, int64_t row, int64_t count, int64_t d, float* out) {
  z.runs(row, count, [&](int64_t first, int64_t run, const T* p) {
    widen_row(p + d * z.strides.d, out + first, run);
  });
}

template <class T>
inline void write_column(const Rows<T>& z, int64_t row, int64_t count, int64_t d, const float* in) {
  z.runs(row, count, [&](int64_t first, int64_t run, T* p) {
    narrow_row(in + first, p + d * z.strides.d, run);
  });
}

// The code vectors of `count` rows, d by d: out[d * kBlockRows + i].
inline void gather_columns(const float* codebook, const int64_t* codes, int64_t count,
                           int64_t width, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    const float* e = codebook + codes[i] * width;
    for (int64_t d = 0; d < width; ++d) out[d * kBlockRows + i] = e[d];
  }
}

#if defined(__AVX512F__)
inline float horizontal_sum(vfloat v) {
  return _mm512_reduce_add_ps(reinterpret_cast<const __m512&>(v));
}
#else
inline float horizontal_sum(vfloat v) {
  float lanes[kLanes], sum = 0;
  store(lanes, v);
  for (int i = 0; i < kLanes; ++i) sum += lanes[i];
  return sum;
}
#endif

}  // namespace MSVQ_ISA
}  // namespace msvq
