// Large outputs on huge pages. Not for files compiled per instruction set.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace msvq {

// Asks Linux to back memory that is about to be written with 2 MiB pages, as NumPy does for its
// arrays: the first write to a fresh 12 MiB tensor otherwise takes 3072 page faults, a fifth of the
// time of a blur. Changes no value; a kernel that refuses changes nothing. Takes in the memory's
// first and last page: without them the first and last 2 MiB of a mapping would stay small pages.
inline void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  if (bytes < 4 << 20) return;
  const uintptr_t first = reinterpret_cast<uintptr_t>(data) / kPage * kPage;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes + kPage - 1) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace msvq
