// What launches have in common.
#pragma once
#include <mutex>

namespace msvq {
namespace cuda {

// Held from setting what belongs to a kernel, as its limit of shared memory, until it is launched:
// another thread may launch the same kernel for other sizes.
inline std::mutex& launching() {
  static std::mutex mutex;
  return mutex;
}

}  // namespace cuda
}  // namespace msvq
