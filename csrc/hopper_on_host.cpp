// The quantizer for Hopper run on the host, for tests without a GPU: see cuda/block_on_host.h.
#include <algorithm>
#include <cmath>
#include <iterator>
#include <vector>

#if defined(__GLIBC__)  // for its fibers
#include "vector_quantize/quantize_hopper_sums.h"

namespace msvq {
namespace cuda {
namespace {

struct alignas(128) Line {
  float values[32];
};

// Shared memory of a block, NaN until written to.
std::vector<Line> shared_memory(int bytes) {
  std::vector<Line> memory((static_cast<size_t>(bytes) + sizeof(Line) - 1) / sizeof(Line));
  for (Line& line : memory) std::fill(line.values, std::end(line.values), NAN);
  return memory;
}

template <class T, bool kVectors, bool kSums>
void run(const QuantizeHopperParams& p, int blocks, int order) {
  const int bytes = quantize_shared_bytes<T>(p.num_codes, kSums);
  for (int block = 0; block < blocks; ++block) {
    std::vector<Line> memory = shared_memory(bytes);
    char* const shared = reinterpret_cast<char*>(memory.data());
    run_block(kThreads, block, blocks, order, shared, bytes,
              [&] { quantize_block<T, kVectors, kSums>(p, shared); });
  }
}

template <class T>
void run(const QuantizeHopperParams& p, int blocks, int order) {
  if (!p.z_q) return run<T, false, false>(p, blocks, order);
  p.sums ? run<T, true, true>(p, blocks, order) : run<T, true, false>(p, blocks, order);
}

template <class T>
void run(const QuantizeHopperSums& p, int order) {
  const int bytes = sum_shared_bytes(p.num_codes);
  for (int block = 0; block < 2 * p.parts; ++block) {
    std::vector<Line> memory = shared_memory(bytes);
    char* const shared = reinterpret_cast<char*>(memory.data());
    run_block(kSumThreads, block, 2 * p.parts, order, shared, bytes,
              [&] { sum_rows<T>(p, shared); });
  }
}

}  // namespace
}  // namespace cuda

void vector_quantize_hopper_on_host(const QuantizeHopperParams& p, int blocks, int order) {
  if (p.type == LatentType::float32) return cuda::run<float>(p, blocks, order);
  if (p.type == LatentType::float16) return cuda::run<cuda::Half>(p, blocks, order);
  cuda::run<cuda::Bfloat>(p, blocks, order);
}

void sum_rows_hopper_on_host(const QuantizeHopperSums& p, int order) {
  if (p.type == LatentType::float32) return cuda::run<float>(p, order);
  if (p.type == LatentType::float16) return cuda::run<cuda::Half>(p, order);
  cuda::run<cuda::Bfloat>(p, order);
}

void total_hopper_on_host(const QuantizeHopperTotals& t) {
  std::vector<cuda::Line> memory = cuda::shared_memory(cuda::kTotalBytes);
  char* const shared = reinterpret_cast<char*>(memory.data());
  for (int block = 0; block < t.num_codes; ++block)
    cuda::run_block(cuda::kTotalThreads, block, t.num_codes, 0, shared, cuda::kTotalBytes,
                    [&] { cuda::total_code(t, shared); });
}

}  // namespace msvq

#endif
