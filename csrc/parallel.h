// Work sharing for the CPU kernels: OpenMP with torch's thread count, which Python passes in.
//
// Included by files compiled once per instruction set, so everything lives in namespace
// msvq::MSVQ_ISA: an inline function shared between the copies would be merged by the linker, and
// the portable path could then run AVX-512 code.
#pragma once
#include <cstdint>
#include <new>

namespace msvq {
namespace MSVQ_ISA {

// Calls body(i) for i in [0, n). Which thread runs which i never changes what body(i) computes, so
// results do not depend on the thread count. Throws std::bad_alloc if any did.
template <class Body>
inline void parallel_for(int64_t n, int threads, const Body& body) {
  bool failed = false;  // no exception may leave a thread
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1 && n > 1)
#else
  (void)threads;
#endif
  for (int64_t i = 0; i < n; ++i) {
    try {
      body(i);
    } catch (const std::bad_alloc&) {
      __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
    }
  }
  if (failed) throw std::bad_alloc();
}

}  // namespace MSVQ_ISA
}  // namespace msvq
