// Launches of the multi-scale loss's CUDA kernels.
#include "multiscale_loss/multiscale_loss_cuda.h"
#include "multiscale_loss/multiscale_loss_ring.h"
#include "multiscale_loss/multiscale_loss_sum.h"

namespace msvq {
namespace cuda {
namespace {

template <class Runner>
__global__ void __launch_bounds__(Runner::kMaxThreads, Runner::kBlocks)
    multiscale_loss_kernel(const typename Runner::Params params) {
  extern __shared__ float4 memory[];
  Block<typename Runner::State> block;
  Runner runner(params, reinterpret_cast<char*>(memory));
  runner.run(block, blockIdx.x, gridDim.x);
}

__global__ void __launch_bounds__(kLossThreads) multiscale_loss_sum_kernel(const LossSum sum) {
  __shared__ double sums[kLossThreads];
  Block<LossSumState> block;
  sum.run(block, Shared<double>{sums});
}

__global__ void __launch_bounds__(kLossThreads)
    multiscale_loss_scale_kernel(const LossScale scale) {
  scale.run(int64_t{blockIdx.x} * kLossThreads + threadIdx.x, int64_t{gridDim.x} * kLossThreads);
}

template <class Runner>
cudaError_t launch(const MultiscaleLossParams& g, int device, cudaStream_t stream, int64_t& grid) {
  const auto kernel = multiscale_loss_kernel<Runner>;
  typename Runner::Params params{};
  int processors = 0, room = 0;
  cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&room, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  const int64_t pairs = int64_t{processors} * 2;
  if (!loss_params(g, pairs, room, params)) return cudaErrorInvalidConfiguration;
  const int bytes = loss_shared_bytes(params.strips);
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  grid = loss_blocks(params.strips, pairs);
  kernel<<<static_cast<unsigned>(grid), params.strips.threads, bytes, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace
}  // namespace cuda

int multiscale_loss_cuda(const MultiscaleLossParams& g, int device, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  int64_t blocks = 0;
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess && cuda::count(g) > 0)
    error = cuda::for_loss_kernel(g.num_scales, g.radius, g.border, [&](auto kernel) {
      return cuda::launch<cuda::LossRunner<decltype(kernel)>>(g, device, on, blocks);
    });
  if (error != cudaSuccess || !g.partials) return error;
  cuda::multiscale_loss_sum_kernel<<<1, cuda::kLossThreads, 0, on>>>(cuda::loss_sum(g, blocks));
  return cudaGetLastError();
}

int multiscale_loss_scale_cuda(const MultiscaleLossParams& g, int device, void* stream) {
  const int64_t blocks = (cuda::count(g) + cuda::kLossThreads - 1) / cuda::kLossThreads;
  if (blocks == 0) return cudaSuccess;
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  const unsigned grid = static_cast<unsigned>(blocks < kMaxLossBlocks ? blocks : kMaxLossBlocks);
  cuda::multiscale_loss_scale_kernel<<<grid, cuda::kLossThreads, 0,
                                       static_cast<cudaStream_t>(stream)>>>(cuda::loss_scale(g));
  return cudaGetLastError();
}

}  // namespace msvq
