// A kernel that is launched while the one before it still runs (sm_90, CUDA 11.8).
#pragma once
#include <cuda_runtime.h>

namespace msvq {
namespace cuda {

// In the kernel before: the next one may be launched as soon as all of its blocks have said so.
__device__ __forceinline__ void let_next_begin() {
  asm volatile("griddepcontrol.launch_dependents;");
}
// In the next one, before it reads or writes anything: until the kernel before has ended and what
// it wrote can be seen. So what is launched after both finds that too.
__device__ __forceinline__ void wait_for_kernel_before() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// `kernel` waits for the kernel before.
template <class Params>
cudaError_t launch_early(void (*kernel)(Params), const Params& params, unsigned grid, int threads,
                         cudaStream_t stream) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = static_cast<unsigned>(threads);
  config.stream = stream;
  config.attrs = &early, config.numAttrs = 1;
  static_cast<void>(cudaLaunchKernelEx(&config, kernel, params));
  return cudaGetLastError();  // and no other launch reports it again
}

}  // namespace cuda
}  // namespace msvq
