// Launches of the vector quantizer for Hopper.
#include "vector_quantize/quantize_hopper_outputs.h"

namespace msvq {
namespace cuda {
namespace {

template <class T, bool kVectors>
__global__ void __launch_bounds__(kThreads, 1) quantize_kernel(const QuantizeHopperParams p) {
  extern __shared__ __align__(128) char memory[];
  quantize_block<T, kVectors>(p, memory);
}

template <class T, bool kVectors>
cudaError_t launch(const QuantizeHopperParams& p, int blocks, cudaStream_t stream) {
  const auto kernel = quantize_kernel<T, kVectors>;
  const int bytes = quantize_shared_bytes(p.num_codes);
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), kThreads, static_cast<size_t>(bytes), stream>>>(p);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch(const QuantizeHopperParams& p, int blocks, cudaStream_t stream) {
  return p.z_q ? launch<T, true>(p, blocks, stream) : launch<T, false>(p, blocks, stream);
}

}  // namespace
}  // namespace cuda

int vector_quantize_hopper(const QuantizeHopperParams& p, int blocks, int device, void* stream) {
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  const auto on = static_cast<cudaStream_t>(stream);
  if (p.type == LatentType::float32) return cuda::launch<float>(p, blocks, on);
  if (p.type == LatentType::float16) return cuda::launch<cuda::Half>(p, blocks, on);
  return cuda::launch<cuda::Bfloat>(p, blocks, on);
}

}  // namespace msvq
