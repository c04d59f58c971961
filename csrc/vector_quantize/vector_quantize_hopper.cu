// Launches of the vector quantizer for Hopper.
#include "cuda/launch.h"
#include "vector_quantize/quantize_hopper_sums.h"

namespace msvq {
namespace cuda {
namespace {

// An error that is reported here and not once more by the next launch.
cudaError_t cleared(cudaError_t error) {
  static_cast<void>(cudaGetLastError());
  return error;
}

// Of blocks with `bytes` of shared memory.
template <class Params>
cudaError_t launch(void (*kernel)(Params), const Params& params, int blocks, int threads, int bytes,
                   cudaStream_t stream) {
  const std::lock_guard<std::mutex> lock(launching());
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return cleared(error);
  kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads),
           static_cast<size_t>(bytes), stream>>>(params);
  return cudaGetLastError();
}

template <class T, bool kVectors, bool kSums>
__global__ void __launch_bounds__(kThreads, 1) quantize_kernel(const QuantizeHopperParams p) {
  extern __shared__ __align__(128) char memory[];
  quantize_block<T, kVectors, kSums>(p, memory);
}

template <class T, bool kVectors, bool kSums>
cudaError_t launch(const QuantizeHopperParams& p, int blocks, cudaStream_t stream) {
  return launch(quantize_kernel<T, kVectors, kSums>, p, blocks, kThreads,
                quantize_shared_bytes<T>(p.num_codes, kSums), stream);
}

template <class T>
cudaError_t launch(const QuantizeHopperParams& p, int blocks, cudaStream_t stream) {
  if (!p.z_q) return launch<T, false, false>(p, blocks, stream);
  return p.sums ? launch<T, true, true>(p, blocks, stream)
                : launch<T, true, false>(p, blocks, stream);
}

template <class T>
__global__ void __launch_bounds__(kSumThreads, 1) sum_rows_kernel(const QuantizeHopperSums p) {
  extern __shared__ __align__(128) char memory[];
  sum_rows<T>(p, memory);
}

template <class T>
cudaError_t launch(const QuantizeHopperSums& p, cudaStream_t stream) {
  return launch(sum_rows_kernel<T>, p, 2 * p.parts, kSumThreads, sum_shared_bytes(p.num_codes),
                stream);
}

__global__ void __launch_bounds__(kTotalThreads) totals_kernel(const QuantizeHopperTotals t) {
  __shared__ __align__(8) char memory[kTotalBytes];
  total_code(t, memory);
}

}  // namespace
}  // namespace cuda

int vector_quantize_hopper(const QuantizeHopperParams& p, int blocks, int device, void* stream) {
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return cuda::cleared(error);
  const auto on = static_cast<cudaStream_t>(stream);
  if (p.type == LatentType::float32) return cuda::launch<float>(p, blocks, on);
  if (p.type == LatentType::float16) return cuda::launch<cuda::Half>(p, blocks, on);
  return cuda::launch<cuda::Bfloat>(p, blocks, on);
}

int sum_rows_hopper(const QuantizeHopperSums& p, int device, void* stream) {
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return cuda::cleared(error);
  const auto on = static_cast<cudaStream_t>(stream);
  if (p.type == LatentType::float32) return cuda::launch<float>(p, on);
  if (p.type == LatentType::float16) return cuda::launch<cuda::Half>(p, on);
  return cuda::launch<cuda::Bfloat>(p, on);
}

int total_hopper(const QuantizeHopperTotals& t, int device, void* stream) {
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return cuda::cleared(error);
  const auto codes = static_cast<unsigned>(t.num_codes);
  cuda::totals_kernel<<<codes, cuda::kTotalThreads, 0, static_cast<cudaStream_t>(stream)>>>(t);
  return cudaGetLastError();
}

}  // namespace msvq
