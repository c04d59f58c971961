// Launches of the multi-scale loss and of pyramids for Hopper.
#include "cuda/launch.h"
#include "multiscale_loss/multiscale_loss_hopper.h"
#include "multiscale_loss/multiscale_loss_sum.h"

namespace msvq {
namespace cuda {
namespace {

template <bool kLoss>
__global__ void __launch_bounds__(kLossBandThreads, 1)
    levels_bands_kernel(const __grid_constant__ LossBandParams p) {
  if (kLoss && p.partials) asm volatile("griddepcontrol.launch_dependents;");  // the sum
  extern __shared__ float4 memory[];
  BandLevels<kLoss>(p, *reinterpret_cast<LossBandShared<kLoss>*>(memory)).run();
}

// May be launched while the blocks whose sums it adds still run, and waits until all of them have
// ended and what they wrote can be seen; before that it reads and writes nothing. It ends after
// them, so what is launched after it finds their gradients too.
__global__ void __launch_bounds__(kLossThreads) loss_bands_sum_kernel(const LossSum sum) {
  __shared__ double sums[kLossThreads];
  asm volatile("griddepcontrol.wait;" ::: "memory");
  Block<LossSumState> block;
  sum.run(block, Shared<double>{sums});
}

cudaError_t launch_sum(const LossSum& sum, void* stream) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = 1, config.blockDim = kLossThreads;
  config.stream = static_cast<cudaStream_t>(stream);
  // Older drivers cannot capture that: in a graph it is launched as any other kernel.
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  static_cast<void>(cudaStreamIsCapturing(config.stream, &capture));
  config.attrs = &early, config.numAttrs = capture == cudaStreamCaptureStatusNone;
  static_cast<void>(cudaLaunchKernelEx(&config, loss_bands_sum_kernel, sum));
  return cudaGetLastError();  // and no other launch reports it again
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
  return cuda::launch_sum(cuda::loss_sum(g, blocks), stream);
}

int gaussian_pyramid_hopper(const GaussianBlurParams& g, void* twice, int device, void* stream) {
  int blocks = 0;
  const auto params = [&](int processors) { return cuda::pyramid_params(g, twice, processors); };
  return cuda::launch<false>(params, device, stream, blocks);
}

}  // namespace msvq
