// Launches of the multi-scale loss's CUDA kernels.
#include "cuda/launch.h"
#include "multiscale_loss/multiscale_loss_quads.h"
#include "multiscale_loss/multiscale_loss_stream.h"
#include "multiscale_loss/multiscale_loss_sum.h"

namespace msvq {
namespace cuda {
namespace {

// Two blocks on a multiprocessor leave a thread 128 registers, one leaves it 255.
template <int kRadius>
constexpr int kLossBlocks = kRadius > 15 ? 1 : 2;

template <int kRadius>
__global__ void __launch_bounds__(kLossThreads, kLossBlocks<kRadius>)
    multiscale_loss_kernel(const LossParams<kRadius> params) {
  extern __shared__ float4 memory[];
  Block<LossState<kRadius>> block;
  LossStream<kRadius> stream(params, reinterpret_cast<char*>(memory));
  stream.run(block, blockIdx.x, gridDim.x);
}

template <int kRadius, int kScales, class T>
__global__ void __launch_bounds__(quad_threads(kRadius, kScales), 1)
    multiscale_loss_quads_kernel(const QuadParams<kRadius> params) {
  extern __shared__ float4 memory[];
  Block<QuadState<kRadius, kScales>> block;
  QuadStream<kRadius, kScales, T> stream(params, reinterpret_cast<char*>(memory));
  stream.run(block, static_cast<int>(blockIdx.x));
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

struct Device {
  int processors, room;
  cudaStream_t stream;
};

template <class Params, class Kernel>
cudaError_t start(Kernel kernel, const Params& params, const Device& device, int64_t grid,
                  int threads, int bytes) {
  const std::lock_guard<std::mutex> lock(launching());
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(grid), threads, bytes, device.stream>>>(params);
  return cudaGetLastError();
}

// Leaves the number of blocks in `grid`.
template <int kRadius>
cudaError_t launch(const MultiscaleLossParams& g, const Device& device, int64_t& grid) {
  if constexpr (kRadius > 0) {
    QuadParams<kRadius> params{};
    if (quad_params(g, int64_t{device.processors} * 2, device.room, params)) {
      grid = params.strips.blocks;
      return for_quads(g, [&](auto scales, auto type) {
        using T = typename decltype(type)::type;
        return start(multiscale_loss_quads_kernel<kRadius, decltype(scales)::value, T>, params,
                     device, grid, params.strips.threads, quad_shared_bytes(params.strips));
      });
    }
  }
  LossParams<kRadius> params{};
  if (!loss_params(g, int64_t{device.processors} * kLossBlocks<kRadius>, device.room, params))
    return cudaErrorInvalidConfiguration;
  grid = loss_blocks(params.strips);
  return start(multiscale_loss_kernel<kRadius>, params, device, grid, kLossThreads,
               loss_shared_bytes(params.strips));
}

}  // namespace
}  // namespace cuda

int multiscale_loss_cuda(const MultiscaleLossParams& g, int device, void* stream) {
  cuda::Device on{0, 0, static_cast<cudaStream_t>(stream)};
  int64_t blocks = 0;
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&on.processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&on.room, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess && cuda::count(g) > 0)
    error = cuda::for_radius(cuda::streamed_radius(g), [&](auto radius) {
      return cuda::launch<decltype(radius)::value>(g, on, blocks);
    });
  if (error != cudaSuccess || !g.partials) return error;
  cuda::multiscale_loss_sum_kernel<<<1, cuda::kLossThreads, 0, on.stream>>>(
      cuda::loss_sum(g, blocks));
  return cudaGetLastError();
}

int multiscale_loss_scale_cuda(const MultiscaleLossParams& g, int device, void* stream) {
  const int64_t blocks = (cuda::count(g) + cuda::kLossThreads - 1) / cuda::kLossThreads;
  if (blocks == 0) return cudaSuccess;
  int processors = 0;
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  // No more than run at a time: where the factor is 1, as mostly, starting them is all there is.
  const int64_t most = int64_t{8} * processors;
  const unsigned grid = static_cast<unsigned>(blocks < most ? blocks : most);
  cuda::multiscale_loss_scale_kernel<<<grid, cuda::kLossThreads, 0,
                                       static_cast<cudaStream_t>(stream)>>>(cuda::loss_scale(g));
  return cudaGetLastError();
}

}  // namespace msvq
