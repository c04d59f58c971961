// What follows from the search: the codes that it left open, z_q and the loss; and a block whole.
#pragma once
#include "vector_quantize/quantize_hopper_codebook.h"
#include "vector_quantize/quantize_hopper_exact.h"
#include "vector_quantize/quantize_hopper_search.h"

namespace msvq {
namespace cuda {

constexpr int kRows = kTile / kAssistants;  // of a tile that a warp settles and writes

// The code of row lane % kRows of this warp's, also where the search left it open.
template <class T>
MSVQ_WARPS int settle_rows(const QuantizeHopperParams& p, const TileCodes& tile, int row) {
  const int numbers = columns_of(p.num_codes) / kProductColumns * kPairsOfChunk;
  const int lane = thread_again() % 32, first = row % kTile;
  int code = tile.codes[first + lane % kRows];
  uint32_t open = __ballot_sync(~0u, code == kOpen) & ((1 << kRows) - 1);
  while (open) {
    const int i = __ffs(static_cast<int>(open)) - 1, at = first + i;
    open &= open - 1;
    const T* z = static_cast<const T*>(p.z) + int64_t{row + i} * p.z_stride;
    const int settled =
        settle(p, z, {tile.near[at], tile.any[at], tile.numbers[at], numbers, 0, 0, 0});
    if (lane % kRows == i) code = settled;
  }
  return code;
}

// z_q of this warp's rows, 16 lanes a row; returns this lane's part of the sum of (z - e)^2.
template <class T>
MSVQ_WARPS float write_rows(const QuantizeHopperParams& p, int row, int code) {
  const int lane = thread_again() % 32, part = lane % 16 * 4;
  const T* z = static_cast<const T*>(p.z) + part;
  float4 x[kRows / 2], e[kRows / 2];
  MSVQ_UNROLL
  for (int i = 0; i < kRows / 2; ++i) {
    const int of = max(__shfl_sync(~0u, code, 2 * i + lane / 16), 0) & (kNotFinite - 1);
    // Past the last row the last one again: loads without a condition do not wait for each other.
    x[i] = load_four(z + int64_t{min(row + 2 * i + lane / 16, p.count - 1)} * p.z_stride);
    e[i] = load_four(p.codebook + of * kWidth + part);
  }
  float error = 0;
  MSVQ_UNROLL
  for (int i = 0; i < kRows / 2; ++i) {
    const int at = row + 2 * i + lane / 16;
    if (at >= p.count) continue;
    store_four(static_cast<T*>(p.z_q) + int64_t{at} * p.z_q_stride + part, e[i]);
    const float a = x[i].x - e[i].x, b = x[i].y - e[i].y;
    const float c = x[i].z - e[i].z, d = x[i].w - e[i].w;
    error = fmaf(a, a, fmaf(b, b, fmaf(c, c, fmaf(d, d, error))));
  }
  return error;
}

// Eight rows of every tile for each warp.
template <class T, bool kVectors>
MSVQ_WARPS void assist(const QuantizeHopperParams& p, QuantizeShared& shared) {
  const int warp = thread_again() / 32 - 4 * kSearchers, lane = thread_again() % 32;
  const int blocks = static_cast<int>(gridDim.x);
  double error = 0;
  int turn = 0;
  for (int first = static_cast<int>(blockIdx.x) * kTile; first < p.count;
       first += blocks * kTile, ++turn) {
    const int slot = turn % kSlots, row = first + warp * kRows;
    wait(&shared.full[slot], turn / kSlots & 1);
    const int code = settle_rows<T>(p, shared.ring[slot], row);
    __syncwarp();
    if (lane == 0) arrive(&shared.empty[slot]);
    if (lane < kRows && code != kNoRow) {
      p.codes[row + lane] = code & (kNotFinite - 1);
      if (p.keys) p.keys[row + lane] = static_cast<int16_t>(min(code, p.num_codes));
    }
    if constexpr (kVectors) error += write_rows<T>(p, row, code);
  }
  if constexpr (kVectors) {
    MSVQ_UNROLL
    for (int step = 16; step > 0; step /= 2) error += __shfl_xor_sync(~0u, error, step);
    if (lane == 0) shared.errors[warp] = error;
    sync_part(1, 32 * kAssistants);
    if (warp != 0 || lane != 0) return;
    error = 0;
    for (int i = 0; i < kAssistants; ++i) error += shared.errors[i];
    p.errors[blockIdx.x] = error;
  }
}

template <class T, bool kVectors>
MSVQ_WARPS void quantize_block(const QuantizeHopperParams& p, char* memory) {
  QuantizeShared& shared = *reinterpret_cast<QuantizeShared*>(memory);
  if (threadIdx.x < kSlots) {
    init_barrier(&shared.full[threadIdx.x], 4);
    init_barrier(&shared.empty[threadIdx.x], kAssistants);
  }
  load_codebook(p, shared);
  fence_shared_for_products();
  __syncthreads();
  if (threadIdx.x < 128 * kSearchers)
    search<T>(p, shared);
  else
    assist<T, kVectors>(p, shared);
}

}  // namespace cuda
}  // namespace msvq
