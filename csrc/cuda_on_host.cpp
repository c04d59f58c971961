// CUDA kernels run on the host, for tests without a GPU: see cuda/block.h.
#include <cmath>

#include "gaussian_blur/gaussian_blur_stream.h"
#include "multiscale_loss/multiscale_loss_cuda.h"
#include "multiscale_loss/multiscale_loss_ring.h"
#include "multiscale_loss/multiscale_loss_sum.h"

namespace msvq {

void gaussian_blur_cuda_on_host(const GaussianBlurParams& g, int64_t processors, bool reversed) {
  if (g.planes * g.height * g.width * g.inner == 0) return;
  cuda::for_radius(cuda::streamed_radius(g), [&](auto radius) {
    constexpr int kRadius = decltype(radius)::value;
    const auto params = cuda::blur_params<kRadius>(g, processors, 100 * 1024);
    const cuda::BlurStrips& s = params.strips;
    cuda::for_type(g.type, [&](auto type) {
      using T = typename decltype(type)::type;
      using State = cuda::BlurState<kRadius, T>;
      for (int64_t task = 0; task < s.tasks; ++task) {
        std::vector<float> memory(static_cast<size_t>(s.bytes) / sizeof(float), NAN);
        cuda::Block<State> block{std::vector<State>(static_cast<size_t>(s.threads)), reversed};
        cuda::BlurStream<kRadius, T> stream(params, reinterpret_cast<char*>(memory.data()));
        stream.run(block, task);
      }
    });
  });
}

bool multiscale_loss_cuda_on_host(const MultiscaleLossParams& g, int64_t blocks, int room,
                                  bool reversed) {
  int64_t run = 0;
  const bool fits =
      cuda::count(g) == 0 ||
      cuda::for_loss_kernel(g.num_scales, g.radius, g.border, [&](auto kernel) {
        using Runner = cuda::LossRunner<decltype(kernel)>;
        typename Runner::Params params{};
        if (!cuda::loss_params(g, blocks, room, params)) return false;
        run = cuda::loss_blocks(params.strips, blocks);
        const int bytes = cuda::loss_shared_bytes(params.strips);
        for (int64_t i = 0; i < run; ++i) {
          std::vector<float> memory(static_cast<size_t>(bytes) / sizeof(float), NAN);
          cuda::Block<typename Runner::State> block{
              std::vector<typename Runner::State>(static_cast<size_t>(params.strips.threads)),
              reversed};
          Runner runner(params, reinterpret_cast<char*>(memory.data()));
          runner.run(block, i, run);
        }
        return true;
      });
  if (!fits || !g.partials) return fits;
  std::vector<double> sums(cuda::kLossThreads, NAN);
  cuda::Block<cuda::LossSumState> block{std::vector<cuda::LossSumState>(cuda::kLossThreads),
                                        reversed};
  cuda::loss_sum(g, run).run(block, cuda::Shared<double>{sums.data(), cuda::kLossThreads});
  return true;
}

void multiscale_loss_scale_cuda_on_host(const MultiscaleLossParams& g) {
  cuda::loss_scale(g).run(0, 1);
}

}  // namespace msvq
