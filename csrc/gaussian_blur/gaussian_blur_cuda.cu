// Launches of the Gaussian blur's CUDA kernels.
#include "gaussian_blur/gaussian_blur_stream.h"

namespace msvq {
namespace cuda {
namespace {

// Blocks that share a multiprocessor: 4 leave a thread 128 registers, 3 leave it 168. Radius 15
// spills in 128.
template <int kRadius>
constexpr int kBlocks = kRadius > 10 ? 3 : 4;

template <int kRadius>
__global__ void __launch_bounds__(kThreads, kBlocks<kRadius>)
    gaussian_blur_kernel(const BlurParams<kRadius> params) {
  extern __shared__ float4 memory[];
  Block<BlurState<kRadius>> block;
  BlurStream<kRadius> stream(params, reinterpret_cast<char*>(memory));
  for (int64_t task = blockIdx.x; task < params.strips.tasks; task += gridDim.x)
    stream.run(block, task);
}

template <int kRadius>
cudaError_t launch(const GaussianBlurParams& g, int device, cudaStream_t stream) {
  const auto kernel = gaussian_blur_kernel<kRadius>;
  BlurParams<kRadius> params = blur_params<kRadius>(g, 1);
  const int bytes = BlurShared(BlurLayout(params.strips), SharedCarver{nullptr, 0}).bytes;
  int processors = 0, resident = 0;
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, bytes);
  if (error != cudaSuccess) return error;
  params = blur_params<kRadius>(g, int64_t{processors} * (resident > 0 ? resident : 1));
  const int64_t tasks = params.strips.tasks;
  const int64_t grid = tasks < INT32_MAX ? tasks : INT32_MAX;
  kernel<<<static_cast<unsigned>(grid), kThreads, bytes, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace
}  // namespace cuda

int gaussian_blur_cuda(const GaussianBlurParams& g, int device, void* stream) {
  if (g.planes * g.height * g.width * g.inner == 0) return cudaSuccess;
  return cuda::for_radius(g.radius_y == g.radius_x ? g.radius_x : 0, [&](auto radius) {
    return cuda::launch<decltype(radius)::value>(g, device, static_cast<cudaStream_t>(stream));
  });
}

const char* cuda_error_text(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace msvq
