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

template <class T, bool kVectors, bool kSums>
__global__ void __launch_bounds__(kThreads, 1) quantize_kernel(const QuantizeHopperParams p) {
  extern __shared__ __align__(128) char memory[];
  quantize_block<T, kVectors, kSums>(p, memory);
}

template <class T, bool kVectors, bool kSums>
cudaError_t launch(const QuantizeHopperParams& p, int blocks, cudaStream_t stream) {
  const auto kernel = quantize_kernel<T, kVectors, kSums>;
  const int bytes = quantize_shared_bytes<T>(p.num_codes, kSums);
  const std::lock_guard<std::mutex> lock(launching());
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return cleared(error);
  kernel<<<static_cast<unsigned>(blocks), kThreads, static_cast<size_t>(bytes), stream>>>(p);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch(const QuantizeHopperParams& p, int blocks, cudaStream_t stream) {
  if (!p.z_q) return launch<T, false, false>(p, blocks, stream);
  return p.sums ? launch<T, true, true>(p, blocks, stream)
                : launch<T, true, false>(p, blocks, stream);
}

template <class T>
__global__ void __launch_bounds__(256) sum_pieces_kernel(const QuantizeHopperTotals t) {
  const int piece = static_cast<int>((blockIdx.x * 256 + threadIdx.x) / 32);
  if (piece * kPiece < t.count) sum_piece<T>(t, piece);
}

template <class T>
void sum_pieces(const QuantizeHopperTotals& t, cudaStream_t stream) {
  const int pieces = (t.count + kPiece - 1) / kPiece;
  sum_pieces_kernel<T><<<static_cast<unsigned>((pieces + 7) / 8), 256, 0, stream>>>(t);
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

int total_hopper(const QuantizeHopperTotals& t, int device, void* stream) {
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return cuda::cleared(error);
  const auto on = static_cast<cudaStream_t>(stream);
  if (t.keys && t.type == LatentType::float32) cuda::sum_pieces<float>(t, on);
  if (t.keys && t.type == LatentType::float16) cuda::sum_pieces<cuda::Half>(t, on);
  if (t.keys && t.type == LatentType::bfloat16) cuda::sum_pieces<cuda::Bfloat>(t, on);
  const auto codes = static_cast<unsigned>(t.num_codes);
  cuda::totals_kernel<<<codes, cuda::kTotalThreads, 0, on>>>(t);
  return cudaGetLastError();
}

}  // namespace msvq
