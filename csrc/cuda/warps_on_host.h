// The names of cuda/hopper.h and of CUDA that kernels use, on the host: each thread of a block is a
// fiber (cuda/block_on_host.h).
#pragma once
#include <math.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <stdexcept>

#include "cuda/bits_on_host.h"
#include "cuda/block_on_host.h"

#define MSVQ_WARPS inline
#define MSVQ_WARPS_HOST inline
#ifndef MSVQ_UNROLL
#define MSVQ_UNROLL
#endif
#ifndef MSVQ_NO_UNROLL
#define MSVQ_NO_UNROLL
#endif

namespace msvq {
namespace cuda {

inline void __syncthreads() { BlockModel::running().sync(); }
inline void check_mask(unsigned mask) {
  if (mask != ~0u) throw std::logic_error("collectives are of all lanes of a warp");
}
inline void __syncwarp(unsigned mask = ~0u) {
  check_mask(mask);
  BlockModel::running().meet("__syncwarp of warp ", nullptr, [](void* const*) {});
}

struct MatchArgument {
  int value;
  unsigned result;
};
inline unsigned __match_any_sync(unsigned mask, int value) {
  check_mask(mask);
  MatchArgument argument{value, 0};
  BlockModel::running().meet("__match_any_sync of warp ", &argument, [](void* const* lanes) {
    for (int i = 0; i < 32; ++i)
      for (int j = 0; j < 32; ++j) {
        auto& own = *static_cast<MatchArgument*>(lanes[i]);
        if (static_cast<const MatchArgument*>(lanes[j])->value == own.value) own.result |= 1u << j;
      }
  });
  return argument.result;
}

template <class T>
struct ShuffleArgument {
  T value;
  int from;
  T result;
};
template <class T>
T shuffle(const char* name, T value, int from) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles are of 32 or 64 bits");
  ShuffleArgument<T> argument{value, from, {}};
  BlockModel::running().meet(name, &argument, [](void* const* lanes) {
    for (int i = 0; i < 32; ++i) {
      auto& own = *static_cast<ShuffleArgument<T>*>(lanes[i]);
      own.result = static_cast<const ShuffleArgument<T>*>(lanes[own.from])->value;
    }
  });
  return argument.result;
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  check_mask(mask);
  return shuffle("__shfl_sync of warp ", value, lane & 31);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  check_mask(mask);
  return shuffle("__shfl_xor_sync of warp ", value, (static_cast<int>(threadIdx.x) ^ lanes) & 31);
}

struct BallotArgument {
  bool value;
  unsigned result;
};
inline unsigned ballot(const char* name, unsigned mask, bool value) {
  check_mask(mask);
  BallotArgument argument{value, 0};
  BlockModel::running().meet(name, &argument, [](void* const* lanes) {
    unsigned bits = 0;
    for (int i = 0; i < 32; ++i)
      bits |= static_cast<unsigned>(static_cast<const BallotArgument*>(lanes[i])->value) << i;
    for (int i = 0; i < 32; ++i) static_cast<BallotArgument*>(lanes[i])->result = bits;
  });
  return argument.result;
}
inline unsigned __ballot_sync(unsigned mask, bool value) {
  return ballot("__ballot_sync of warp ", mask, value);
}
inline bool __any_sync(unsigned mask, bool value) {
  return ballot("__any_sync of warp ", mask, value) != 0;
}
inline bool __all_sync(unsigned mask, bool value) {
  return ballot("__all_sync of warp ", mask, value) == ~0u;
}

struct MaximumArgument {
  unsigned value, result;
};
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  check_mask(mask);
  MaximumArgument argument{value, 0};
  BlockModel::running().meet("__reduce_max_sync of warp ", &argument, [](void* const* lanes) {
    unsigned most = 0;
    for (int i = 0; i < 32; ++i) {
      const unsigned own = static_cast<const MaximumArgument*>(lanes[i])->value;
      most = own > most ? own : most;
    }
    for (int i = 0; i < 32; ++i) static_cast<MaximumArgument*>(lanes[i])->result = most;
  });
  return argument.result;
}

inline uint32_t shared_address(const void* pointer) {
  return BlockModel::running().address_of(pointer);
}

// The word of a barrier: arrivals until the phase ends, arrivals in a phase, the parity of the
// phase that runs, and a mark that it is a barrier.
constexpr int kCountBits = 20;
constexpr uint64_t kCountMask = (uint64_t{1} << kCountBits) - 1;
constexpr uint64_t kParityBit = uint64_t{1} << (2 * kCountBits), kBarrierMark = 0xBA44;

inline uint32_t checked_parity(const uint64_t* barrier) {
  if (shared_address(barrier) % 8 != 0 || *barrier >> 48 != kBarrierMark)
    throw std::logic_error("a barrier is used that was not begun");
  return (*barrier & kParityBit) != 0;
}
// Bytes that a barrier waits for; the copies themselves are made at once.
inline std::map<const uint64_t*, int>& bytes_to_come() {
  static thread_local std::map<const uint64_t*, int> bytes;
  return bytes;
}
inline void init_barrier(uint64_t* barrier, int count) {
  if (shared_address(barrier) % 8 != 0 || count < 1 || count > static_cast<int>(kCountMask))
    throw std::logic_error("a barrier is 8 bytes for at least one arrival");
  bytes_to_come().erase(barrier);
  const uint64_t arrivals = static_cast<uint64_t>(count);
  *barrier = kBarrierMark << 48 | arrivals << kCountBits | arrivals;
}
inline void arrive(uint64_t* barrier) {
  checked_parity(barrier);
  if ((--*barrier & kCountMask) != 0) return;
  *barrier = (*barrier ^ kParityBit) | (*barrier >> kCountBits & kCountMask);
  BlockModel::running().wake(barrier);
}
inline void arrive_with_bytes(uint64_t* barrier, int bytes) {
  checked_parity(barrier);
  if (bytes <= 0 || bytes_to_come()[barrier] != 0)
    throw std::logic_error("copies of a phase are announced once, before they begin");
  bytes_to_come()[barrier] = bytes;
}
inline void copy_to_shared(void* to, const void* from, int bytes, uint64_t* barrier) {
  if (bytes % 16 != 0 || shared_address(to) % 16 != 0 ||
      reinterpret_cast<uintptr_t>(from) % 16 != 0)
    throw std::logic_error("copies are of whole 16 bytes at multiples of 16");
  int& left = bytes_to_come()[barrier];
  if (bytes > left) throw std::logic_error("more is copied than was announced");
  memcpy(to, from, static_cast<size_t>(bytes));
  left -= bytes;
  if (left == 0) arrive(barrier);
}

template <int kBytes>
void copy_ahead(void* to, const void* from) {
  if (shared_address(to) % kBytes != 0 || reinterpret_cast<uintptr_t>(from) % kBytes != 0)
    throw std::logic_error("a copy is of 4 or 16 bytes at a multiple of that");
  BlockModel& block = BlockModel::running();
  block.copies().copies.push_back({to, from, kBytes});
  if (block.copies_at_once()) memcpy(to, from, kBytes);
}
inline void end_copies() {
  AskedCopies& asked = BlockModel::running().copies();
  asked.groups.push_back(asked.copies.size());
}
template <int kLeft>
void wait_copies() {
  AskedCopies& asked = BlockModel::running().copies();
  if (asked.groups.size() <= kLeft) return;
  const size_t done = asked.groups[asked.groups.size() - 1 - kLeft];
  for (size_t i = 0; i < done && !BlockModel::running().copies_at_once(); ++i)
    memcpy(asked.copies[i].to, asked.copies[i].from, asked.copies[i].bytes);
  asked.copies.erase(asked.copies.begin(), asked.copies.begin() + static_cast<ptrdiff_t>(done));
  asked.groups.erase(asked.groups.begin(), asked.groups.end() - kLeft);
  for (size_t& end : asked.groups) end -= done;
}
inline void wait(uint64_t* barrier, uint32_t parity) {
  if (parity > 1) throw std::logic_error("a parity is 0 or 1");
  // Asked again once awake: as on the device, a thread that is two phases late waits on.
  while (checked_parity(barrier) == parity)
    BlockModel::running().pause(
        parity ? "wait, parity 1, at shared address " : "wait, parity 0, at shared address ",
        static_cast<int>(shared_address(barrier)), barrier);
}

// Element (n, k) of a descriptor's matrix lies at
// from + n / 8 * across + k / 8 * along + n % 8 * 16 + k % 8 * 2.
struct MatrixDescriptor {
  uint32_t from, strides;

  MatrixDescriptor(uint32_t address, int along, int across)
      : from((address & 0x3FFFF) >> 4 | static_cast<uint32_t>(along >> 4) << 16),
        strides(static_cast<uint32_t>(across >> 4)) {
    if (address % 16 != 0 || along % 16 != 0 || across % 16 != 0 || along < 0 || across < 0 ||
        along >= 1 << 18 || across >= 1 << 18)
      throw std::logic_error("a matrix in shared memory is of blocks of 16-byte rows");
  }
  MatrixDescriptor operator+(int bytes) const {
    if (bytes % 16 != 0) throw std::logic_error("a descriptor moves by multiples of 16 bytes");
    MatrixDescriptor moved = *this;
    moved.from += static_cast<uint32_t>(bytes) >> 4;
    return moved;
  }
  uint32_t address(int n, int k) const {
    const uint32_t along = (from >> 16 & 0x3FFF) << 4, across = (strides & 0x3FFF) << 4;
    return ((from & 0x3FFF) << 4) + static_cast<uint32_t>(n / 8) * across +
           static_cast<uint32_t>(k / 8) * along + static_cast<uint32_t>(n % 8) * 16;
  }
};

struct ProductArgument {
  const uint32_t* a;
  float* out;
  bool add;
  MatrixDescriptor b;  // of a warpgroup's product
  uint32_t right[2];   // of a warp's
};

// out (16, kColumns) = a (16, 16) right (16, kColumns) from and to the fragments of a warp.
template <int kColumns>
void multiply_fragments(void* const* lanes, const float (&right)[16][kColumns]) {
  for (int row = 0; row < 16; ++row) {
    const auto lane = [&](int column) -> const ProductArgument& {
      return *static_cast<const ProductArgument*>(lanes[row % 8 * 4 + column % 8 / 2]);
    };
    float sums[kColumns];
    for (int n = 0; n < kColumns; ++n)
      sums[n] = lane(n).add ? lane(n).out[n / 8 * 4 + row / 8 * 2 + n % 2] : 0.0f;
    for (int k = 0; k < 16; ++k) {
      const float left = half_of(lane(k).a[k / 8 * 2 + row / 8], k % 2);
      for (int n = 0; n < kColumns; ++n) sums[n] += left * right[k][n];
    }
    for (int n = 0; n < kColumns; ++n) lane(n).out[n / 8 * 4 + row / 8 * 2 + n % 2] = sums[n];
  }
}

// Orders nothing here: fibers see each other's writes at once.
inline void fence_shared_for_async() {}

inline void trace_products(PendingProducts& products, uint64_t call) {
  products.trace = (products.trace ^ call) * 0x9E3779B97F4A7C15u + 1;
}
inline void begin_products() {
  PendingProducts& products = BlockModel::running().products();
  products.open = true;
  trace_products(products, 1);
}
inline void end_products() {
  PendingProducts& products = BlockModel::running().products();
  if (!products.open) throw std::logic_error("end_products without begin_products");
  products.open = false;
  trace_products(products, 2);
}
inline void wait_products(Accumulators& out) {
  PendingProducts& products = BlockModel::running().products();
  if (products.open) throw std::logic_error("wait_products before end_products");
  if (products.out != out) throw std::logic_error("wait_products of what no product is for");
  for (size_t i = 0; i < sizeof out; ++i)
    if (reinterpret_cast<const unsigned char*>(out)[i] != 0xFF)
      throw std::logic_error("the outcome of a product was written to before wait_products");
  memcpy(out, products.values, sizeof out);
  products.out = nullptr;
  trace_products(products, 3);
}

// Of a warp rather than of a warpgroup: nothing makes its warps wait for each other. The outcome is
// NaN until wait_products.
inline void multiply(Accumulators& out, const uint32_t (&a)[4], const MatrixDescriptor& b,
                     bool add) {
  PendingProducts& products = BlockModel::running().products();
  if (!products.open) throw std::logic_error("multiply outside begin_products and end_products");
  if (products.out && products.out != out)
    throw std::logic_error("multiply into a second array before wait_products");
  if (!products.out && add) memcpy(products.values, out, sizeof out);
  products.out = out;
  memset(out, 0xFF, sizeof out);
  trace_products(products, uint64_t{b.from} << 32 | b.strides);
  trace_products(products, add ? 5 : 4);
  ProductArgument argument{a, products.values, add, b, {}};
  BlockModel::running().meet("multiply of warp ", &argument, [](void* const* lanes) {
    const MatrixDescriptor& first = static_cast<const ProductArgument*>(lanes[0])->b;
    for (int i = 0; i < 32; ++i) {
      const MatrixDescriptor& own = static_cast<const ProductArgument*>(lanes[i])->b;
      if (own.from != first.from || own.strides != first.strides)
        throw std::logic_error("lanes of a warp multiply by different matrices");
    }
    float right[16][kProductColumns];
    for (int n = 0; n < kProductColumns; ++n)
      for (int k = 0; k < 16; k += 8) {
        uint16_t bits[8];
        memcpy(bits, BlockModel::running().at(first.address(n, k)), sizeof bits);
        for (int i = 0; i < 8; ++i) right[k + i][n] = half_of(bits[i], 0);
      }
    multiply_fragments(lanes, right);
  });
}

struct LoadArgument {
  uint32_t address;
  uint32_t* out;
};
inline void load_blocks(uint32_t address, uint32_t (&out)[4]) {
  LoadArgument argument{address, out};
  BlockModel::running().meet("load_blocks of warp ", &argument, [](void* const* lanes) {
    for (int row = 0; row < 32; ++row) {
      const char* from =
          BlockModel::running().at(static_cast<const LoadArgument*>(lanes[row])->address);
      for (int i = 0; i < 4; ++i)
        memcpy(static_cast<const LoadArgument*>(lanes[row % 8 * 4 + i])->out + row / 8,
               from + 4 * i, 4);
    }
  });
}
inline void multiply(float (&out)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  ProductArgument argument{a, out, true, MatrixDescriptor(0, 0, 0), {b0, b1}};
  BlockModel::running().meet("multiply (16, 8) of warp ", &argument, [](void* const* lanes) {
    float right[16][8];
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 8; ++n) {
        const auto& lane = *static_cast<const ProductArgument*>(lanes[4 * n + k % 8 / 2]);
        right[k][n] = half_of(lane.right[k / 8], k % 2);
      }
    multiply_fragments(lanes, right);
  });
}
inline void multiply_eight(float (&out)[4], uint32_t upper, uint32_t lower, uint32_t b) {
  const uint32_t a[4] = {upper, lower, 0, 0};
  multiply(out, a, b, 0);
}

inline int thread_again() { return static_cast<int>(threadIdx.x); }

}  // namespace cuda
}  // namespace msvq
