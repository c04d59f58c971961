// Four neighbouring values of a tensor at a time, one access where they lie at a multiple of four.
#pragma once
#include "cuda/block.h"
#include "gaussian_blur/gaussian_blur.h"

namespace msvq {
namespace cuda {

// Runs two phases, the second on what threads of the same warp left in the first, and waits for the
// block. The host runs warp after warp.
template <class State, class First, class Second>
MSVQ_DEVICE void each_in_warps(Block<State>& block, const First& first, const Second& second) {
#if defined(__CUDACC__)
  first(static_cast<int>(threadIdx.x), block.state);
  __syncwarp();
  second(static_cast<int>(threadIdx.x), block.state);
  __syncthreads();
#else
  const int threads = static_cast<int>(block.states.size());
  for (int begin = 0; begin < threads; begin += 32) {
    const auto run = [&](const auto& phase) {
      for (int i = begin; i < begin + 32; ++i) {
        const int thread = block.reversed ? threads - 1 - i : i;
        phase(thread, block.states[static_cast<size_t>(thread)]);
      }
    };
    run(first);
    run(second);
  }
#endif
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

}  // namespace cuda
}  // namespace msvq
