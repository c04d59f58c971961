// CUDA kernels run on the host, for tests without a GPU: see cuda/block.h.
#include <cmath>

#include "gaussian_blur/gaussian_blur_stream.h"
#include "multiscale_loss/multiscale_loss_quads.h"
#include "multiscale_loss/multiscale_loss_stream.h"
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

namespace {

// Both leave the number of blocks that ran, and are false where the kernel cannot run.
template <int kRadius, int kScales, class T>
bool run_quads(const MultiscaleLossParams& g, int64_t blocks, int room, bool reversed,
               int64_t& run) {
  using State = cuda::QuadState<kRadius, kScales>;
  cuda::QuadParams<kRadius> params{};
  if (!cuda::quad_params(g, blocks, room, params)) return false;
  run = params.strips.blocks;
  const int bytes = cuda::quad_shared_bytes(params.strips);
  for (int i = 0; i < params.strips.blocks; ++i) {
    std::vector<float> memory(static_cast<size_t>(bytes) / sizeof(float), NAN);
    cuda::Block<State> block{std::vector<State>(static_cast<size_t>(params.strips.threads)),
                             reversed};
    cuda::QuadStream<kRadius, kScales, T> stream(params, reinterpret_cast<char*>(memory.data()));
    stream.run(block, i);
  }
  return true;
}

template <int kRadius>
bool run_stream(const MultiscaleLossParams& g, int64_t blocks, int room, bool reversed,
                int64_t& run) {
  using State = cuda::LossState<kRadius>;
  cuda::LossParams<kRadius> params{};
  if (!cuda::loss_params(g, blocks, room, params)) return false;
  run = cuda::loss_blocks(params.strips);
  const int bytes = cuda::loss_shared_bytes(params.strips);
  for (int64_t i = 0; i < run; ++i) {
    std::vector<float> memory(static_cast<size_t>(bytes) / sizeof(float), NAN);
    cuda::Block<State> block{std::vector<State>(cuda::kLossThreads), reversed};
    cuda::LossStream<kRadius> stream(params, reinterpret_cast<char*>(memory.data()));
    stream.run(block, i, run);
  }
  return true;
}

}  // namespace

bool multiscale_loss_cuda_on_host(const MultiscaleLossParams& g, int64_t blocks, int room,
                                  bool reversed) {
  int64_t run = 0;
  const bool fits =
      cuda::count(g) == 0 || cuda::for_radius(cuda::streamed_radius(g), [&](auto kind) {
        constexpr int kRadius = decltype(kind)::value;
        if constexpr (kRadius > 0) {
          const bool done = cuda::for_quads(g, [&](auto scales, auto type) {
            using T = typename decltype(type)::type;
            return run_quads<kRadius, decltype(scales)::value, T>(g, blocks, room, reversed, run);
          });
          if (done) return true;
        }
        return run_stream<kRadius>(g, blocks, room, reversed, run);
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
