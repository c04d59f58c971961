// Numbers, their bits, vectors of them and accesses to memory under the names that kernels have for
// them, on the host.
#pragma once
#include <math.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>

#define MSVQ_ISA on_host
#include "elements.h"
#undef MSVQ_ISA

namespace msvq {
namespace cuda {

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline float half_of(uint32_t pair, int i) {
  return on_host::widen(on_host::float16{static_cast<uint16_t>(pair >> (16 * i))});
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __float_as_int(float x) { return static_cast<int>(on_host::bits_of(x)); }
inline unsigned __float_as_uint(float x) { return on_host::bits_of(x); }
inline float __int_as_float(int x) { return on_host::float_of(static_cast<uint32_t>(x)); }
inline float __uint_as_float(unsigned x) { return on_host::float_of(x); }

// volatile: never contracted.
inline double __dadd_rn(double a, double b) {
  const volatile double sum = a + b;
  return sum;
}
inline double __dsub_rn(double a, double b) {
  const volatile double difference = a - b;
  return difference;
}
inline double __dmul_rn(double a, double b) {
  const volatile double product = a * b;
  return product;
}

// The other operand for NaN, and -0 below 0. fmaf, fabsf, sqrtf, fmin and fmax are those of math.h.
inline float fminf(float a, float b) {
  if (a != a || b != b) return a != a ? b : a;
  return a < b || (a == b && __float_as_int(a) < 0) ? a : b;
}
inline float fmaxf(float a, float b) {
  if (a != a || b != b) return a != a ? b : a;
  return a > b || (a == b && __float_as_int(a) >= 0) ? a : b;
}
inline float larger_or_nan(float a, float b) { return a != a || b != b ? NAN : fmaxf(a, b); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline float quick_root(float x) { return sqrtf(x); }

inline uint32_t pack_halves(float low, float high) {
  on_host::float16 pair[2];
  on_host::narrow(low, pair), on_host::narrow(high, pair + 1);
  return static_cast<uint32_t>(pair[1].bits) << 16 | pair[0].bits;
}
inline float2 unpack_halves(uint32_t bits) { return {half_of(bits, 0), half_of(bits, 1)}; }
inline uint32_t pack_bfloats(float low, float high) {
  on_host::bfloat16 pair[2];
  on_host::narrow(low, pair), on_host::narrow(high, pair + 1);
  return static_cast<uint32_t>(pair[1].bits) << 16 | pair[0].bits;
}
inline float2 unpack_bfloats(uint32_t bits) {
  return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xFFFF0000u)};
}

// No fiber can come between: they give way in collectives alone. Bytes are copied, since kernels
// look at the same memory as more than one type.
template <class T>
T read_as(const T* from) {
  if (reinterpret_cast<uintptr_t>(from) % alignof(T) != 0)
    throw std::out_of_range("a kernel read off a boundary");
  T value;
  memcpy(&value, from, sizeof value);
  return value;
}
template <class T>
void write_as(T* to, T value) {
  if (reinterpret_cast<uintptr_t>(to) % alignof(T) != 0)
    throw std::out_of_range("a kernel wrote off a boundary");
  memcpy(to, &value, sizeof value);
}
inline int atomicAdd(int* to, int x) {
  const int old = read_as(to);
  write_as(to, old + x);
  return old;
}
inline int atomicMax(int* to, int x) {
  const int old = read_as(to);
  write_as(to, old < x ? x : old);
  return old;
}
template <class T>
T __ldg(const T* from) {
  return read_as(from);
}
template <class T>
void __stcs(T* to, T value) {
  write_as(to, value);
}
template <class T>
T load_now(const T* from) {
  return read_as(from);
}
template <class T>
void store_where(int sign, T* to, T value) {
  if (sign >= 0) write_as(to, value);
}
inline void add_where(uint32_t there, float4& sum, const float4& x) {
  if (there) sum = {sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w};
}
inline void prefetch_bytes(const void* from, int bytes) {
  if (bytes % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0)
    throw std::logic_error("what is brought nearer is whole 16 bytes at multiples of 16");
}
inline int least_of_three(int a, int b, int c) { return min(min(a, b), c); }
template <class T>
T again(T x) {
  return x;
}
inline void prefetch_second(const void*) {}

}  // namespace cuda
}  // namespace msvq
