// What a CUDA kernel of this project is written against, so that its source also runs on the host.
//
// A kernel is a sequence of phases between barriers: block.each(phase) calls phase(thread, state)
// for every thread of the block, then waits for all. What a thread keeps from phase to phase is its
// State. On the device that is a struct in registers and __syncthreads(); on the host it is an
// array of States and a loop over the threads, in either order: results that differ between the
// orders show a barrier that is missing. The host also checks every index into shared memory.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define MSVQ_DEVICE __device__ __forceinline__
#define MSVQ_HOST_DEVICE __host__ __device__ inline
#define MSVQ_UNROLL _Pragma("unroll")
#define MSVQ_NO_UNROLL _Pragma("unroll 1")
#else
#include <stdexcept>
#include <vector>
#define MSVQ_DEVICE inline
#define MSVQ_HOST_DEVICE inline
#define MSVQ_UNROLL
#define MSVQ_NO_UNROLL
#define MSVQ_ISA on_host
#include "elements.h"
#undef MSVQ_ISA
#endif

namespace msvq {
namespace cuda {

#if defined(__CUDACC__)

template <class State>
struct Block {
  template <class Phase>
  MSVQ_DEVICE void each(const Phase& phase) {
    phase(static_cast<int>(threadIdx.x), state);
    __syncthreads();
  }
  State state;
};

template <class T>
struct Shared {
  MSVQ_DEVICE T& operator[](int i) const { return data[i]; }
  T* data;
};

// Four floats at an index that is a multiple of 4: one 16-byte access.
MSVQ_DEVICE void load_quad(const Shared<float>& from, int i, float* to) {
  const float4 quad = *reinterpret_cast<const float4*>(from.data + i);
  to[0] = quad.x, to[1] = quad.y, to[2] = quad.z, to[3] = quad.w;
}
MSVQ_DEVICE void store_quad(const Shared<float>& to, int i, const float* from) {
  *reinterpret_cast<float4*>(to.data + i) = make_float4(from[0], from[1], from[2], from[3]);
}

struct float16 {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};
MSVQ_DEVICE float widen(float x) { return x; }
MSVQ_DEVICE float widen(uint8_t x) { return static_cast<float>(x); }
MSVQ_DEVICE float widen(bfloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
MSVQ_DEVICE float widen(float16 x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
}
MSVQ_DEVICE void narrow(float x, float* out) { *out = x; }
MSVQ_DEVICE void narrow(float x, uint8_t* out) {
  *out = static_cast<uint8_t>(__float2int_rn(fminf(fmaxf(x, 0.0f), 255.0f)));
}
MSVQ_DEVICE void narrow(float x, bfloat16* out) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out->bits) : "f"(x));
}
MSVQ_DEVICE void narrow(float x, float16* out) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out->bits) : "f"(x));
}

// Four neighbouring elements at a multiple of their size: one access, which the compiler splits
// when it is written in C++.
MSVQ_DEVICE void narrow_quad(const float* from, float* to) {
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(from[0]), "f"(from[1]),
               "f"(from[2]), "f"(from[3])
               : "memory");
}
template <class T>
MSVQ_DEVICE void narrow_quad(const float* from, T* to) {
  T quad[4];
  MSVQ_UNROLL
  for (int k = 0; k < 4; ++k) narrow(from[k], quad + k);
  uint32_t words[sizeof(T)];
  memcpy(words, quad, sizeof quad);
  if constexpr (sizeof(T) == 2)
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(words[0]), "r"(words[1])
                 : "memory");
  else
    asm volatile("st.global.u32 [%0], %1;" ::"l"(to), "r"(words[0]) : "memory");
}

// Two likewise.
template <class T>
MSVQ_DEVICE void narrow_pair(float first, float second, T* to) {
  static_assert(sizeof(T) == 2, "of half precision");
  T pair[2];
  narrow(first, pair), narrow(second, pair + 1);
  uint32_t word;
  memcpy(&word, pair, sizeof word);
  asm volatile("st.global.u32 [%0], %1;" ::"l"(to), "r"(word) : "memory");
}

#else

using on_host::bfloat16;
using on_host::float16;
using on_host::narrow;
using on_host::widen;

template <class State>
struct Block {
  template <class Phase>
  void each(const Phase& phase) {
    const int threads = static_cast<int>(states.size());
    for (int i = 0; i < threads; ++i) {
      const int thread = reversed ? threads - 1 - i : i;
      phase(thread, states[static_cast<size_t>(thread)]);
    }
  }
  std::vector<State> states;
  bool reversed;
};

template <class T>
struct Shared {
  T& operator[](int i) const {
    if (i < 0 || i >= size) throw std::out_of_range("a kernel left its shared memory");
    return data[i];
  }
  T* data;
  int size;
};

inline void load_quad(const Shared<float>& from, int i, float* to) {
  if (i % 4 != 0) throw std::out_of_range("a kernel read 16 bytes off their boundary");
  for (int k = 0; k < 4; ++k) to[k] = from[i + k];
}
inline void store_quad(const Shared<float>& to, int i, const float* from) {
  if (i % 4 != 0) throw std::out_of_range("a kernel wrote 16 bytes off their boundary");
  for (int k = 0; k < 4; ++k) to[i + k] = from[k];
}
template <class T>
void narrow_quad(const float* from, T* to) {
  if (reinterpret_cast<uintptr_t>(to) % (4 * sizeof(T)) != 0)
    throw std::out_of_range("a kernel wrote four elements off their boundary");
  for (int k = 0; k < 4; ++k) narrow(from[k], to + k);
}
template <class T>
void narrow_pair(float first, float second, T* to) {
  if (reinterpret_cast<uintptr_t>(to) % (2 * sizeof(T)) != 0)
    throw std::out_of_range("a kernel wrote two elements off their boundary");
  narrow(first, to), narrow(second, to + 1);
}

#endif

// Hands out a block's shared memory piece by piece; without memory it only counts.
struct SharedCarver {
  template <class T>
  MSVQ_HOST_DEVICE Shared<T> take(int count) {
    Shared<T> piece{};
    piece.data = reinterpret_cast<T*>(memory + bytes);
#if !defined(__CUDACC__)
    piece.size = count;
#endif
    bytes += (count * static_cast<int>(sizeof(T)) + 15) / 16 * 16;
    return piece;
  }
  char* memory;
  int bytes;
};

// The bits of an element, kept as they are until they are needed: a conversion right after a read
// would wait for the memory.
template <class T>
MSVQ_DEVICE uint32_t read_bits(const T* from) {
  const T value = *from;
  uint32_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class T>
MSVQ_DEVICE float widen_bits(uint32_t bits) {
  T value;
  memcpy(&value, &bits, sizeof value);
  return widen(value);
}

template <class T>
struct Type {
  using type = T;
};

}  // namespace cuda
}  // namespace msvq
