// The quantizer for Hopper run on the host, for tests without a GPU: see cuda/block_on_host.h.
#include <algorithm>
#include <cmath>
#include <iterator>
#include <vector>

#if defined(__GLIBC__)  // for its fibers
#include "vector_quantize/quantize_hopper_outputs.h"

namespace msvq {
namespace cuda {
namespace {

struct alignas(128) Line {
  float values[32];
};

template <class T, bool kVectors>
void run(const QuantizeHopperParams& p, int blocks, int order) {
  const int bytes = quantize_shared_bytes(p.num_codes);
  for (int block = 0; block < blocks; ++block) {
    std::vector<Line> memory(static_cast<size_t>(bytes) / sizeof(Line));
    for (Line& line : memory) std::fill(line.values, std::end(line.values), NAN);
    char* const shared = reinterpret_cast<char*>(memory.data());
    run_block(kThreads, block, blocks, order, shared, bytes,
              [&] { quantize_block<T, kVectors>(p, shared); });
  }
}

template <class T>
void run(const QuantizeHopperParams& p, int blocks, int order) {
  p.z_q ? run<T, true>(p, blocks, order) : run<T, false>(p, blocks, order);
}

}  // namespace
}  // namespace cuda

void vector_quantize_hopper_on_host(const QuantizeHopperParams& p, int blocks, int order) {
  if (p.type == LatentType::float32) return cuda::run<float>(p, blocks, order);
  if (p.type == LatentType::float16) return cuda::run<cuda::Half>(p, blocks, order);
  cuda::run<cuda::Bfloat>(p, blocks, order);
}

}  // namespace msvq

#endif
