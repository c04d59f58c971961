// Launches of the multi-scale loss and of pyramids for Hopper.
#include "cuda/launch.h"
#include "cuda/launch_early.h"
#include "multiscale_loss/multiscale_loss_hopper.h"
#include "multiscale_loss/multiscale_loss_sum.h"

namespace msvq {
namespace cuda {
namespace {

template <bool kLoss>
__global__ void __launch_bounds__(kLossBandThreads, 1)
    levels_bands_kernel(const __grid_constant__ LossBandParams p) {
  if (kLoss && p.partials) let_next_begin();
  extern __shared__ float4 memory[];
  BandLevels<kLoss>(p, *reinterpret_cast<LossBandShared<kLoss>*>(memory)).run();
}

__global__ void __launch_bounds__(kLossThreads) loss_bands_sum_kernel(const LossSum sum) {
  __shared__ double sums[kLossThreads];
  wait_for_kernel_before();
  Block<LossSumState> block;
  sum.run(block, Shared<double>{sums});
}

// With the parameters that `params_for` has for so many multiprocessors; `blocks` becomes that of
// thread blocks.
template <bool kLoss, class ParamsFor>
cudaError_t launch(const ParamsFor& params_for, int device, void* stream, int& blocks) {
  int processors = 0;
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const LossBandParams params = params_for(processors);
  blocks = params.blocks;
  constexpr int kBytes = sizeof(LossBandShared<kLoss>);
  const auto kernel = levels_bands_kernel<kLoss>;
  const std::lock_guard<std::mutex> lock(launching());
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), kLossBandThreads, kBytes,
           static_cast<cudaStream_t>(stream)>>>(params);
  return cudaGetLastError();
}

}  // namespace
}  // namespace cuda

int multiscale_loss_hopper(const MultiscaleLossParams& g, int device, void* stream) {
  int blocks = 0;
  const auto params = [&](int processors) { return cuda::loss_band_params(g, processors); };
  const cudaError_t error = cuda::launch<true>(params, device, stream, blocks);
  if (error != cudaSuccess || !g.partials) return error;
  return cuda::launch_early(cuda::loss_bands_sum_kernel, cuda::loss_sum(g, blocks), 1,
                            cuda::kLossThreads, static_cast<cudaStream_t>(stream));
}

int gaussian_pyramid_hopper(const GaussianBlurParams& g, void* twice, int device, void* stream) {
  int blocks = 0;
  const auto params = [&](int processors) { return cuda::pyramid_params(g, twice, processors); };
  return cuda::launch<false>(params, device, stream, blocks);
}

}  // namespace msvq
