// The search of a warpgroup: a half-precision filter with a certified bound.
#pragma once
#include "vector_quantize/quantize_hopper.h"

namespace msvq {
namespace cuda {

// Have a tile in the second-level cache by the time it is asked for.
template <class T>
MSVQ_WARPS void prefetch_tile(const QuantizeHopperParams& p, int tile) {
  constexpr int kLine = 128 / sizeof(T), kLines = kWidth / kLine;  // values, lines a row
  const int thread = thread_again() % 128, row = tile * kTile + thread / kLines;
  if (thread < kTile * kLines && row < p.count)
    prefetch(static_cast<const T*>(p.z) + int64_t{row} * p.z_stride + thread % kLines * kLine);
}

MSVQ_WARPS float sum_of_quad(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
MSVQ_WARPS float least_of_quad(float x) {
  x = fminf(x, __shfl_xor_sync(~0u, x, 1));
  return fminf(x, __shfl_xor_sync(~0u, x, 2));
}

// A tile as the product's left side, and what separates the scores of a thread's two rows from
// their exact values. Thread 32 w + 4 g + q has, of rows 16 w + g and 8 further, of every 16 values
// 4 q ... 4 q + 3.
template <class T>
MSVQ_WARPS void load_tile(const QuantizeHopperParams& p, const QuantizeShared& shared, int tile,
                          uint32_t (&a)[4][4], float (&margin)[2]) {
  const int thread = thread_again() % 128, q = thread % 4;
  const float scale = shared.norms[3], code_norm = shared.norms[0], half_norm = shared.norms[1];
  const float code_error = shared.norms[2];
  MSVQ_UNROLL
  for (int h = 0; h < 2; ++h) {
    // Past the last row the last one again: loads without a condition do not wait for each other.
    const int row = min(tile * kTile + thread / 32 * 16 + thread % 32 / 4 + 8 * h, p.count - 1);
    const T* from = static_cast<const T*>(p.z) + int64_t{row} * p.z_stride + 4 * q;
    float4 x[4];
    MSVQ_UNROLL
    for (int s = 0; s < 4; ++s) x[s] = load_four(from + 16 * s);
    float square = 0, error = 0;
    MSVQ_UNROLL
    for (int s = 0; s < 4; ++s) {
      const float4 shift = *reinterpret_cast<const float4*>(shared.shift + 16 * s + 4 * q);
      // Exact but for the one rounding of a difference: the scale is a power of two.
      const float c[4] = {fmaf(x[s].x, scale, -shift.x), fmaf(x[s].y, scale, -shift.y),
                          fmaf(x[s].z, scale, -shift.z), fmaf(x[s].w, scale, -shift.w)};
      MSVQ_UNROLL
      for (int pair = 0; pair < 2; ++pair) {
        const float low = c[2 * pair], high = c[2 * pair + 1];
        a[s][2 * pair + h] = pack_halves(low, high);
        const float2 rounded = unpack_halves(a[s][2 * pair + h]);
        square = fmaf(low, low, fmaf(high, high, square));
        const float off = low - rounded.x, other = high - rounded.y;
        error = fmaf(off, off, fmaf(other, other, error));
      }
    }
    square = sum_of_quad(square);
    const float row_norm = quick_root(square) * 1.001f + 1e-15f;
    const float row_error = quick_root(sum_of_quad(error)) * 1.001f + 1e-15f;
    const float both = row_norm + code_norm;
    float m = row_error * code_norm + (row_norm + row_error) * code_error;
    m += (kWidth + 32) * 1.2e-7f * (row_norm + row_error) * half_norm;
    m += (2 * kNumberMask + 8) * 1.2e-7f * code_norm * both;
    // Beyond float16 the error is infinite, of NaN it is NaN: no bound then.
    margin[h] = 2.02f * m + (kWidth + 8) * 2.3e-16f * both * both + 1e-30f;
  }
}

// The lowest two scores of each lane of two rows, with the number of the pair in the lowest bits.
struct LowestScores {
  float first[2][2], second[2][2];  // row, half of the 64 columns

  MSVQ_WARPS LowestScores() {
    MSVQ_UNROLL
    for (int i = 0; i < 4; ++i) first[i / 2][i % 2] = second[i / 2][i % 2] = 0x1p127f;  // pair 0
  }

  // Scores |c|^2 / 2 - x.c of a chunk of columns; `seeds` are those of this thread's columns.
  MSVQ_WARPS void add(const Accumulators& products, const float* seeds, int chunk) {
    MSVQ_UNROLL
    for (int j = 0; j < 2 * kPairsOfChunk; ++j) {
      const int part = j / kPairsOfChunk;
      const float2 seed = *reinterpret_cast<const float2*>(seeds + 8 * j);
      MSVQ_UNROLL
      for (int h = 0; h < 2; ++h) {
        float score = fminf(seed.x - products[4 * j + 2 * h], seed.y - products[4 * j + 2 * h + 1]);
        const int number = chunk * kPairsOfChunk + j % kPairsOfChunk;
        score = __int_as_float((__float_as_int(score) & ~kNumberMask) | number);
        second[h][part] = fminf(second[h][part], fmaxf(first[h][part], score));
        first[h][part] = fminf(first[h][part], score);
      }
    }
  }
};

// A warpgroup waits for its products; meanwhile the others read the scores of theirs.
MSVQ_WARPS void score_pairs(const uint32_t (&a)[4][4], QuantizeShared& shared, int num_codes,
                            LowestScores& lowest) {
  const float* seeds = shared.seeds + 2 * (thread_again() % 4);
  MatrixDescriptor codes(shared_address(shared.codes()), kAlong, kAcross);
  for (int chunk = 0; chunk * kProductColumns < num_codes; ++chunk) {
    Accumulators products;
    begin_products();
    MSVQ_UNROLL
    for (int s = 0; s < 4; ++s) multiply(products, a[s], codes + 2 * s * kAlong, s > 0);
    end_products();
    wait_products(products);
    lowest.add(products, seeds + chunk * kProductColumns, chunk);
    codes = codes + kProductColumns / 8 * kAcross;
  }
}

// Scores of the two codes of a pair for every row: its first column in `column`, which all lanes of
// the row know. One product of a warp tells four rows; theirs are in lane g % 4 of quad g.
MSVQ_WARPS void score_codes(const uint32_t (&a)[4][4], QuantizeShared& shared,
                            const int (&column)[2], float2 (&out)[2]) {
  const int lane = thread_again() % 32, quad = lane / 4;
  const uint32_t from = shared_address(shared.codes()) + static_cast<uint32_t>(lane / 8 * kAlong);
  MSVQ_UNROLL
  for (int h = 0; h < 2; ++h) {
    out[h] = make_float2(0, 0);
    MSVQ_UNROLL
    for (int part = 0; part < 2; ++part) {
      // Lane l gives the address of code l % 2 of the pair of row 4 part + l / 2 % 4.
      const int at = __shfl_sync(~0u, column[h], 16 * part + lane % 8 / 2 * 4) + lane % 2;
      const uint32_t address = from + static_cast<uint32_t>(at / 8 * kAcross + at % 8 * 16);
      uint32_t low[4], high[4];
      load_blocks(address, low);
      load_blocks(address + 4 * kAlong, high);
      float product[4] = {0, 0, 0, 0};
      multiply(product, a[0], low[0], low[1]);
      multiply(product, a[1], low[2], low[3]);
      multiply(product, a[2], high[0], high[1]);
      multiply(product, a[3], high[2], high[3]);
      const bool own = quad / 4 == part;
      out[h].x = own ? product[2 * h] : out[h].x;
      out[h].y = own ? product[2 * h + 1] : out[h].y;
    }
    const float2 seed = *reinterpret_cast<const float2*>(shared.seeds + column[h]);
    out[h].x = seed.x - out[h].x, out[h].y = seed.y - out[h].y;
  }
}

// Codes of the tiles of one of the block's searching warpgroups.
template <class T>
MSVQ_WARPS void search(const QuantizeHopperParams& p, QuantizeShared& shared) {
  const int searcher = threadIdx.x / 128;
  const int blocks = static_cast<int>(gridDim.x);
  int tile = static_cast<int>(blockIdx.x) + searcher * blocks;
  for (int turn = searcher; tile * kTile < p.count; turn += kSearchers) {
    prefetch_tile<T>(p, tile + kSearchers * blocks);
    uint32_t a[4][4];
    float margin[2];
    load_tile<T>(p, shared, tile, a, margin);
    LowestScores lowest;
    score_pairs(a, shared, p.num_codes, lowest);

    const int thread = thread_again() % 128, lane = thread % 32, first_of_quad = lane & ~3;
    uint32_t near[2], any[2];  // bit of every lane of this row
    int number[2][2], column[2];
    MSVQ_UNROLL
    for (int h = 0; h < 2; ++h) {
      const float limit = least_of_quad(fminf(lowest.first[h][0], lowest.first[h][1])) + margin[h];
      near[h] = any[h] = 0;
      MSVQ_UNROLL
      for (int part = 0; part < 2; ++part) {
        const float first = lowest.first[h][part], second = lowest.second[h][part];
        near[h] |= (__ballot_sync(~0u, first <= limit) >> first_of_quad & 15) << (4 * part);
        any[h] |= (__ballot_sync(~0u, second <= limit) >> first_of_quad & 15) << (4 * part);
        number[h][part] = __float_as_int(first) & kNumberMask;
      }
      if (!(limit < 1e29f)) near[h] = any[h] = 255;
      const int nearest = max(__ffs(static_cast<int>(near[h])) - 1, 0);
      const int left = __shfl_sync(~0u, number[h][0], first_of_quad + nearest % 4);
      const int right = __shfl_sync(~0u, number[h][1], first_of_quad + nearest % 4);
      column[h] = pair_column(nearest, nearest < 4 ? left : right);
    }
    float2 score[2];
    score_codes(a, shared, column, score);
    const int slot = turn % kSlots;
    TileCodes& out = shared.ring[slot];
    wait(&shared.empty[slot], (turn / kSlots & 1) ^ 1);
    MSVQ_UNROLL
    for (int h = 0; h < 2; ++h) {
      const bool one_lane = __popc(near[h]) == 1 && any[h] == 0;
      const bool certain = one_lane && fabsf(score[h].x - score[h].y) > margin[h];
      const int code = certain ? column[h] + (score[h].y < score[h].x ? 1 : 0) : kOpen;
      const int at = thread / 32 * 16 + lane / 4 + 8 * h;
      if (lane % 4 == lane / 4 % 4) {
        out.codes[at] = tile * kTile + at < p.count ? code : kNoRow;
        out.near[at] = static_cast<uint8_t>(near[h]), out.any[at] = static_cast<uint8_t>(any[h]);
      }
      out.numbers[at][lane % 4] = static_cast<uint8_t>(number[h][0]);
      out.numbers[at][4 + lane % 4] = static_cast<uint8_t>(number[h][1]);
    }
    __syncwarp();
    if (lane == 0) arrive(&shared.full[slot]);
    tile += kSearchers * blocks;
  }
}

}  // namespace cuda
}  // namespace msvq
