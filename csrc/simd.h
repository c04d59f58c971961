// Vector types per instruction set, and the choice between the copies at run time.
//
// CMake compiles every <op>_cpu.cpp once per instruction set with MSVQ_ISA naming it. A kernel is
// written once, against `vfloat`, inside namespace msvq::MSVQ_ISA.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace msvq {

enum class Isa { portable, avx2, avx512 };

// The best instruction set of this processor that the build holds.
inline Isa cpu_isa() {
#ifdef MSVQ_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::portable;
}

}  // namespace msvq

// Declares `function` in each instruction set's namespace and a dispatcher of the same name in
// msvq:: that takes an Isa first. Used in <op>.h.
#ifdef MSVQ_X86
#define MSVQ_FOR_X86(text) text
#else
#define MSVQ_FOR_X86(text)
#endif
#define MSVQ_CPU_KERNEL(function, Params)                                 \
  namespace portable {                                                    \
  void function(const Params&);                                           \
  }                                                                       \
  MSVQ_FOR_X86(                                                           \
      namespace avx2 { void function(const Params&); } namespace avx512 { \
        void function(const Params&);                                     \
      })                                                                  \
  inline void function(Isa isa, const Params& params) {                   \
    MSVQ_FOR_X86(if (isa == Isa::avx512) return avx512::function(params); \
                 if (isa == Isa::avx2) return avx2::function(params);)    \
    (void)isa;                                                            \
    portable::function(params);                                           \
  }

#ifdef MSVQ_ISA
namespace msvq {
namespace MSVQ_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float vfloat __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t vint __attribute__((vector_size(kLanes * sizeof(float))));
// As many bytes, half as many lanes.
typedef double vdouble __attribute__((vector_size(kLanes * sizeof(float))));
typedef int64_t vlong __attribute__((vector_size(kLanes * sizeof(float))));

inline vfloat load(const float* p) {
  vfloat v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, vfloat v) { std::memcpy(p, &v, sizeof v); }
// A whole line of cache to memory, not to the cache, where the processor can; aligned.
inline void store_past_cache(float* p, vfloat v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, reinterpret_cast<__m512>(v));
#else
  store(p, v);
#endif
}
// Such stores are seen by other threads after this.
inline void finish_stores() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}
// a * b + c, rounded once where the processor can: left to itself, a compiler fuses one product or
// another of a sum.
inline vfloat multiply_add(vfloat a, vfloat b, vfloat c) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (vfloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
inline vfloat broadcast(float x) { return x - vfloat{}; }  // x - 0 is x, also for -0

}  // namespace MSVQ_ISA
}  // namespace msvq
#endif
