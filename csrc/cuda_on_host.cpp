// CUDA kernels run on the host, for tests without a GPU: see cuda/block.h.
#include <cmath>

#include "gaussian_blur/gaussian_blur_stream.h"

namespace msvq {

void gaussian_blur_cuda_on_host(const GaussianBlurParams& g, int64_t blocks, bool reversed) {
  if (g.planes * g.height * g.width * g.inner == 0) return;
  cuda::for_radius(g, [&](auto radius) {
    constexpr int kRadius = decltype(radius)::value;
    const auto params = cuda::blur_params<kRadius>(g, blocks);
    const int bytes =
        cuda::BlurShared(cuda::BlurLayout(params.strips), cuda::SharedCarver{nullptr, 0}).bytes;
    for (int64_t task = 0; task < params.strips.tasks; ++task) {
      std::vector<float> memory(static_cast<size_t>(bytes) / sizeof(float), NAN);
      cuda::Block<cuda::BlurState<kRadius>> block{
          std::vector<cuda::BlurState<kRadius>>(cuda::kThreads), reversed};
      cuda::BlurStream<kRadius> stream(params, reinterpret_cast<char*>(memory.data()));
      stream.run(block, task);
    }
  });
}

}  // namespace msvq
