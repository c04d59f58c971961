// Launches of the Gaussian blur for Hopper.
#include <cuda_runtime.h>

#include "gaussian_blur/gaussian_blur_hopper.h"

namespace msvq {
namespace cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kBandThreads, kBandHeld)
    gaussian_blur_bands_kernel(const __grid_constant__ BandParams p) {
  __shared__ BandShared shared;
  BandBlur<T>(p, shared).run();
}

template <class T>
void launch(const BandParams& p, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(p.count_x * p.groups);
  gaussian_blur_bands_kernel<T><<<blocks, kBandThreads, 0, stream>>>(p);
}

}  // namespace
}  // namespace cuda

int gaussian_blur_hopper(const GaussianBlurParams& g, int device, void* stream) {
  if (g.planes * g.height * g.width == 0) return cudaSuccess;
  int processors = 0;
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const cuda::BandParams params = cuda::band_params(g, processors);
  const auto on = static_cast<cudaStream_t>(stream);
  if (g.type == ImageType::float16)
    cuda::launch<cuda::float16>(params, on);
  else
    cuda::launch<cuda::bfloat16>(params, on);
  return cudaGetLastError();
}

}  // namespace msvq
