// Vectors whose lanes are neighbouring tokens of a row: transposed loads and stores, dot products
// with register tiles, exp. Everything is local to the file that includes it.
#pragma once
#include <cstdlib>
#include <new>

#include "elements.h"
#include "simd.h"
#include "transpose.h"

namespace msvq {
namespace MSVQ_ISA {
namespace {

template <class T>
struct Simd;
template <>
struct Simd<float> {
  typedef vfloat vec;
  static constexpr int lanes = kLanes;
  static constexpr int rows = kLanes == 16 ? 4 : 2;  // of a register tile: 4 x 6 need 32 registers
};
template <>
struct Simd<double> {
  typedef vdouble vec;
  static constexpr int lanes = kLanes / 2;
  static constexpr int rows = 1;
};
template <class T>
using Vec = typename Simd<T>::vec;

template <class T>
inline Vec<T> load_vec(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
inline void store_vec(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}
template <class T>
inline Vec<T> splat(T x) {
  return x - Vec<T>{};
}

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory that a thread keeps from one task to the next: the system would take large blocks back
// each time and hand out zeroed pages anew. Blocks are given back in the reverse order of taking.
struct Arena {
  ~Arena() { std::free(base); }
  char* take(size_t bytes) {
    used += bytes;
    if (used > wanted) wanted = used;
    if (used <= size) return base + used - bytes;
    char* const block = static_cast<char*>(std::malloc(bytes));
    if (block == nullptr) {
      used -= bytes;
      throw std::bad_alloc();
    }
    return block;
  }
  void give_back(char* block, size_t bytes) {
    if (used > size) std::free(block);
    used -= bytes;
    if (used > 0 || wanted <= size || wanted > kMost) return;
    std::free(base);
    base = static_cast<char*>(std::malloc(wanted));
    size = base == nullptr ? 0 : wanted;
  }

  static constexpr size_t kMost = size_t{16} << 20;
  char* base = nullptr;
  size_t size = 0, used = 0, wanted = 0;
};
thread_local Arena arena;

// Uninitialised memory of the thread's arena, aligned to a cache line.
template <class T>
struct Buffer {
  explicit Buffer(int64_t count)
      : bytes(static_cast<size_t>(count) * sizeof(T) / 64 * 64 + 128),
        block(arena.take(bytes)),
        data(reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(block) + 63) & ~uintptr_t{63})) {}
  ~Buffer() { arena.give_back(block, bytes); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T& operator[](int64_t i) const { return data[i]; }

  size_t bytes;
  char* block;
  T* data;
};

template <class T>
inline void fill(T* p, int64_t n, float x) {
  for (int64_t i = 0; i < n; ++i) p[i] = x;
}

constexpr float kNone = -__builtin_inff();  // the score of a pair outside the window

// exp for x <= 0 or a little above, to 1 ulp; below -87 it is 0, NaN stays NaN. As in Cephes:
// x = n ln 2 + r, ln 2 in two parts of which n times the first is exact, e^r by a polynomial.
inline vfloat exponential(vfloat x) {
  const vfloat magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vfloat shifted = x * 1.44269504f + magic;
  const vfloat n = shifted - magic;
  const vfloat r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vfloat y = splat(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  vint power;
  std::memcpy(&power, &shifted, sizeof power);
  power = (power + 127) << 23;
  vfloat two_to_n;
  std::memcpy(&two_to_n, &power, sizeof two_to_n);
  return x < -87.0f ? vfloat{} : y * two_to_n;
}
inline vdouble exponential(vdouble x) {
  for (int i = 0; i < Simd<double>::lanes; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

// The natural logarithm of normal x > 0 to 1 ulp; NaN stays NaN. As in Cephes: log m by a
// polynomial in m - 1, and e times the two parts of ln 2.
inline vfloat logarithm(vfloat x) {
  vint bits;
  std::memcpy(&bits, &x, sizeof bits);
  // x = m 2^e with m in [sqrt(1/2), sqrt(2))
  const vint exponent = (bits - 0x3f3504f3) >> 23;
  bits -= exponent << 23;
  vfloat m, e;
  std::memcpy(&m, &bits, sizeof m);
  for (int i = 0; i < kLanes; ++i) e[i] = static_cast<float>(exponent[i]);
  const vfloat z = m - 1.0f;
  vfloat y = splat(7.0376836292e-2f);
  y = y * z - 1.1514610310e-1f;
  y = y * z + 1.1676998740e-1f;
  y = y * z - 1.2420140846e-1f;
  y = y * z + 1.4249322787e-1f;
  y = y * z - 1.6668057665e-1f;
  y = y * z + 2.0000714765e-1f;
  y = y * z - 2.4999993993e-1f;
  y = y * z + 3.3333331174e-1f;
  y = y * z * z * z - e * 2.12194440e-4f - 0.5f * z * z;
  const vfloat value = z + y + e * 0.693359375f;
  return x == x ? value : x;
}
inline vdouble logarithm(vdouble x) {
  for (int i = 0; i < Simd<double>::lanes; ++i) x[i] = __builtin_log(x[i]);
  return x;
}

template <class V>
inline V larger(V a, V b) {
  return a > b ? a : b;
}

// How an element type is computed with.
template <class E>
struct Compute {
  typedef float type;
};
template <>
struct Compute<double> {
  typedef double type;
};
using MSVQ_ISA::narrow_row;
using MSVQ_ISA::widen_row;
inline void widen_row(const double* x, double* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = x[i];
}
inline void narrow_row(const double* x, double* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = x[i];
}

// The first vector of channels of a token, and the first `width` of them with zeros behind.
inline vfloat load_channels(const float* p) { return load_vec(p); }
inline vdouble load_channels(const double* p) { return load_vec(p); }
template <class E>
inline vfloat load_channels(const E* p) {
  float wide[kLanes];
  widen_row(p, wide, kLanes);
  return load_vec(wide);
}
template <class T, class E>
inline Vec<T> load_channels(const E* p, int64_t width) {
  T wide[Simd<T>::lanes] = {};
  widen_row(p, wide, width);
  return load_vec(wide);
}

// Loads one token per lane (null reads zeros) with its channels along `out`:
// out[c * stride + lane] = factor * token[lane][c].
template <class E, class T = typename Compute<E>::type>
__attribute__((noinline)) void load_tokens(const E* const* tokens, int64_t channels, T factor,
                                           T* out, int64_t stride) {
  constexpr int n = Simd<T>::lanes;
  bool all = true;
  for (int i = 0; i < n; ++i) all &= tokens[i] != nullptr;
  int64_t c = 0;
  for (; c + n <= channels; c += n) {
    Vec<T> v[n];
    if (all) {
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) v[i] = load_channels(tokens[i] + c);
    } else {
      for (int i = 0; i < n; ++i)
        v[i] = tokens[i] == nullptr ? Vec<T>{} : load_channels(tokens[i] + c);
    }
    transpose(v);
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) store_vec(out + (c + i) * stride, v[i] * factor);
  }
  if (c == channels) return;
  Vec<T> v[n];
  for (int i = 0; i < n; ++i)
    v[i] = tokens[i] == nullptr ? Vec<T>{} : load_channels<T>(tokens[i] + c, channels - c);
  transpose(v);
  for (int i = 0; i < channels - c; ++i) store_vec(out + (c + i) * stride, v[i] * factor);
}

inline void store_channels(vfloat v, float* p) { store_vec(p, v); }
inline void store_channels(vdouble v, double* p) { store_vec(p, v); }
template <class E>
inline void store_channels(vfloat v, E* p) {
  float wide[kLanes];
  store_vec(wide, v);
  narrow_row(wide, p, kLanes);
}
template <class T, class E>
inline void store_channels(Vec<T> v, E* p, int64_t width) {
  T wide[Simd<T>::lanes];
  store_vec(wide, v);
  narrow_row(wide, p, width);
}

// The reverse: token[lane][c] = factor[lane] * in[c][lane]; null is not written.
template <class E, class T = typename Compute<E>::type>
__attribute__((noinline)) void store_tokens(const T* in, int64_t channels, Vec<T> factor,
                                            E* const* tokens) {
  constexpr int n = Simd<T>::lanes;
  for (int64_t c = 0; c < channels; c += n) {
    const int64_t width = least(n, channels - c);
    Vec<T> v[n];
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) v[i] = i < width ? load_vec(in + (c + i) * n) * factor : Vec<T>{};
    transpose(v);
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
      if (tokens[i] == nullptr) continue;
      if (width == n) {
        store_channels(v[i], tokens[i] + c);
      } else {
        store_channels<T>(v[i], tokens[i] + c, width);
      }
    }
  }
}

// One row of moving tokens as the lanes of stationary tokens meet it: channel c of candidate j of
// the lanes from x on is at `at(j)[c * channel + x]`. Within a plane, candidates are `candidate`
// apart.
template <class T>
struct Moving {
  T* data;
  int64_t candidate, channel, per_plane, plane;

  T* at(int64_t j) const { return data + j / per_plane * plane + j % per_plane * candidate; }
};

// sums[r][j] = sum over c of stationary row r (rows `row` apart, [c][lane]) times candidate j.
template <class T, int kR, int kJ>
inline void dots(const T* stationary, int64_t row, const T* moving, const Moving<T>& layout,
                 int64_t channels, Vec<T> (&sums)[kR][kJ]) {
#pragma GCC unroll 4
  for (int r = 0; r < kR; ++r)
#pragma GCC unroll 6
    for (int j = 0; j < kJ; ++j) sums[r][j] = Vec<T>{};
  for (int64_t c = 0; c < channels; ++c) {
    Vec<T> mine[kR];
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r) mine[r] = load_vec(stationary + r * row + c * Simd<T>::lanes);
#pragma GCC unroll 6
    for (int j = 0; j < kJ; ++j) {
      const Vec<T> other = load_vec(moving + j * layout.candidate + c * layout.channel);
#pragma GCC unroll 4
      for (int r = 0; r < kR; ++r) sums[r][j] += mine[r] * other;
    }
  }
}

// out row r += sum over j of weights[r][j] * candidate j.
template <class T, int kR, int kJ>
inline void accumulate(const Vec<T> (&weights)[kR][kJ], const T* moving, const Moving<T>& layout,
                       int64_t channels, T* out, int64_t row) {
  for (int64_t c = 0; c < channels; ++c) {
    Vec<T> sum[kR];
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r) sum[r] = load_vec(out + r * row + c * Simd<T>::lanes);
#pragma GCC unroll 6
    for (int j = 0; j < kJ; ++j) {
      const Vec<T> other = load_vec(moving + j * layout.candidate + c * layout.channel);
#pragma GCC unroll 4
      for (int r = 0; r < kR; ++r) sum[r] += weights[r][j] * other;
    }
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r) store_vec(out + r * row + c * Simd<T>::lanes, sum[r]);
  }
}

}  // namespace
}  // namespace MSVQ_ISA
}  // namespace msvq
