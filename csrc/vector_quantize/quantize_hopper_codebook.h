// The codebook into a block's shared memory: centred, scaled by a power of two, in half precision.
#pragma once
#include "vector_quantize/quantize_hopper.h"

namespace msvq {
namespace cuda {

MSVQ_WARPS void raise_to(float* to, float x) {  // x >= 0
  atomicMax(reinterpret_cast<int*>(to), __float_as_int(x));
}

// Leaves the mean of the finite codes in shift, and how far any lies from it in norms[3].
// The mean need not be exact: any shift leaves the nearest code what it is.
MSVQ_WARPS void measure_codes(const QuantizeHopperParams& p, QuantizeShared& shared) {
  constexpr int kAtOnce = 16;  // the scratch may reach beyond the codes
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float* sums = reinterpret_cast<float*>(shared.codes());          // (kWarps, D)
  float* lows = sums + kWarps * kWidth;                            // (kWarps, D)
  float* highs = lows + kWarps * kWidth;                           // (kWarps, D)
  int* numbers = reinterpret_cast<int*>(highs + kWarps * kWidth);  // (kWarps,)
  if (threadIdx.x < 4) shared.norms[threadIdx.x] = 0;
  shared.clear_seeds();
  float2 sum = make_float2(0, 0), low = make_float2(INFINITY, INFINITY);
  float2 high = make_float2(-INFINITY, -INFINITY);
  int number = 0;
  for (int first = warp; first < p.num_codes; first += kWarps * kAtOnce) {
    float2 e[kAtOnce];
    MSVQ_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      const int code = min(first + i * kWarps, p.num_codes - 1);
      e[i] = __ldg(reinterpret_cast<const float2*>(p.codebook + code * kWidth) + lane);
    }
    MSVQ_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      const bool finite = is_finite(e[i].x) && is_finite(e[i].y);
      if (!__all_sync(~0u, finite) || first + i * kWarps >= p.num_codes) continue;
      sum.x += e[i].x / kMostCodes, sum.y += e[i].y / kMostCodes;  // or K could overflow
      low.x = fminf(low.x, e[i].x), low.y = fminf(low.y, e[i].y);
      high.x = fmaxf(high.x, e[i].x), high.y = fmaxf(high.y, e[i].y);
      ++number;
    }
  }
  const int at = warp * kWidth + 2 * lane;
  sums[at] = sum.x, sums[at + 1] = sum.y;
  lows[at] = low.x, lows[at + 1] = low.y;
  highs[at] = high.x, highs[at + 1] = high.y;
  if (lane == 0) numbers[warp] = number;
  __syncthreads();
  if (threadIdx.x < kWidth) {
    float sum = 0, low = INFINITY, high = -INFINITY;
    int number = 0;
    for (int w = 0; w < kWarps; ++w) {
      const int at = w * kWidth + static_cast<int>(threadIdx.x);
      sum += sums[at], low = fminf(low, lows[at]), high = fmaxf(high, highs[at]);
      number += numbers[w];
    }
    const float centre = number ? sum / static_cast<float>(number) * kMostCodes : 0.0f;
    const double reach =
        fmax(static_cast<double>(high) - centre, centre - static_cast<double>(low));
    shared.shift[threadIdx.x] = centre;
    // Scores of codes that are not there are beyond all others; where there are no others, no
    // bound.
    if (number == 0) shared.norms[2] = INFINITY;
    raise_to(&shared.norms[3], number ? fminf(static_cast<float>(reach), 1e38f) : 0.0f);
  }
  __syncthreads();
}

// Codes that another before them equals are never the lowest nearest; left out, they tie no row.
// A table finds the lowest code with a hash; where it is another's, other bits of it are tried.
// A repeated code that none of them finds is slow, not wrong.
MSVQ_WARPS void drop_duplicates(const QuantizeHopperParams& p, QuantizeShared& shared,
                                const uint32_t* hashes, int* table) {
  constexpr int kEach = (kMostCodes + kThreads - 1) / kThreads;  // codes of a thread
  bool found[kEach] = {};
  int* left = table + kTable;  // codes that the tries so far did not find
  if (threadIdx.x < kTries) left[threadIdx.x] = 0;
  for (int again = 0; again < kTries; ++again) {
    const int shift = again * 10;
    for (int i = threadIdx.x; i < kTable; i += kThreads) table[i] = 0;
    __syncthreads();
    MSVQ_UNROLL
    for (int i = 0; i < kEach; ++i) {
      const int code = thread_again() + i * kThreads;
      if (code < p.num_codes && !found[i])
        atomicMax(&table[hashes[code] >> shift & (kTable - 1)], kMostCodes - code);
    }
    __syncthreads();
    MSVQ_UNROLL
    for (int i = 0; i < kEach; ++i) {
      const int code = thread_again() + i * kThreads;
      if (code >= p.num_codes || found[i]) continue;
      const int lowest = kMostCodes - table[hashes[code] >> shift & (kTable - 1)];
      if (hashes[lowest] != hashes[code]) left[again] = 1;
      if (hashes[lowest] != hashes[code]) continue;
      found[i] = true;
      bool same = lowest != code;
      for (int d = 0; d < kWidth && same; ++d)
        same = p.codebook[code * kWidth + d] == p.codebook[lowest * kWidth + d];
      if (same) shared.set_seed(code, false, 0);
    }
    __syncthreads();
    if (left[again] == 0) break;
  }
}

// Every block works this out alike. Ends before the barrier that has to follow.
MSVQ_WARPS void load_codebook(const QuantizeHopperParams& p, QuantizeShared& shared) {
  measure_codes(p, shared);
  const int warp = thread_again() / 32, lane = thread_again() % 32, q = lane % 4;
  float reach = shared.norms[3];
  reach = reach > 0 ? fminf(fmaxf(reach, 1.1754943508222875e-38f), 8.507059173023462e37f) : 1.0f;
  // The power of two at or below it: the exponent's bits alone.
  const double scale = 1.0 / __int_as_float(__float_as_int(reach) & 0x7F800000);
  float centres[4][4];
  MSVQ_UNROLL
  for (int i = 0; i < 16; ++i) centres[i / 4][i % 4] = shared.shift[i / 4 * 16 + 4 * q + i % 4];
  __syncthreads();
  if (threadIdx.x < kWidth)
    shared.shift[threadIdx.x] = static_cast<float>(shared.shift[threadIdx.x] * scale);
  if (threadIdx.x == 0) shared.norms[3] = static_cast<float>(scale);

  uint32_t* hashes = reinterpret_cast<uint32_t*>(shared.rows(p.num_codes));  // until rows come
  int* table = reinterpret_cast<int*>(hashes + kMostCodes);
  float norm = 0, half_norm = 0, error = 0;
  for (int block = warp; block < columns_of(p.num_codes) / 8; block += kThreads / 32) {
    const int code = block * 8 + lane / 4;
    float4 e[4];
    MSVQ_UNROLL
    for (int s = 0; s < 4; ++s)
      e[s] = load_four(p.codebook + min(code, p.num_codes - 1) * kWidth + 16 * s + 4 * q);
    const bool finite = code < p.num_codes && is_finite(e[0]) && is_finite(e[1]) &&
                        is_finite(e[2]) && is_finite(e[3]);
    const bool there = (__ballot_sync(~0u, finite) >> (lane & ~3) & 15) == 15;
    double square = 0;
    float half_square = 0, error_square = 0;
    uint32_t hash = static_cast<uint32_t>(q);
    MSVQ_UNROLL
    for (int s = 0; s < 4; ++s) {
      const float values[4] = {e[s].x, e[s].y, e[s].z, e[s].w};
      float c[4];
      MSVQ_UNROLL
      for (int k = 0; k < 4; ++k) {
        hash = (hash ^ static_cast<uint32_t>(__float_as_int(values[k] + 0.0f))) * 0x9E3779B1u;
        hash ^= hash >> 15;
        const double exact = there ? (static_cast<double>(values[k]) - centres[s][k]) * scale : 0.0;
        c[k] = static_cast<float>(exact);
        square += exact * exact;
      }
      // Values 4 q and 4 q + 1 of 16 are the product's 2 q and 2 q + 1, the others 8 further.
      MSVQ_UNROLL
      for (int pair = 0; pair < 2; ++pair) {
        const uint32_t half = pack_halves(c[2 * pair], c[2 * pair + 1]);
        const float2 rounded = unpack_halves(half);
        const float off = c[2 * pair] - rounded.x, other = c[2 * pair + 1] - rounded.y;
        half_square += rounded.x * rounded.x + rounded.y * rounded.y;
        error_square += off * off + other * other;
        *reinterpret_cast<uint32_t*>(shared.codes() + block * kAcross + (2 * s + pair) * kAlong +
                                     lane / 4 * 16 + q * 4) = half;
      }
    }
    MSVQ_UNROLL
    for (int step = 1; step < 4; step *= 2) {
      square += __shfl_xor_sync(~0u, square, step);
      half_square += __shfl_xor_sync(~0u, half_square, step);
      error_square += __shfl_xor_sync(~0u, error_square, step);
      hash ^= __shfl_xor_sync(~0u, hash, step);
    }
    if (q == 0) {
      shared.set_seed(code, there, static_cast<float>(0.5 * square));
      if (code < p.num_codes) hashes[code] = hash;
    }
    norm = fmaxf(norm, static_cast<float>(square));
    half_norm = fmaxf(half_norm, half_square);
    error = fmaxf(error, error_square);
  }
  // Not below norms[1]'s, and with what tensor cores may cut off of products with subnormal halves.
  raise_to(&shared.norms[0], sqrtf(norm) * 1.00001f + 2e-6f);
  raise_to(&shared.norms[1], sqrtf(half_norm) * 1.00001f + 1e-30f);
  // Of the rounding of the centred value to float32 too.
  raise_to(&shared.norms[2], sqrtf(error) * 1.00001f + 1e-7f * sqrtf(norm) + 1e-30f);
  __syncthreads();
  drop_duplicates(p, shared, hashes, table);
}

}  // namespace cuda
}  // namespace msvq
