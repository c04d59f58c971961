// Four neighbouring values of a tensor at a time, one access where they lie at a multiple of four.
#pragma once
#include "cuda/block.h"
#include "gaussian_blur/gaussian_blur.h"

namespace msvq {
namespace cuda {

// Calls body with a type of the size of `type`, to read bits.
template <class Body>
MSVQ_DEVICE void for_size(ImageType type, const Body& body) {
  if (type == ImageType::float32) return body(Type<float>());
  if (type == ImageType::uint8) return body(Type<uint8_t>());
  body(Type<bfloat16>());
}

// Four elements as they lie in memory. `kOnce`: nobody reads them again, so the caches need not
// keep them.
template <bool kOnce, class T>
MSVQ_DEVICE void read_quad(const T* from, uint32_t (&bits)[4]) {
#if defined(__CUDACC__)
  if constexpr (sizeof(T) == 4) {
    const auto* at = reinterpret_cast<const uint4*>(from);
    const uint4 quad = kOnce ? __ldcs(at) : *at;
    bits[0] = quad.x, bits[1] = quad.y, bits[2] = quad.z, bits[3] = quad.w;
  } else if constexpr (sizeof(T) == 2) {
    const auto* at = reinterpret_cast<const uint2*>(from);
    const uint2 quad = kOnce ? __ldcs(at) : *at;
    bits[0] = quad.x, bits[1] = quad.y;
  } else {
    bits[0] = *reinterpret_cast<const uint32_t*>(from);
  }
#else
  if (reinterpret_cast<uintptr_t>(from) % (4 * sizeof(T)) != 0)
    throw std::out_of_range("a kernel read four elements off their boundary");
  memcpy(bits, from, 4 * sizeof(T));
#endif
}

// Element k of what read_quad read.
template <class T>
MSVQ_DEVICE float quad_value(const uint32_t (&bits)[4], int k) {
  constexpr int kPerWord = 4 / sizeof(T);
  return widen_bits<T>(bits[k / kPerWord] >> (k % kPerWord * 8 * static_cast<int>(sizeof(T))));
}

template <class T>
MSVQ_DEVICE void write_quad(const float (&value)[4], T* to) {
#if defined(__CUDACC__)
  if constexpr (sizeof(T) == 4) {
    __stcs(reinterpret_cast<float4*>(to), make_float4(value[0], value[1], value[2], value[3]));
  } else {
    T narrowed[4];
    MSVQ_UNROLL
    for (int k = 0; k < 4; ++k) narrow(value[k], narrowed + k);
    const uint32_t low = narrowed[0].bits | uint32_t{narrowed[1].bits} << 16;
    const uint32_t high = narrowed[2].bits | uint32_t{narrowed[3].bits} << 16;
    __stcs(reinterpret_cast<uint2*>(to), make_uint2(low, high));
  }
#else
  if (reinterpret_cast<uintptr_t>(to) % (4 * sizeof(T)) != 0)
    throw std::out_of_range("a kernel wrote four elements off their boundary");
  for (int k = 0; k < 4; ++k) narrow(value[k], to + k);
#endif
}

// Four indices at an index that is a multiple of 4.
MSVQ_DEVICE void load_quad(const Shared<int32_t>& from, int i, int (&to)[4]) {
#if defined(__CUDACC__)
  const int4 quad = *reinterpret_cast<const int4*>(from.data + i);
  to[0] = quad.x, to[1] = quad.y, to[2] = quad.z, to[3] = quad.w;
#else
  if (i % 4 != 0) throw std::out_of_range("a kernel read 16 bytes off their boundary");
  for (int k = 0; k < 4; ++k) to[k] = from[i + k];
#endif
}

}  // namespace cuda
}  // namespace msvq
