// Launches of the Gaussian blur's CUDA kernels.
#include "cuda/launch.h"
#include "gaussian_blur/gaussian_blur_stream.h"

namespace msvq {
namespace cuda {
namespace {

template <int kRadius, class T>
__global__ void __launch_bounds__(kBlurThreads<kRadius>, 1)
    gaussian_blur_kernel(const BlurParams<kRadius> params) {
  extern __shared__ float4 memory[];
  Block<BlurState<kRadius, T>> block;
  BlurStream<kRadius, T> stream(params, reinterpret_cast<char*>(memory));
  for (int64_t task = blockIdx.x; task < params.strips.tasks; task += gridDim.x)
    stream.run(block, task);
}

template <int kRadius, class T>
cudaError_t launch(const GaussianBlurParams& g, int device, cudaStream_t stream) {
  const auto kernel = gaussian_blur_kernel<kRadius, T>;
  int processors = 0, room = 0;
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&room, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  if (error != cudaSuccess) return error;
  const BlurParams<kRadius> params = blur_params<kRadius>(g, processors, room);
  const BlurStrips& s = params.strips;
  const std::lock_guard<std::mutex> lock(launching());
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, s.bytes);
  // Room for the blocks that registers allow; the rest stays a cache, in which the rows' ends meet.
  const int carveout =
      std::min(kBlurThreads<kRadius> / s.threads * (s.bytes + 1024) / (room / 100) + 1, 100);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, carveout);
  if (error != cudaSuccess) return error;
  const int64_t grid = s.tasks < INT32_MAX ? s.tasks : INT32_MAX;
  kernel<<<static_cast<unsigned>(grid), static_cast<unsigned>(s.threads),
           static_cast<size_t>(s.bytes), stream>>>(params);
  return cudaGetLastError();
}

}  // namespace
}  // namespace cuda

int gaussian_blur_cuda(const GaussianBlurParams& g, int device, void* stream) {
  if (g.planes * g.height * g.width * g.inner == 0) return cudaSuccess;
  // Rows, and offsets within a row, are 32-bit integers.
  constexpr int64_t most = INT32_MAX - 2048;
  if (g.height > most || g.width * g.inner > most) return cudaErrorInvalidValue;
  const auto on = static_cast<cudaStream_t>(stream);
  return cuda::for_radius(cuda::streamed_radius(g), [&](auto radius) {
    constexpr int kRadius = decltype(radius)::value;
    switch (g.type) {
      case ImageType::float32:
        return cuda::launch<kRadius, float>(g, device, on);
      case ImageType::float16:
        return cuda::launch<kRadius, cuda::float16>(g, device, on);
      case ImageType::bfloat16:
        return cuda::launch<kRadius, cuda::bfloat16>(g, device, on);
      default:
        return cuda::launch<kRadius, uint8_t>(g, device, on);
    }
  });
}

const char* cuda_error_text(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace msvq
