// The blur for Hopper run on the host, for tests without a GPU: see cuda/block_on_host.h.
#include <cstring>

#if defined(__GLIBC__)  // for its fibers
#include "gaussian_blur/gaussian_blur_hopper.h"

namespace msvq {

void gaussian_blur_hopper_on_host(const GaussianBlurParams& g, int64_t processors, int order) {
  const cuda::BandParams params = cuda::band_params(g, processors);
  const auto run = [&](auto element) {
    using T = decltype(element);
    alignas(cuda::BandShared) char memory[sizeof(cuda::BandShared)];
    const int blocks = params.count_x * params.groups;
    for (int block = 0; block < blocks; ++block) {
      memset(memory, 0xFF, sizeof memory);  // NaN
      auto& shared = reinterpret_cast<cuda::BandShared&>(memory);
      cuda::run_block(cuda::kBandThreads, block, blocks, order, memory, sizeof memory,
                      [&] { cuda::BandBlur<T>(params, shared).run(); });
    }
  };
  if (g.type == ImageType::float16)
    run(cuda::float16{});
  else
    run(cuda::bfloat16{});
}

}  // namespace msvq

#endif
