// The multi-scale loss of three scales and its gradients on tensor cores (sm_90a), in one pass over
// contiguous float32 images. See gaussian_blur_hopper.h for the products and their scales.
//
// A block streams the rows of a strip of 256 pixels, 16 rows a step. A warp has 16 columns. What a
// thread has of 16 x 16 sums down is, as it lies, the right side of the products along, and what it
// has of those is the right side of the next blur's products down. For that a product's rows and
// columns are in an order of their own: place i of 16 is 2 i, from 8 on 2 (i - 8) + 1. So warps
// have only sums down for each other, and a warp waits for the two beside it alone.
//
// Step t of a stream reads block t of rows (16 rows), which completes the sums down of block t - 1;
// their blur completes the sums down of block t - 2 of the second blur. These are compared a step
// later: between leaving sums and reading those of others there is always half a step of other
// work.
#pragma once
#include "gaussian_blur/gaussian_blur_hopper.h"
#include "multiscale_loss/multiscale_loss_hopper_params.h"

namespace msvq {
namespace cuda {

constexpr int kLossTile = kBand * kBand * 4;  // bytes of 16 x 16 elements
constexpr int kLossRing = 4;  // tiles of x that a warp keeps until they are compared
// Tiles of sums: of x from all warps, of x blurred once from all but the first and the last.
constexpr int kLossSums = 2 * kLossBandWarps - 2;

struct alignas(128) LossBandShared {
  char contributions[kLossBandBlocks][kLossBandScales][kLossTile];
  char x[kLossRing * kLossBandBlocks + 4]
        [kLossTile];                          // the last four of warps that compare nothing
  Fragment sums[kLossSums][2][2][32];         // of two turns, both parts: the right side along
  float4 blurred[kLossBandBlocks][2][2][32];  // x blurred once, of two steps, as threads have it
  Fragment low_band[kBandBlocks][32];         // the second parts of the band
  uint64_t ready[kLossSums][2];               // barriers: sums of a turn are there
  double totals[kLossBandBlocks][kLossBandScales];  // squares, of the warps that compare
  float factors[kLossSums][2];                      // what sums are multiplied by
  float4 grad_factors;
};
static_assert(sizeof(LossBandShared) <= 227 << 10, "more than a multiprocessor has");

// Thread 4 g + q of a warp. It has columns 2 g and 2 g + 1 of 16 and rows 4 q to 4 q + 3, of sums
// down rows 2 g and 2 g + 1 and columns 4 q to 4 q + 3.
struct BandLoss {
  // The right side of the products of 16 x 16 numbers: [part], words 2 j + h of columns of parity
  // j, rows of parity h; after a turn for the products along the same of rows and columns.
  using Parts = Fragment[2];

  const LossBandParams& p;
  LossBandShared& shared;
  Fragment band[kBandBlocks];    // the left side of all products, its first parts
  float open[2][2][8];           // sums down of either blur that lack two blocks of rows, and one
  int last_scale[2], scales[2];  // of the last block of rows, least of the last two
  float total[kLossBandScales];
  int column;       // the warp's first
  unsigned origin;  // the plane's first element
  int turns[2];     // sums left so far

  MSVQ_WARPS BandLoss(const LossBandParams& params, LossBandShared& memory)
      : p(params), shared(memory) {}

  static MSVQ_WARPS int lane() { return thread_again() % 32; }
  static MSVQ_WARPS int warp() { return thread_again() / 32; }
  MSVQ_WARPS int last_warp() const { return p.strip_blocks + 3; }
  MSVQ_WARPS bool blurs_twice() const { return warp() > 0 && warp() < last_warp(); }
  MSVQ_WARPS bool compares() const {
    return warp() > 1 && warp() < last_warp() - 1 && column < p.width;
  }
  // A warp's tile of sums of blur 0 or 1.
  static MSVQ_WARPS int tile_of(int blur, int of) { return blur * (kLossBandWarps - 1) + of; }

  MSVQ_WARPS float tap(int j) const {
    return j >= 0 && j <= 2 * p.radius ? (1 << kBandTapScale) * tap_at(p.half, p.radius, j) : 0.0f;
  }

  MSVQ_WARPS void run() {
    const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
    const int g = thread % 32 / 4, q = thread % 4;
    MSVQ_UNROLL
    for (int k = 0; k < kBandBlocks; ++k) {
      MSVQ_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int row = 2 * g + i % 2, column = kBand * k + i / 2 + 4 * q;
        const int at = column - row - (kBandHalo - p.radius);
        uint32_t parts[2];
        split(tap(at), tap(at + 2), parts);
        band[k].words[i] = parts[0];
        shared.low_band[k][thread % 32].words[i] = parts[1];  // the same from every warp
      }
    }
    if (thread < 2 * kLossSums) init_barrier(&shared.ready[thread / 2][thread % 2], 1);
    if (thread < kLossBandBlocks * kLossBandScales)
      shared.totals[thread / kLossBandScales][thread % kLossBandScales] = 0;
    if (thread == 0) {
      const float upstream = p.upstream ? *p.upstream : 1.0f;
      shared.grad_factors = make_float4(p.factors[0] * upstream, p.factors[1] * upstream,
                                        p.factors[2] * upstream, 0.0f);
    }
    __syncthreads();
    MSVQ_UNROLL
    for (int i = 0; i < 32; ++i) open[i / 16][i / 8 % 2][i % 8] = 0;
    MSVQ_UNROLL
    for (int blur = 0; blur < 2; ++blur) turns[blur] = 0, last_scale[blur] = scales[blur] = 0;
    if (warp() <= last_warp()) {
      const int cost = p.steps + kLossBandAround;
      const int end = (block + 1) * p.share + min(block + 1, p.rest);
      MSVQ_NO_UNROLL
      for (int at = block * p.share + min(block, p.rest); at < end;) {
        const int strip = at / cost, begin = strip * cost + kLossBandAround;
        const int from = max(at - begin, 0);
        at = min(begin + p.steps, end);
        if (at > begin + from) stream(strip, from, at - begin - from);
      }
    }
    __syncthreads();
    if (!p.partials || thread >= kLossBandScales) return;
    double sum = 0;
    MSVQ_NO_UNROLL
    for (int i = 0; i < kLossBandBlocks; ++i) sum += shared.totals[i][thread];
    p.partials[block * kMaxScales + thread] = sum;
  }

  // `count` blocks of rows of a strip from block `first` on.
  MSVQ_WARPS void stream(int strip, int first, int count) {
    column = (strip % p.count_x * p.strip_blocks + warp() - 2) * kBand;
    origin = static_cast<unsigned>(strip / p.count_x * p.height * p.width);
    MSVQ_UNROLL
    for (int m = 0; m < kLossBandScales; ++m) total[m] = 0;
    const int above = first - kLossBandAhead / 2, read = count + kLossBandAhead;
    fetch_x(above * kBand, 0);
    end_copies();
    if (compares()) fetch_contributions(first * kBand);
    end_copies();
    MSVQ_NO_UNROLL
    for (int t = 0; t <= read; ++t) {
      if (t < read) blur_x_down(t);
      if (t > kLossBandAhead && compares()) {
        float coarsest[2][4];
        meet(1);
        blur_along(1, coarsest);
        check<2>(coarsest, (above + t - 3) * kBand);
        wait_copies<0>();
        __syncwarp();
        compare(coarsest, t, (above + t - 3) * kBand);
      }
      __syncwarp();
      if (t + 1 < read) fetch_x((above + t + 1) * kBand, t + 1);
      end_copies();
      if (t > kLossBandAhead && t < read && compares())
        fetch_contributions((above + t - 2) * kBand);
      end_copies();
      if (t >= 2 && t < read) {
        meet(0);
        if (blurs_twice()) blur_again(t, (above + t - 1) * kBand);
      }
    }
    wait_copies<0>();
    if (compares()) add_totals();
  }

  // Where a warp keeps tile t of x.
  MSVQ_WARPS char* x_tile(int t) const {
    const int of = warp();
    const bool outer = of < 2 || of > p.strip_blocks + 1;
    return shared.x[outer ? kLossRing * kLossBandBlocks + (of < 2 ? of : of - p.strip_blocks)
                          : kLossRing * (of - 2) + t % kLossRing];
  }

  // The 16 bytes of a row in a tile that hold its columns from 4 i on: two rows a line of the
  // banks, in an order in which neither reads nor copies meet in a bank.
  static MSVQ_WARPS int quad_place(int row, int i) {
    return row / 2 * 128 + ((row % 2 * 4 + i) ^ row / 4 * 2) * 16;
  }
  // A thread's columns in its row r of four.
  static MSVQ_WARPS int pair_place(int r) {
    const int g = lane() / 4, q = lane() % 4;
    return ((q * 256 + (g / 2 ^ 2 * q) * 16 + g % 2 * 8) ^ r % 2 * 64) + r / 2 * 128;
  }

  // Asks for 16 rows of x from row y on.
  MSVQ_WARPS void fetch_x(int y, int t) const {
    char* const to = x_tile(t);
    const bool inside = y >= 0 && y < p.height;
    if (column >= 0 && column < p.width) {
      MSVQ_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int row = lane() / 4 + 8 * i, at = lane() % 4;
        const int from = inside ? y + row : walked_source(p.border, y + row, p.height);
        copy_ahead<16>(to + quad_place(row, at), p.x + (origin + index(from, column + 4 * at)));
      }
    } else {
      const int at = lane() % kBand, from_x = walked_source(p.border, column + at, p.width);
      MSVQ_NO_UNROLL
      for (int row = lane() / kBand; row < kBand; row += 2) {
        const int from = inside ? y + row : walked_source(p.border, y + row, p.height);
        copy_ahead<4>(to + quad_place(row, at / 4) + at % 4 * 4,
                      p.x + (origin + index(from, from_x)));
      }
    }
  }
  MSVQ_WARPS unsigned index(int y, int x) const { return static_cast<unsigned>(y * p.width + x); }

  MSVQ_WARPS void fetch_contributions(int y) const {
    const int row = lane() / 4, at = lane() % 4;
    const unsigned from = origin + index(y + row, column + 4 * at);
    MSVQ_UNROLL
    for (int m = 0; m < kLossBandScales; ++m) {
      MSVQ_UNROLL
      for (int i = 0; i < 2; ++i)
        copy_ahead<16>(shared.contributions[warp() - 2][m] + quad_place(row + 8 * i, at),
                       p.contributions[m] + (from + static_cast<unsigned>(8 * i * p.width)));
    }
  }

  // The scale of 16 x 16 numbers; 255 if they are not all finite, and nothing that follows from
  // them is.
  static MSVQ_WARPS int scale_for(float most) {
    const int bits = static_cast<int>(__reduce_max_sync(~0u, __float_as_uint(most)) >> 23);
    return bits >= 255 ? 255 : min(127 + 13 + 127 - bits, 127 + 127 - kBandTapScale);
  }
  // 1 over that scale and the taps'.
  static MSVQ_WARPS float factor_for(int scale) {
    return power_of_two(max(127 + 127 - kBandTapScale - scale, 0));
  }

  // value[2 j + h], h over two neighbours in the sum.
  static MSVQ_WARPS void split_all(const float (&value)[8], int scale, Parts& parts) {
    const float factor = power_of_two(scale);
    MSVQ_UNROLL
    for (int i = 0; i < 4; ++i) {
      uint32_t both[2];
      split(factor * value[2 * i], factor * value[2 * i + 1], both);
      parts[0].words[i] = both[0], parts[1].words[i] = both[1];
    }
  }

  // product = block k of the band times the right side of which these are the parts.
  MSVQ_WARPS void multiply_parts(int k, const Fragment& low_band, const Parts& parts, int j,
                                 float (&product)[4]) const {
    multiply(product, low_band.words, parts[0].words[2 * j], parts[0].words[2 * j + 1]);
    multiply(product, band[k].words, parts[1].words[2 * j], parts[1].words[2 * j + 1]);
    multiply(product, band[k].words, parts[0].words[2 * j], parts[0].words[2 * j + 1]);
  }

  // Adds a block of rows to the sums down of a blur and leaves those it completes.
  template <int kBlur>
  MSVQ_WARPS void blur_down(const float (&value)[8], float most, bool leaves) {
    const int scale = scale_for(most);
    Parts parts;
    split_all(value, scale, parts);
    const float factor = factor_for(scale);
    float done[8];  // [4 j + i], as the products have them
    MSVQ_UNROLL
    for (int k = kBandBlocks - 1; k >= 0; --k) {
      const Fragment low_band = shared.low_band[k][lane()];
      MSVQ_UNROLL
      for (int j = 0; j < 2; ++j) {
        float product[4] = {};
        multiply_parts(k, low_band, parts, j, product);
        MSVQ_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int at = 4 * j + i;
          if (k == 2) done[at] = open[kBlur][0][at] + factor * product[i];
          if (k == 1) open[kBlur][0][at] = open[kBlur][1][at] + factor * product[i];
          if (k == 0) open[kBlur][1][at] = factor * product[i];
        }
      }
    }
    const int least = min(scales[kBlur], scale);
    scales[kBlur] = min(last_scale[kBlur], scale), last_scale[kBlur] = scale;
    if (!leaves) return;
    // Along, rows are columns: word 2 h + j of rows of parity h.
    const float along[8] = {done[0], done[1], done[4], done[5], done[2], done[3], done[6], done[7]};
    Parts sums;
    split_all(along, least, sums);
    const int tile = tile_of(kBlur, warp()), turn = turns[kBlur]++ % 2;
    MSVQ_UNROLL
    for (int part = 0; part < 2; ++part) shared.sums[tile][turn][part][lane()] = sums[part];
    if (lane() == 0) shared.factors[tile][turn] = factor_for(least);
    __syncwarp();
    if (lane() == 0) arrive(&shared.ready[tile][turn]);
  }

  // Until the warps on both sides have left the sums that this one left last.
  MSVQ_WARPS void meet(int blur) const {
    const int turn = turns[blur] - 1;
    const int of = lane() < 16 ? max(warp() - 1, 0) : min(warp() + 1, last_warp());
    wait(&shared.ready[tile_of(blur, of)][turn % 2], static_cast<uint32_t>(turn / 2 % 2));
    __syncwarp();
  }

  // The blur of the warp's pixels: [j][2 i + h] is row 4 q + 2 h + j, column 2 g + i.
  MSVQ_WARPS void blur_along(int blur, float (&sum)[2][4]) const {
    const int tile = tile_of(blur, warp() - 1), turn = (turns[blur] - 1) % 2;
    MSVQ_UNROLL
    for (int k = 0; k < kBandBlocks; ++k) {
      const Fragment low_band = shared.low_band[k][lane()];
      const Parts parts = {shared.sums[tile + k][turn][0][lane()],
                           shared.sums[tile + k][turn][1][lane()]};
      const float factor = shared.factors[tile + k][turn];
      MSVQ_UNROLL
      for (int j = 0; j < 2; ++j) {
        float product[4] = {};
        multiply_parts(k, low_band, parts, j, product);
        MSVQ_UNROLL
        for (int i = 0; i < 4; ++i)
          sum[j][i] = k == 0 ? factor * product[i] : sum[j][i] + factor * product[i];
      }
    }
  }

  // Step t's block of x, as it was copied.
  MSVQ_WARPS void blur_x_down(int t) {
    wait_copies<1>();  // contributions may be on their way
    __syncwarp();
    const char* const from = x_tile(t);
    float value[8], most = 0;
    MSVQ_UNROLL
    for (int r = 0; r < 4; ++r) {
      const float2 pair = *reinterpret_cast<const float2*>(from + pair_place(r));
      value[r % 2 * 2 + r / 2] = pair.x, value[4 + r % 2 * 2 + r / 2] = pair.y;
      most = larger_or_nan(most, larger_or_nan(fabsf(pair.x), fabsf(pair.y)));
    }
    blur_down<0>(value, most, t >= 2);
  }

  // The first blur of block t - 1 of rows, from row y on, and the sums down of the second.
  MSVQ_WARPS void blur_again(int t, int y) {
    float sum[2][4];
    blur_along(0, sum);
    check<1>(sum, y);
    if (compares()) {
      MSVQ_UNROLL
      for (int j = 0; j < 2; ++j)
        shared.blurred[warp() - 2][t % 2][j][lane()] =
            make_float4(sum[j][0], sum[j][1], sum[j][2], sum[j][3]);
    }
    const float value[8] = {sum[0][0], sum[0][1], sum[1][0], sum[1][1],
                            sum[0][2], sum[0][3], sum[1][2], sum[1][3]};
    float most = 0;
    MSVQ_UNROLL
    for (int i = 0; i < 8; ++i) most = larger_or_nan(most, fabsf(value[i]));
    blur_down<1>(value, most, t >= kLossBandAhead);
  }

  // Computes outputs that are not finite once more, from x: the zeros of a band are multiplied too,
  // by what is in no window.
  template <int kTimes>
  MSVQ_WARPS void check(float (&sum)[2][4], int y) const {
    float all = 0;
    MSVQ_UNROLL
    for (int i = 0; i < 8; ++i) all = larger_or_nan(all, fabsf(sum[i / 4][i % 4]));
    if (!__any_sync(~0u, !is_finite(all))) return;
    MSVQ_NO_UNROLL
    for (int i = 0; i < 8; ++i) {
      float own = 0;
      MSVQ_UNROLL
      for (int k = 0; k < 8; ++k) own = i == k ? sum[k / 4][k % 4] : own;
      if (!is_finite(own))
        own = blurred<kTimes>(y + lane() % 4 * 4 + i % 2 * 2 + i / 4,
                              column + lane() / 4 * 2 + i / 2 % 2);
      MSVQ_UNROLL
      for (int k = 0; k < 8; ++k) sum[k / 4][k % 4] = i == k ? own : sum[k / 4][k % 4];
    }
  }
  static MSVQ_WARPS bool is_finite(float x) { return fabsf(x) <= 3.4028234663852886e38f; }

  // A pixel of x blurred so many times, which may be outside of the image.
  template <int kTimes>
  MSVQ_WARPS float blurred(int y, int x) const {
    const float* const taps = kTimes == 1 ? p.half : p.twice;
    const int radius = kTimes * p.radius;
    float sum = 0;
    MSVQ_NO_UNROLL
    for (int j = -radius; j <= radius; ++j) {
      const int row = walked_source(p.border, y + j, p.height);
      float along = 0;
      MSVQ_NO_UNROLL
      for (int k = -radius; k <= radius; ++k) {
        const int from = walked_source(p.border, x + k, p.width);
        along += taps[k < 0 ? -k : k] * __ldg(p.x + (origin + index(row, from)));
      }
      sum += taps[j < 0 ? -j : j] * along;
    }
    return sum;
  }

  // Compares the block of rows from row y on, read in step t - 3, and leaves its gradients.
  MSVQ_WARPS void compare(const float (&coarsest)[2][4], int t, int y) {
    const int own = warp() - 2;
    const char* const x = x_tile(t + 1);
    const float4 factors = shared.grad_factors;
    const unsigned to = origin + index(y + lane() % 4 * 4, column + lane() / 4 * 2);
    MSVQ_UNROLL
    for (int j = 0; j < 2; ++j) {
      const float4 once = shared.blurred[own][t % 2][j][lane()];
      MSVQ_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int r = 2 * h + j, place = pair_place(r);
        const float targets[kLossBandScales][2] = {{coarsest[j][h], coarsest[j][2 + h]},
                                                   {h ? once.y : once.x, h ? once.w : once.z},
                                                   {reinterpret_cast<const float*>(x + place)[0],
                                                    reinterpret_cast<const float*>(x + place)[1]}};
        float partial[2] = {}, difference[kLossBandScales][2];
        MSVQ_UNROLL
        for (int m = 0; m < kLossBandScales; ++m) {
          const float2 pair =
              *reinterpret_cast<const float2*>(shared.contributions[own][m] + place);
          partial[0] += pair.x, partial[1] += pair.y;
          MSVQ_UNROLL
          for (int i = 0; i < 2; ++i) {
            difference[m][i] = partial[i] - targets[m][i];
            total[m] += difference[m][i] * difference[m][i];
          }
        }
        float grad[2] = {};
        MSVQ_UNROLL
        for (int m = kLossBandScales - 1; m >= 0; --m) {
          const float factor = m == 2 ? factors.z : m == 1 ? factors.y : factors.x;
          grad[0] += factor * difference[m][0], grad[1] += factor * difference[m][1];
          if (p.grads[m])
            __stcs(
                reinterpret_cast<float2*>(p.grads[m] + (to + static_cast<unsigned>(r * p.width))),
                make_float2(grad[0], grad[1]));
        }
      }
    }
  }

  // The warp's squares of this stream, in a fixed order.
  MSVQ_WARPS void add_totals() const {
    MSVQ_UNROLL
    for (int m = 0; m < kLossBandScales; ++m) {
      double sum = static_cast<double>(total[m]);
      MSVQ_UNROLL
      for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
      if (lane() == 0) shared.totals[warp() - 2][m] += sum;
    }
  }
};

}  // namespace cuda
}  // namespace msvq
