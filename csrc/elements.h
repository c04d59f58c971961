// Element types of tensors: widened to float32 when read, rounded to nearest even when written.
//
// Included by files compiled once per instruction set: everything lives in msvq::MSVQ_ISA.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace msvq {
namespace MSVQ_ISA {

struct float16 {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

inline uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}
inline float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

inline float widen(float x) { return x; }
inline float widen(uint8_t x) { return static_cast<float>(x); }
inline float widen(bfloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t exponent = (x.bits >> 10) & 0x1fu, mantissa = x.bits & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: units of 2^-24
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return float_of(sign | bits_of(magnitude));
  }
  if (exponent == 31) return float_of(sign | 0x7f800000u | (mantissa << 13));
  return float_of(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

inline void narrow(float x, float* out) { *out = x; }
inline void narrow(float x, uint8_t* out) {
  x = x > 0.0f ? x : 0.0f;
  x = x < 255.0f ? x : 255.0f;
  // Adding 1.5 * 2^23 leaves units as the last bit, so the sum rounds half to even.
  *out = static_cast<uint8_t>(static_cast<int32_t>(x + 12582912.0f - 12582912.0f));
}
inline void narrow(float x, bfloat16* out) {
  const uint32_t u = bits_of(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
  out->bits = static_cast<uint16_t>(nan ? 0x7fc0u : rounded);
}
inline void narrow(float x, float16* out) {
  const uint32_t sign = (bits_of(x) >> 16) & 0x8000u, u = bits_of(x) & 0x7fffffffu;
  uint32_t half;
  if (u > 0x7f800000u) {
    half = 0x7e00u;  // NaN
  } else if (u >= 0x477ff000u) {
    half = 0x7c00u;  // 65520 and above round to infinity
  } else if (u < 0x38800000u) {
    // Subnormal: next to 0.5 the last bit of a float is worth 2^-24, so the sum rounds for us.
    half = bits_of(float_of(u) + 0.5f) - 0x3f000000u;
  } else {
    half = (u + 0xfffu + ((u >> 13) & 1u) - (112u << 23)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

// The first `n` elements of a row that vector instructions can convert; the rest is scalar.
template <class T>
inline int64_t widen_vectors(const T*, float*, int64_t) {
  return 0;
}
template <class T>
inline int64_t narrow_vectors(const float*, T*, int64_t) {
  return 0;
}
#if defined(__AVX512F__)
inline int64_t widen_vectors(const float16* x, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    _mm512_storeu_ps(out + i,
                     _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i))));
  return i;
}
inline int64_t narrow_vectors(const float* x, float16* out, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i),
                        _mm512_cvtps_ph(_mm512_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
  return i;
}
#elif defined(__AVX2__) && defined(__F16C__)
inline int64_t widen_vectors(const float16* x, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(out + i,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
  return i;
}
inline int64_t narrow_vectors(const float* x, float16* out, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
  return i;
}
#endif

// Rows of `n` elements; the plain loops vectorise for float32, bfloat16 and uint8.
template <class T>
inline void widen_row(const T* x, float* out, int64_t n) {
  for (int64_t i = widen_vectors(x, out, n); i < n; ++i) out[i] = widen(x[i]);
}
template <class T>
inline void narrow_row(const float* x, T* out, int64_t n) {
  for (int64_t i = narrow_vectors(x, out, n); i < n; ++i) narrow(x[i], out + i);
}

}  // namespace MSVQ_ISA
}  // namespace msvq
