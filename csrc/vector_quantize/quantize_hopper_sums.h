// Sums of every code's rows where they do not fit beside the codes, and the totals of all parts.
#pragma once
#include "vector_quantize/quantize_hopper_outputs.h"

namespace msvq {
namespace cuda {

constexpr int kSumWarps = 16;
constexpr int kSumThreads = 32 * kSumWarps;
constexpr int kHalfWidth = kWidth / 2;  // of D, a block's
constexpr int kBatch = 32;              // rows that a warp adds at once, 8 lanes a row
constexpr int kTotalThreads = 4 * kWidth;
constexpr int kTotalBytes = kTotalThreads * static_cast<int>(sizeof(double)) + 16;

struct alignas(128) SumShared {
  uint64_t turns[kSumWarps];  // the warp before has added its rows
  int counts[kMostCodes];

  MSVQ_WARPS float* sums() {  // (K + 1, 32); the last takes what no code does
    return reinterpret_cast<float*>(this + 1);
  }
};
inline int sum_shared_bytes(int num_codes) {
  return static_cast<int>(sizeof(SumShared)) + (num_codes + 1) * kHalfWidth * 4;
}

// Rows as they come from memory.
template <class T>
struct Batch {
  typename Four<T>::Bits rows[kBatch / 4];
  int key;  // of row `lane`
};

// The first row of this warp's batch in a round, past the last where there is none. Batches are in
// order of rounds, parts and warps: a warp that has none left is followed by none that has.
MSVQ_WARPS int batch_of(const QuantizeHopperSums& p, int round) {
  const int part = static_cast<int>(blockIdx.x) / 2, warp = thread_again() / 32;
  return ((round * kSumWarps + warp) * p.parts + part) * kBatch;
}

// Begins to read a batch; the last row in place of those that do not exist.
template <class T>
MSVQ_WARPS void begin_batch(const QuantizeHopperSums& p, int first, Batch<T>& batch) {
  const int lane = thread_again() % 32, last = p.count - 1;
  const int part = static_cast<int>(blockIdx.x) % 2 * kHalfWidth + lane % 8 * 4;
  const char* z = reinterpret_cast<const char*>(static_cast<const T*>(p.z) + part);
  const int stride = again(p.z_stride * static_cast<int>(sizeof(T)));
  batch.key = load_now(p.keys + min(first + lane, last));
  MSVQ_UNROLL
  for (int i = 0; i < kBatch / 4; ++i) {
    const int row = min(first + 4 * i + lane / 8, last);
    batch.rows[i] =
        load_now(reinterpret_cast<const typename Four<T>::Bits*>(z + int64_t{row} * stride));
  }
}

// Counts the rows and puts the sum of those of one code in place of the first of them, by codes of
// several rows: 16 at most. Returns the code to add row `lane` to, K if there is none.
MSVQ_WARPS int combine_batch(const QuantizeHopperSums& p, SumShared& shared, WarpRows& x, int key) {
  const int lane = thread_again() % 32;
  const unsigned same = lanes_of_code<kMostCodes>(key, key < p.num_codes);
  const bool first = key < p.num_codes && __ffs(static_cast<int>(same)) - 1 == lane;
  if (blockIdx.x % 2 == 0 && first) atomicAdd(&shared.counts[key], __popc(same));
  unsigned left = __ballot_sync(~0u, first && (same & (same - 1)) != 0);
  MSVQ_NO_UNROLL
  for (; left != 0; left &= left - 1) {
    const int to = __ffs(static_cast<int>(left)) - 1;
    const unsigned own = __shfl_sync(~0u, same, to) >> (lane / 8);
    float4 sum = make_float4(0, 0, 0, 0);
    MSVQ_UNROLL
    for (int i = 0; i < kBatch / 4; ++i) add_where(own >> (4 * i) & 1, sum, x[i]);
    MSVQ_UNROLL
    for (int step = 8; step < 32; step *= 2)
      sum = sum_of(
          sum, make_float4(__shfl_xor_sync(~0u, sum.x, step), __shfl_xor_sync(~0u, sum.y, step),
                           __shfl_xor_sync(~0u, sum.z, step), __shfl_xor_sync(~0u, sum.w, step)));
    MSVQ_UNROLL
    for (int i = 0; i < kBatch / 4; ++i)
      if (4 * i + lane / 8 == to) x[i] = sum;
  }
  return first ? key : p.num_codes;
}

// Adds a batch, in this warp's turn: the sums are the same whatever the timing.
MSVQ_WARPS void add_batch(const QuantizeHopperSums& p, SumShared& shared, uint32_t parity,
                          WarpRows& x, int key) {
  const int lane = thread_again() % 32, warp = thread_again() / 32;
  const int to = combine_batch(p, shared, x, key);
  float* const sums = shared.sums() + lane % 8 * 4;
  float4* at[kBatch / 4];
  MSVQ_UNROLL
  for (int i = 0; i < kBatch / 4; ++i) {
    const int of = __shfl_sync(~0u, to, 4 * i + lane / 8);
    at[i] = reinterpret_cast<float4*>(sums + of * kHalfWidth);
  }
  uint64_t* const after = warp + 1 < kSumWarps ? &shared.turns[warp + 1] : &shared.turns[0];
  wait(&shared.turns[warp], parity);
  add_at(at, x);
  __syncwarp();
  if (lane == 0) arrive(after);
}

// A part of the rows and half of D. A batch is read while the one before waits for its turn.
template <class T>
MSVQ_WARPS void sum_rows(const QuantizeHopperSums& p, char* memory) {
  SumShared& shared = *reinterpret_cast<SumShared*>(memory);
  const int part = static_cast<int>(blockIdx.x) / 2, half = static_cast<int>(blockIdx.x) % 2;
  Batch<T> next;
  begin_batch(p, batch_of(p, 0), next);
  if (threadIdx.x < kSumWarps) init_barrier(&shared.turns[threadIdx.x], 1);
  if (threadIdx.x == 0) arrive(&shared.turns[0]);
  float4* const sums = reinterpret_cast<float4*>(shared.sums());
  for (int i = threadIdx.x; i < (p.num_codes + 1) * (kHalfWidth / 4); i += kSumThreads)
    sums[i] = make_float4(0, 0, 0, 0);
  for (int i = threadIdx.x; i < p.num_codes; i += kSumThreads) shared.counts[i] = 0;
  __syncthreads();
  MSVQ_NO_UNROLL
  for (int round = 0; batch_of(p, round) < p.count; ++round) {
    WarpRows x;
    MSVQ_UNROLL
    for (int i = 0; i < kBatch / 4; ++i)
      x[i] = four_of(next.rows[i], static_cast<const T*>(nullptr));
    const bool there = batch_of(p, round) + thread_again() % 32 < p.count;
    const int key = there ? next.key : p.num_codes;
    begin_batch(p, batch_of(p, round + 1), next);
    add_batch(p, shared, round & 1, x, key);
  }
  __syncthreads();
  float4* const to = reinterpret_cast<float4*>(p.sums + int64_t{part} * p.num_codes * kWidth);
  for (int i = threadIdx.x; i < p.num_codes * (kHalfWidth / 4); i += kSumThreads)
    to[i / 8 * (kWidth / 4) + half * 8 + i % 8] = sums[i];
  if (half == 0)
    for (int i = threadIdx.x; i < p.num_codes; i += kSumThreads)
      p.counts[part * p.num_codes + i] = shared.counts[i];
}

// The totals of one code, by four times 64 threads; the first block's first warp has the loss too.
MSVQ_WARPS void total_code(const QuantizeHopperTotals& t, char* memory) {
  constexpr int kAtOnce = 8;
  const int code = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const int d = thread % kWidth, quarter = thread / kWidth;
  double* sums = reinterpret_cast<double*>(memory);  // (4, D)
  int* number = reinterpret_cast<int*>(sums + kTotalThreads);
  if (thread == 0) *number = 0;
  const int64_t step = int64_t{t.num_codes} * kWidth;
  const float* from = t.part_sums + int64_t{code} * kWidth + d;
  double sum = 0;
  for (int part = quarter; part < t.parts; part += 4 * kAtOnce) {
    float of[kAtOnce];  // several at once
    MSVQ_UNROLL
    for (int i = 0; i < kAtOnce; ++i) of[i] = __ldg(from + min(part + 4 * i, t.parts - 1) * step);
    MSVQ_UNROLL
    for (int i = 0; i < kAtOnce; ++i) sum += part + 4 * i < t.parts ? of[i] : 0.0f;
  }
  sums[thread] = sum;
  __syncthreads();
  for (int part = thread; part < t.parts; part += kTotalThreads)
    atomicAdd(number, t.part_counts[int64_t{part} * t.num_codes + code]);
  __syncthreads();
  if (quarter == 0)
    t.sums[code * kWidth + d] = static_cast<float>((sums[d] + sums[d + kWidth]) +
                                                   (sums[d + 2 * kWidth] + sums[d + 3 * kWidth]));
  if (thread == 0) t.counts[code] = *number;
  if (code == 0 && thread < 32) {
    double error = 0;
    for (int block = thread; block < t.blocks; block += 32) error += t.errors[block];
    MSVQ_UNROLL
    for (int lanes = 16; lanes > 0; lanes /= 2) error += __shfl_xor_sync(~0u, error, lanes);
    if (thread == 0) *t.loss = static_cast<float>(error * t.factor);
  }
}

}  // namespace cuda
}  // namespace msvq
