// What follows from the search: the codes that it left open, z_q, the loss and the sums of every
// code's rows; and a block whole.
#pragma once
#include "vector_quantize/quantize_hopper_codebook.h"
#include "vector_quantize/quantize_hopper_exact.h"

namespace msvq {
namespace cuda {

// Rows of z as they lie in a warp's registers: 16 lanes a row, two rows a float4.
using WarpRows = float4[kRows / 2];
constexpr int kCodesAtOnce = 8;  // of those whose values are read together

// The code of row `row`, marked if the row is not finite.
template <bool kSums>
MSVQ_WARPS void write_code(const QuantizeHopperParams& p, QuantizeShared& shared, int row,
                           int code) {
  p.codes[row] = code & (kNotFinite - 1);
  if (p.keys) p.keys[row] = static_cast<int16_t>(min(code, p.num_codes));
  if (kSums && code < kNotFinite) atomicAdd(&shared.counts[code], 1);
}

// This lane's part of the sum of (z - e)^2.
MSVQ_WARPS float square_of_difference(const float4& x, const float4& e) {
  const float a = x.x - e.x, b = x.y - e.y, c = x.z - e.z, d = x.w - e.w;
  return fmaf(a, a, fmaf(b, b, fmaf(c, c, d * d)));
}

// Where this lane's part of row `row` of z_q lies, 16 lanes a row.
template <class T>
MSVQ_WARPS T* place_of(const QuantizeHopperParams& p, int row) {
  return static_cast<T*>(p.z_q) + int64_t{row} * p.z_q_stride + thread_again() % 16 * 4;
}

// This lane's part of a code, begun at once.
MSVQ_WARPS float4 code_vector(const QuantizeHopperParams& p, int code) {
  const float* from = p.codebook + (code & (kNotFinite - 1)) * kWidth + thread_again() % 16 * 4;
  return load_now(reinterpret_cast<const float4*>(from));
}

// Reads this warp's rows, from `first` on, and writes those of z_q that have a code. No branch: the
// codes' values are all on their way before the first is needed.
template <class T>
MSVQ_WARPS float write_rows(const QuantizeHopperParams& p, const T* rows, int first, int code,
                            WarpRows& x) {
  constexpr int kAtOnce = kCodesAtOnce;
  const int half = thread_again() % 32 / 16;
  const T* from = rows + half * kWidth + thread_again() % 16 * 4;
  T* to = place_of<T>(p, first + half);
  const int64_t step = int64_t{p.z_q_stride} * 2;
  float error = 0;
  MSVQ_UNROLL
  for (int begin = 0; begin < kRows / 2; begin += kAtOnce) {
    float4 e[kAtOnce];
    int of[kAtOnce];
    MSVQ_UNROLL
    for (int i = 0; i < kAtOnce; ++i) of[i] = __shfl_sync(~0u, code, 2 * (begin + i) + half);
    MSVQ_UNROLL
    for (int i = 0; i < kAtOnce; ++i) e[i] = code_vector(p, max(of[i], 0));
    MSVQ_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      float4& own = x[begin + i];
      own = read_four(from + 2 * (begin + i) * kWidth);
      const float square = square_of_difference(own, e[i]);
      error += of[i] >= 0 ? square : 0.0f;
      store_four(of[i], to, e[i]);
      to += step;
    }
  }
  return error;
}

MSVQ_WARPS float4 sum_of(const float4& a, const float4& b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// The lanes that have this lane's code, of those whose code counts; below kCodes.
template <int kCodes>
MSVQ_WARPS unsigned lanes_of_code(int code, bool counts) {
  unsigned same = __ballot_sync(~0u, counts);
  MSVQ_UNROLL
  for (int bit = 1; bit < kCodes; bit *= 2) {
    const bool own = (code & bit) == bit;
    const unsigned set = __ballot_sync(~0u, own);
    same &= ~(set ^ (own ? ~0u : 0u));
  }
  return same;
}

// Adds rows of one code to the first of them; returns the code of row lane % kRows to add to, K if
// there is none.
template <class T>
MSVQ_WARPS int combine_rows(const QuantizeHopperParams& p, const T* rows, WarpRows& x, int code) {
  const int lane = thread_again() % 32, half = lane / 16;
  const bool counts = code >= 0;
  const unsigned same = lanes_of_code<kMostSums>(code, counts) & 0xFFFF;
  const int first = __ffs(static_cast<int>(same)) - 1;
  const unsigned repeated = __ballot_sync(~0u, counts && first < lane) & 0xFFFF;
  for (unsigned left = repeated; left != 0; left &= left - 1) {
    const int row = __ffs(static_cast<int>(left)) - 1, to = __shfl_sync(~0u, first, row);
    const float4 y = read_four(rows + row * kWidth + lane % 16 * 4);
    MSVQ_UNROLL
    for (int i = 0; i < kRows / 2; ++i)
      if (2 * i + half == to) x[i] = sum_of(x[i], y);
  }
  return counts && (repeated >> (lane % 16) & 1) == 0 ? code : p.num_codes;
}

// Outputs of up to kRows open rows, copied to `rows`. Returns the code of row lane % kRows.
template <class T, bool kVectors, bool kSums>
MSVQ_WARPS int finish_open(const QuantizeHopperParams& p, QuantizeShared& shared,
                           const OpenRow* open, int count, T* rows) {
  const int lane = thread_again() % 32;
  int code = 0;
  MSVQ_NO_UNROLL
  for (int first = 0; first < count; first += kLot) {
    const int lot = min(count - first, kLot);
    const int settled = settle_rows(p, open + first, lot, rows + first * kWidth);
    if (lane < lot) write_code<kSums>(p, shared, open[first + lane].row, settled);
    if (lane % kRows / kLot == first / kLot) code = settled;
    if constexpr (kVectors) {
      float error = 0;
      MSVQ_UNROLL
      for (int i = 0; i < kLot; i += 2) {
        const int at = i + lane / 16, of = __shfl_sync(~0u, settled, at);
        if (at >= lot) continue;
        const float4 x = read_four(rows + (first + at) * kWidth + lane % 16 * 4);
        const float4 e = code_vector(p, of);
        store_four(0, place_of<T>(p, open[first + at].row), e);
        error += square_of_difference(x, e);
      }
      shared.errors[thread_again()] += error;
    }
  }
  return code;
}

// Adds rows to where the sums of their codes are.
MSVQ_WARPS void add_at(float4* const (&at)[kRows / 2], const WarpRows& x) {
  float4 sum[kRows / 2];
  MSVQ_UNROLL
  for (int i = 0; i < kRows / 2; ++i) sum[i] = *at[i];
  MSVQ_UNROLL
  for (int i = 0; i < kRows / 2; ++i) *at[i] = sum_of(sum[i], x[i]);
}

// Adds a warp's rows, if it has any, `x` for the codes `to` of rows lane % kRows, no two below K
// the same, and then `count` open ones, `rows` of codes `settled`. Every warp does so in its turn:
// the sums are the same whatever the timing.
template <class T>
MSVQ_WARPS void add_rows(const QuantizeHopperParams& p, QuantizeShared& shared, uint32_t parity,
                         const WarpRows& x, bool there, int to, const T* rows, int settled,
                         int count) {
  const int warp = thread_again() / 32, lane = thread_again() % 32, part = lane % 16 * 4;
  float* const sums = shared.sums<T>(p.num_codes) + part;
  float4* at[kRows / 2];
  MSVQ_UNROLL
  for (int i = 0; i < kRows / 2; ++i)
    at[i] = reinterpret_cast<float4*>(sums + __shfl_sync(~0u, to, 2 * i + lane / 16) * kWidth);
  uint64_t* const after = warp + 1 < kWarps ? &shared.turns[warp + 1] : &shared.turns[0];
  wait(&shared.turns[warp], parity);
  if (there) add_at(at, x);
  MSVQ_NO_UNROLL
  for (int i = 0; i < count; ++i) {
    __syncwarp();
    const int of = __shfl_sync(~0u, settled, i);
    if (of < kNotFinite && lane < 16) {
      float4* own = reinterpret_cast<float4*>(sums + of * kWidth);
      *own = sum_of(*own, read_four(rows + i * kWidth + part));
    }
  }
  __syncwarp();
  if (lane == 0) arrive(after);
}

// The tile of this warp's in a round, past the last where there is none.
MSVQ_WARPS int tile_of(int round) {
  const int blocks = static_cast<int>(gridDim.x);
  return static_cast<int>(blockIdx.x) + (round * kWarpgroups + thread_again() / 128) * blocks;
}

// A tile for every warpgroup in each round; in one more round what is still open.
template <class T, bool kVectors, bool kSums>
MSVQ_WARPS void quantize_tiles(const QuantizeHopperParams& p, QuantizeShared& shared) {
  if constexpr (kVectors) shared.errors[thread_again()] = 0;
  if (tile_of(0) * kTile < p.count) begin_rows<T>(p, shared, tile_of(0));
  MSVQ_NO_UNROLL
  for (int round = 0; round <= shared.rounds; ++round) {
    const bool there = tile_of(round) * kTile < p.count;
    T* const rows = shared.rows_of_warp<T>(p.num_codes, thread_again() / 32);
    WarpRows x;
    int to = p.num_codes, settled = 0;
    if (there) {
      prefetch_rows<T>(p, tile_of(round + 1));
      wait(&shared.loaded[thread_again() / 32], round & 1);
      uint32_t a[4][4], offset;
      float margin[2];
      load_tile(shared, rows, a, offset, margin);
      const int first = tile_of(round) * kTile + thread_again() / 32 % 4 * kRows;
      const int code = search_rows(p, shared, a, offset, margin, first);
      const int lane = thread_again() % 32;
      if (lane < kRows && code >= 0) write_code<kSums>(p, shared, first + lane, code);
      if constexpr (kVectors) {
        const float error = write_rows(p, rows, first, code, x);
        shared.errors[thread_again()] += error;
      }
      if constexpr (kSums) to = combine_rows(p, rows, x, code);
    }
    __syncwarp();
    const int queued = shared.queued[thread_again() / 32];
    const int open = there ? queued / kLot * kLot : queued;
    if (open) {
      const OpenRow* of = shared.open[thread_again() / 32] + queued - open;
      settled = finish_open<T, kVectors, kSums>(p, shared, of, open, rows);
      if (thread_again() % 32 == 0) shared.queued[thread_again() / 32] = queued - open;
    }
    // The next rows come while this warp waits for its turn, unless the turn reads open ones there.
    const bool next = tile_of(round + 1) * kTile < p.count;
    const bool early = kSums && next && !open;
    if (early) begin_rows<T>(p, shared, tile_of(round + 1));
    if constexpr (kSums) add_rows(p, shared, round & 1, x, there, to, rows, settled, open);
    if (open) fence_shared_for_async();
    if (next && !early) begin_rows<T>(p, shared, tile_of(round + 1));
  }
}

// This block's parts of the sums.
template <class T, bool kSums>
MSVQ_WARPS void write_parts(const QuantizeHopperParams& p, QuantizeShared& shared) {
  const int thread = thread_again(), block = static_cast<int>(blockIdx.x);
  __syncthreads();
  if (thread < 32) {
    double error = 0;
    for (int i = thread; i < kThreads; i += 32) error += shared.errors[i];
    MSVQ_UNROLL
    for (int step = 16; step > 0; step /= 2) error += __shfl_xor_sync(~0u, error, step);
    if (thread == 0) p.errors[block] = error;
  }
  if constexpr (kSums) {
    const float4* sums = reinterpret_cast<const float4*>(shared.sums<T>(p.num_codes));
    float4* to = reinterpret_cast<float4*>(p.sums + int64_t{block} * p.num_codes * kWidth);
    for (int i = thread; i < p.num_codes * (kWidth / 4); i += kThreads) to[i] = sums[i];
    for (int i = thread; i < p.num_codes; i += kThreads)
      p.counts[block * p.num_codes + i] = shared.counts[i];
  }
}

template <class T, bool kVectors, bool kSums>
MSVQ_WARPS void quantize_block(const QuantizeHopperParams& p, char* memory) {
  QuantizeShared& shared = *reinterpret_cast<QuantizeShared*>(memory);
  prefetch_rows<T>(p, tile_of(0));
  load_codebook(p, shared);
  if (threadIdx.x < kWarps) {
    init_barrier(&shared.loaded[threadIdx.x], 1);
    shared.queued[threadIdx.x] = 0;
  }
  if (threadIdx.x == 0) {
    const int tiles = (p.count + kTile - 1) / kTile;
    const int step = kWarpgroups * static_cast<int>(gridDim.x);
    shared.rounds = (tiles - static_cast<int>(blockIdx.x) + step - 1) / step;
  }
  if constexpr (kSums) {
    if (threadIdx.x < kWarps) init_barrier(&shared.turns[threadIdx.x], 1);
    if (threadIdx.x == 0) arrive(&shared.turns[0]);
    for (int i = threadIdx.x; i < (p.num_codes + 1) * kWidth; i += kThreads)
      shared.sums<T>(p.num_codes)[i] = 0;
    for (int i = threadIdx.x; i < p.num_codes; i += kThreads) shared.counts[i] = 0;
  }
  fence_shared_for_async();
  __syncthreads();
  quantize_tiles<T, kVectors, kSums>(p, shared);
  if constexpr (kVectors) write_parts<T, kSums>(p, shared);
}

}  // namespace cuda
}  // namespace msvq
