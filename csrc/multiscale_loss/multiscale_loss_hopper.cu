// Launches of the multi-scale loss for Hopper.
#include "cuda/launch.h"
#include "multiscale_loss/multiscale_loss_hopper.h"

namespace msvq {
namespace cuda {
namespace {

__global__ void __launch_bounds__(kLossBandThreads, 1)
    multiscale_loss_bands_kernel(const __grid_constant__ LossBandParams p) {
  extern __shared__ float4 memory[];
  BandLoss(p, *reinterpret_cast<LossBandShared*>(memory)).run();
}

}  // namespace
}  // namespace cuda

int multiscale_loss_hopper(const MultiscaleLossParams& g, int device, void* stream) {
  int processors = 0;
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const cuda::LossBandParams params = cuda::loss_band_params(g, processors);
  constexpr int kBytes = sizeof(cuda::LossBandShared);
  {
    const std::lock_guard<std::mutex> lock(cuda::launching());
    error = cudaFuncSetAttribute(cuda::multiscale_loss_bands_kernel,
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    if (error != cudaSuccess) return error;
    cuda::
        multiscale_loss_bands_kernel<<<static_cast<unsigned>(params.blocks), cuda::kLossBandThreads,
                                       kBytes, static_cast<cudaStream_t>(stream)>>>(params);
    error = cudaGetLastError();
  }
  if (error != cudaSuccess || !g.partials) return error;
  return multiscale_loss_sum_cuda(g, params.blocks, stream);
}

}  // namespace msvq
