// Sums of every code's rows: those of the blocks' parts, and of rows that are sorted by code.
#pragma once
#include "vector_quantize/quantize_hopper_outputs.h"

namespace msvq {
namespace cuda {

constexpr int kTotalThreads = 4 * kWidth;
constexpr int kTotalBytes = kTotalThreads * static_cast<int>(sizeof(double)) + 16;

// The first of entries `low` to `high` that is not below `key`.
MSVQ_WARPS int lower_bound(const int16_t* keys, int low, int high, int key) {
  while (low < high) {
    const int middle = low + (high - low) / 2;
    const bool below = keys[middle] < key;
    low = below ? middle + 1 : low, high = below ? high : middle;
  }
  return low;
}

// The sum of entries `first` to `last`, this lane's part; 16 lanes a row, every second row.
template <class T>
MSVQ_WARPS float4 sum_of_entries(const QuantizeHopperTotals& t, int first, int last) {
  constexpr int kAtOnce = 8;
  const int lane = threadIdx.x % 32;
  const T* z = static_cast<const T*>(t.z) + lane % 16 * 4;
  float4 sum = make_float4(0, 0, 0, 0);
  for (int entry = first + lane / 16; entry < last; entry += 2 * kAtOnce) {
    int64_t rows[kAtOnce];
    float4 x[kAtOnce];
    MSVQ_UNROLL
    for (int i = 0; i < kAtOnce; ++i) rows[i] = t.order[min(entry + 2 * i, last - 1)];
    MSVQ_UNROLL
    for (int i = 0; i < kAtOnce; ++i) x[i] = load_four(z + rows[i] * t.z_stride);
    MSVQ_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      const bool there = entry + 2 * i < last;
      sum = sum_of(sum, there ? x[i] : make_float4(0, 0, 0, 0));
    }
  }
  return sum;
}

// A warp's piece of the sorted rows, code by code. Those that are not finite come last.
template <class T>
MSVQ_WARPS void sum_piece(const QuantizeHopperTotals& t, int piece) {
  const int lane = threadIdx.x % 32, first = piece * kPiece, last = min(first + kPiece, t.count);
  for (int at = first; at < last;) {
    const int code = t.keys[at];
    if (code >= t.num_codes) break;
    const int end = lower_bound(t.keys, at, last, code + 1);
    const float4 own = sum_of_entries<T>(t, at, end);
    const float4 sum =
        sum_of(own, make_float4(__shfl_xor_sync(~0u, own.x, 16), __shfl_xor_sync(~0u, own.y, 16),
                                __shfl_xor_sync(~0u, own.z, 16), __shfl_xor_sync(~0u, own.w, 16)));
    const bool before = at == first && at > 0 && t.keys[at - 1] == code;
    const bool after = end == last && end < t.count && t.keys[end] == code;
    float* to = t.sums + code * kWidth;
    if (before || after) to = t.part_sums + (int64_t{piece} * 2 + (before ? 0 : 1)) * kWidth;
    if (lane < 16) reinterpret_cast<float4*>(to)[lane] = sum;
    at = end;
  }
}

// The totals of one code, by four times 64 threads; the first block's first warp has the loss too.
MSVQ_WARPS void total_code(const QuantizeHopperTotals& t, char* memory) {
  constexpr int kAtOnce = 8;
  const int code = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const int d = thread % kWidth, quarter = thread / kWidth;
  double* sums = reinterpret_cast<double*>(memory);  // (4, D)
  int* number = reinterpret_cast<int*>(sums + kTotalThreads);
  if (thread == 0) *number = 0;
  int first = 0, last = t.blocks;
  bool whole = false;  // the sum is there already
  int64_t step = int64_t{t.num_codes} * kWidth;
  const float* from = t.part_sums + int64_t{code} * kWidth + d;
  if (t.keys) {
    const int low = lower_bound(t.keys, 0, t.count, code);
    const int high = lower_bound(t.keys, low, t.count, code + 1);
    first = low / kPiece, last = high > low ? (high - 1) / kPiece + 1 : first;
    whole = last - first == 1;
    step = 2 * kWidth, from = t.part_sums + d;
    __syncthreads();
    if (thread == 0) *number = high - low;
  }
  double sum = 0;
  for (int part = first + quarter; part < last && !whole; part += 4 * kAtOnce) {
    float of[kAtOnce];  // a code that owns most rows has many parts: several at once
    MSVQ_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      const int at = min(part + 4 * i, last - 1);
      of[i] = __ldg(from + at * step + (t.keys && at == first ? kWidth : 0));
    }
    MSVQ_UNROLL
    for (int i = 0; i < kAtOnce; ++i) sum += part + 4 * i < last ? of[i] : 0.0f;
  }
  sums[thread] = sum;
  __syncthreads();
  if (!t.keys)
    for (int block = thread; block < t.blocks; block += kTotalThreads)
      atomicAdd(number, t.part_counts[int64_t{block} * t.num_codes + code]);
  __syncthreads();
  if (quarter == 0 && !whole)
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
