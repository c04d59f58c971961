// The multi-scale loss for Hopper run on the host, for tests without a GPU: see
// cuda/block_on_host.h.
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#if defined(__GLIBC__)  // for its fibers
#include "multiscale_loss/multiscale_loss_hopper.h"
#include "multiscale_loss/multiscale_loss_sum.h"

namespace msvq {

template <bool kLoss>
static void run(const cuda::LossBandParams& params, int order) {
  constexpr int kBytes = sizeof(cuda::LossBandShared<kLoss>);
  const auto shared = std::make_unique<cuda::LossBandShared<kLoss>>();
  char* const memory = reinterpret_cast<char*>(shared.get());
  for (int block = 0; block < params.blocks; ++block) {
    memset(memory, 0xFF, kBytes);  // NaN
    cuda::run_block(cuda::kLossBandThreads, block, params.blocks, order, memory, kBytes,
                    [&] { cuda::BandLevels<kLoss>(params, *shared).run(); });
  }
}

void gaussian_pyramid_hopper_on_host(const GaussianBlurParams& g, void* twice, int64_t processors,
                                     int order) {
  run<false>(cuda::pyramid_params(g, twice, processors), order);
}

void multiscale_loss_hopper_on_host(const MultiscaleLossParams& g, int64_t processors, int order) {
  const cuda::LossBandParams params = cuda::loss_band_params(g, processors);
  run<true>(params, order);
  if (!g.partials) return;
  std::vector<double> sums(cuda::kLossThreads, NAN);
  cuda::Block<cuda::LossSumState> block{std::vector<cuda::LossSumState>(cuda::kLossThreads), false};
  cuda::loss_sum(g, params.blocks)
      .run(block, cuda::Shared<double>{sums.data(), cuda::kLossThreads});
}

}  // namespace msvq

#endif
