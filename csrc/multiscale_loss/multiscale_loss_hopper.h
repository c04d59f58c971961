// The multi-scale loss of three scales and its gradients on tensor cores (sm_90a), in one pass over
// contiguous float32 images. See gaussian_blur_hopper.h for the products and their scales.
//
// A block streams the rows of a strip of 256 pixels, 16 rows a step. A warp has 16 columns. What a
// thread has of 16 x 16 sums down is, as it lies, the right side of the products along, and what it
// has of those is the right side of the next blur's products down. For that a product's rows and
// columns are in an order of their own: place i of 16 is 2 i, from 8 on 2 (i - 8) + 1. So warps
// have only sums down for each other, and a warp waits for the two beside it alone.
//
// Step t of a stream reads block t of 16 rows, which completes the sums down of block t - 1; their
// blur completes the sums down of block t - 2 of the second blur. A step later these are blurred
// and compared: between leaving sums and reading those of others there is half a step of other
// work. A warp that has left its sums of x of a turn has read all that it needs of the turn before
// the last, so two turns' sums are kept.
#pragma once
#include "multiscale_loss/multiscale_loss_hopper_tiles.h"

namespace msvq {
namespace cuda {

// Or the levels alone, blurred once and twice, which are written where they would be compared.
template <bool kLoss>
struct BandLevels : LossTiles {
  // The right side of the products of 16 x 16 numbers: [part], words 2 j + h of columns of parity
  // j, rows of parity h; for the products along, of rows of parity j and columns of parity h.
  using Parts = Fragment[2];
  static constexpr unsigned kNextTurn = 1u << 30;
  static constexpr unsigned kSumsTile = sizeof(LossBandShared::sums[0]);

  Fragment band[kBandBlocks];  // the left side of all products, its first parts
  float open[2][2][8];         // sums down of either blur that lack one block of rows, and two
  // Bytes: the scale of either blur's last block of rows, the least of the last two.
  unsigned scales;
  // From bit 30 on the turn; below, from bit 15 on, the steps of this stream that read x, and the
  // step that runs.
  unsigned turn;
  unsigned own_sums;  // in bytes, of this thread's sums of x

  MSVQ_WARPS BandLevels(const LossBandParams& params, LossBandShared& memory)
      : LossTiles(params, memory) {}

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
        const int row = 2 * g + i % 2, from = kBand * k + i / 2 + 4 * q;
        const int at = from - row - (kBandHalo - p.radius);
        uint32_t parts[2];
        split(tap(at), tap(at + 2), parts);
        band[k].words[i] = parts[0];
        shared.low_band[k][thread % 32].words[i] = parts[1];  // the same from every warp
      }
    }
    if (thread < 2 * kLossSums) init_barrier(&shared.ready[thread / 2][thread % 2], 1);
    if (thread < kLossBandBlocks) shared.bad[thread] = 0;
    if (thread < kLossBandBlocks * kLossBandScales)
      shared.totals[thread / kLossBandScales][thread % kLossBandScales] = 0;
    if (thread == 0) {
      const float upstream = p.upstream ? *p.upstream : 1.0f;
      shared.grad_factors = make_float4(p.factors[0] * upstream, p.factors[1] * upstream,
                                        p.factors[2] * upstream, 0.0f);
    }
    __syncthreads();
    turn = 0;
    own_sums = threadIdx.x / 32 * kSumsTile + threadIdx.x % 32 * 16;
    if (warp() <= last_warp()) run_share();
    __syncthreads();
    if (!p.partials || thread >= kLossBandScales) return;
    double sum = 0;
    MSVQ_NO_UNROLL
    for (int i = 0; i < kLossBandBlocks; ++i) sum += shared.totals[i][thread];
    p.partials[block * kMaxScales + thread] = sum;
  }

  // The block's share of the strips one after the other, each with what beginning inside it costs.
  MSVQ_WARPS void run_share() {
    MSVQ_NO_UNROLL
    for (int at = share_from(0);;) {
      const int cost = p.steps + kLossBandAround;
      begin_strip(at / cost);
      const int begin = strip() * cost + kLossBandAround, from = max(at - begin, 0);
      const int count = min(min(p.steps - from, kLossBandSteps), share_from(1) - begin - from);
      if (count <= 0) return;
      int end;
      if (warp() == 0 || warp() == last_warp())
        end = stream<LossRole::sums>(from, count);
      else if (warp() == 1 || warp() == last_warp() - 1 || column() >= p.width)
        end = stream<LossRole::blurs>(from, count);
      else
        end = stream<LossRole::compares>(from, count);
      at = strip() * (p.steps + kLossBandAround) + kLossBandAround + end;
    }
  }
  // Where the share of this thread block, or of the next one, begins.
  MSVQ_WARPS int share_from(int next) const {
    const int block = again(static_cast<int>(blockIdx.x)) + next;
    return block * p.share + min(block, p.rest);
  }

  // Where a turn's block of x is kept: a warp that compares nothing needs it once.
  template <LossRole kRole>
  static MSVQ_WARPS int x_tile(unsigned of_turn) {
    return kRole == LossRole::compares ? static_cast<int>(of_turn >> 30) : again(0);
  }

  // `count` blocks of rows of a strip from block `first` on. Returns where it ends.
  template <LossRole kRole>
  MSVQ_WARPS int stream(int first, int count) {
    constexpr bool kCompares = kRole == LossRole::compares;
    float total[kLossBandScales] = {};
    MSVQ_UNROLL
    for (int i = 0; i < 32; ++i) open[i / 16][i / 8 % 2][i % 8] = 0;
    scales = 127 * 0x01010101u;
    int y = (first - kLossBandAhead / 2) * kBand;  // the first row of step t's block
    fetch_x(y, x_tile<kRole>(turn), kCompares);
    end_copies();
    if (kLoss && kCompares) fetch_contributions(first * kBand), end_copies();
    turn = (turn & 3u << 30) | static_cast<unsigned>(count + kLossBandAhead) << 15;
    MSVQ_NO_UNROLL
    for (;; turn += kNextTurn + 1, y += kBand) {
      const unsigned t = turn & 0x7fff, read = turn >> 15 & 0x7fff;
      if (t < read) {
        wait_copies<kLoss && kCompares ? 1 : 0>();  // contributions may be on their way
        __syncwarp();
        blur_x_down(x_tile<kRole>(turn));
      }
      if (!kLoss && t + 1 < read) {  // no place is read any more
        __syncwarp();
        fetch_x(y + kBand, x_tile<kRole>(turn + kNextTurn), kCompares);
        end_copies();
      }
      const bool ends = kCompares && t > static_cast<unsigned>(kLossBandAhead);
      if (ends) {
        float coarsest[2][4];
        const unsigned before = turn - kNextTurn;
        meet<kRole>(1, before);
        const bool good = blur_along(1, before, coarsest);
        if (kLoss) {
          wait_copies<0>();
          __syncwarp();
        }
        if (good)
          kLoss ? compare(coarsest, y - 3 * kBand, total)
                : write(p.levels[0], coarsest, y - 3 * kBand);
        else if (is_first())
          shared.bad[warp() - 2] |= uint64_t{1} << (t - kLossBandAhead - 1);
      }
      if (t == read) break;
      if (kLoss) {
        __syncwarp();
        if (t + 1 < read) fetch_x(y + kBand, x_tile<kRole>(turn + kNextTurn), kCompares);
        end_copies();
        if (kCompares) {
          if (ends) fetch_contributions(y - 2 * kBand);
          end_copies();
        }
      }
      meet<kRole>(0, turn);
      // What follows from it would take registers that the sums need.
      if (!kLoss || kRole == LossRole::blurs) own_sums = again(own_sums);
      if (kRole != LossRole::sums) {
        const bool seen = kCompares && (kLoss || (t > 2 && t + 1 < read));
        t >= 2 ? blur_again<kRole>(seen, y - kBand) : say_left(1);
      }
    }
    const int end = y / kBand - kLossBandAhead / 2;
    if (kCompares) {
      __syncwarp();
      if (shared.bad[warp() - 2])
        do_again<kLoss>(end - static_cast<int>(turn >> 15 & 0x7fff) + kLossBandAhead, total);
      if (kLoss) add_totals(total);
    }
    return end;
  }

  // The scale of 16 x 16 numbers, at most 12 if they are not all finite; nothing is then that
  // follows from them.
  static MSVQ_WARPS int scale_for(float most) {
    const int bits = static_cast<int>(__reduce_max_sync(~0u, __float_as_uint(most)) >> 23);
    return min(127 + 13 + 127 - bits, 127 + 126 - kBandTapScale);
  }
  // 1 over that scale and the taps'.
  static MSVQ_WARPS float factor_for(int scale) {
    const int bits = 127 + 127 - kBandTapScale - scale;
    return __uint_as_float(scale > 12 ? static_cast<unsigned>(bits) << 23 : ~0u);
  }

  // Of value[2 j + h], pairs [2 i] and [2 i + 1].
  static MSVQ_WARPS void split_all(const float (&value)[8], int scale, Parts& parts) {
    const float factor = power_of_two(scale);
    MSVQ_UNROLL
    for (int i = 0; i < 4; ++i) {
      uint32_t both[2];
      split(factor * value[2 * i], factor * value[2 * i + 1], both);
      parts[0].words[i] = both[0], parts[1].words[i] = both[1];
    }
  }

  // products = block k of the band times the right sides j = 0 and 1 of which these are the parts.
  MSVQ_WARPS void multiply_parts(int k, const Parts& parts, float (&products)[2][4]) const {
    const Fragment low_band = *reinterpret_cast<const Fragment*>(
        reinterpret_cast<const char*>(shared.low_band[k]) + own_sums % 512);
    MSVQ_UNROLL
    for (int part = 0; part < 3; ++part) {
      MSVQ_UNROLL
      for (int j = 0; j < 2; ++j) {
        const Fragment& right = parts[part == 1];
        multiply(products[j], part == 0 ? low_band.words : band[k].words, right.words[2 * j],
                 right.words[2 * j + 1]);
      }
    }
  }

  MSVQ_WARPS char* sums_of(int blur, unsigned of_turn) const {
    return reinterpret_cast<char*>(shared.sums) + own_sums + (of_turn >> 20 & 1024) +
           static_cast<unsigned>(blur * (kLossBandWarps - 1)) * kSumsTile;
  }

  // Adds a block of rows to the sums down of a blur and leaves those that it completes.
  template <int kBlur>
  MSVQ_WARPS void blur_down(const float (&value)[8]) {
    float most = fabsf(value[0]);
    MSVQ_UNROLL
    for (int i = 1; i < 8; ++i) most = larger_or_nan(most, fabsf(value[i]));
    const int scale = scale_for(most);
    Parts parts;
    split_all(value, scale, parts);
    const float factor = factor_for(scale);
    leave<kBlur>(parts, factor, min(static_cast<int>(scales >> (16 * kBlur + 8) & 255), scale));
    const int least = min(static_cast<int>(scales >> 16 * kBlur & 255), scale);
    scales = (scales & 0xffffu << 16 * (1 - kBlur)) | static_cast<unsigned>(scale | least << 8)
                                                          << 16 * kBlur;
    MSVQ_UNROLL
    for (int k = 1; k >= 0; --k) {
      float products[2][4] = {};
      multiply_parts(k, parts, products);
      MSVQ_UNROLL
      for (int i = 0; i < 8; ++i) {
        const float product = products[i / 4][i % 4];
        if (k == 1) open[kBlur][0][i] = open[kBlur][1][i] + factor * product;
        if (k == 0) open[kBlur][1][i] = factor * product;
      }
    }
  }

  // Leaves the sums that a block of rows completes; `scale` is for them.
  template <int kBlur>
  MSVQ_WARPS void leave(const Parts& parts, float factor, int scale) const {
    float products[2][4] = {};
    multiply_parts(2, parts, products);
    float along[8];  // rows are columns: pair 2 j + h of rows of parity j
    MSVQ_UNROLL
    for (int i = 0; i < 8; ++i)
      along[i / 2 % 2 * 4 + i / 4 * 2 + i % 2] =
          open[kBlur][0][i] + factor * products[i / 4][i % 4];
    Parts sums;
    split_all(along, scale, sums);
    Fragment* const to = reinterpret_cast<Fragment*>(sums_of(kBlur, turn));
    to[0] = sums[0], to[32] = sums[1];
    if (is_first()) shared.factors[own_tile(kBlur)][turn >> 30 & 1] = factor_for(scale);
    say_left(kBlur);
  }
  // The lane that speaks for the warp.
  MSVQ_WARPS bool is_first() const { return own_sums % 512 == 0; }
  MSVQ_WARPS unsigned own_tile(int blur) const {
    return own_sums / kSumsTile + static_cast<unsigned>(blur * (kLossBandWarps - 1));
  }
  MSVQ_WARPS void say_left(int blur) const {
    __syncwarp();
    if (is_first()) arrive(&shared.ready[own_tile(blur)][turn >> 30 & 1]);
  }

  // Until the warps on both sides have left what this one has left: lanes below 16 wait for the
  // left one, the others for the right one.
  template <LossRole kRole>
  MSVQ_WARPS void meet(int blur, unsigned of_turn) const {
    unsigned beside = own_tile(blur) + (own_sums >> 7 & 2) - 1;
    if (kRole == LossRole::sums)
      beside = static_cast<unsigned>(min(max(static_cast<int>(beside), 0), last_warp()));
    wait(&shared.ready[beside][of_turn >> 30 & 1], of_turn >> 31);
    __syncwarp();
  }

  // The blur of the warp's pixels: [j][2 i + h] is row 4 q + 2 h + j, column 2 g + i. False if it
  // is of what is not finite, which the zeros of a band then carry too far.
  MSVQ_WARPS bool blur_along(int blur, unsigned of_turn, float (&sum)[2][4]) const {
    const Fragment* const from = reinterpret_cast<const Fragment*>(sums_of(blur, of_turn));
    const float* const factors = shared.factors[own_tile(blur)] + (of_turn >> 30 & 1);
    float all = 0;
    MSVQ_UNROLL
    for (int k = 0; k < kBandBlocks; ++k) {
      const Parts parts = {from[128 * (k - 1)], from[128 * (k - 1) + 32]};
      const float factor = factors[2 * (k - 1)];
      all += factor;
      float products[2][4] = {};
      multiply_parts(k, parts, products);
      MSVQ_UNROLL
      for (int i = 0; i < 8; ++i) {
        float& own = sum[i / 4][i % 4];
        own = k == 0 ? factor * products[i / 4][i % 4] : own + factor * products[i / 4][i % 4];
      }
    }
    return all == all;
  }

  // A block of x, as it was copied.
  MSVQ_WARPS void blur_x_down(int tile) {
    float value[8];
    MSVQ_UNROLL
    for (int r = 0; r < 4; ++r) {
      const float2 two = pair(tile, r);
      value[r % 2 * 2 + r / 2] = two.x, value[4 + r % 2 * 2 + r / 2] = two.y;
    }
    blur_down<0>(value);
  }

  // The first blur of the block of rows from row y on, kept if it is `seen`, and the sums down of
  // the second.
  template <LossRole kRole>
  MSVQ_WARPS void blur_again(bool seen, int y) {
    float sum[2][4];
    blur_along(0, turn, sum);
    if (!kLoss && seen) write(p.levels[1], sum, y);
    if (kLoss && seen) {
      MSVQ_UNROLL
      for (int r = 0; r < 4; ++r)
        pair(kLossBlurred + static_cast<int>(turn >> 30 & 1), r) =
            make_float2(sum[r % 2][r / 2], sum[r % 2][2 + r / 2]);
    }
    // What follows shall take no registers before.
    if (!kLoss || kRole != LossRole::compares) __syncwarp();
    const float value[8] = {sum[0][0], sum[0][1], sum[1][0], sum[1][1],
                            sum[0][2], sum[0][3], sum[1][2], sum[1][3]};
    blur_down<1>(value);
  }

  // Compares the block of rows from row y on, read three turns ago, and leaves its gradients.
  MSVQ_WARPS void compare(const float (&coarsest)[2][4], int y,
                          float (&total)[kLossBandScales]) const {
    const float4 factors = shared.grad_factors;
    const int last = static_cast<int>(turn >> 30);
    float* to[kLossBandScales];
    MSVQ_UNROLL
    for (int m = 0; m < kLossBandScales; ++m) to[m] = p.grads[m] + (own_pair() + index(y, 0));
    MSVQ_UNROLL
    for (int r = 0; r < 4; ++r) {
      const float2 once = pair(kLossBlurred + last % 2, r), x = pair((last + 1) % kLossRing, r);
      const float targets[kLossBandScales][2] = {
          {coarsest[r % 2][r / 2], coarsest[r % 2][2 + r / 2]}, {once.x, once.y}, {x.x, x.y}};
      float partial[2], difference[kLossBandScales][2];
      MSVQ_UNROLL
      for (int m = 0; m < kLossBandScales; ++m) {
        const float2 given = pair(kLossGiven + m, r);
        partial[0] = m == 0 ? given.x : partial[0] + given.x;
        partial[1] = m == 0 ? given.y : partial[1] + given.y;
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
        if (p.wanted >> m & 1)
          __stcs(reinterpret_cast<float2*>(to[m] + static_cast<unsigned>(r * p.width)),
                 make_float2(grad[0], grad[1]));
      }
    }
  }

  // The warp's squares of a stream, in a fixed order.
  MSVQ_WARPS void add_totals(const float (&total)[kLossBandScales]) const {
    MSVQ_UNROLL
    for (int m = 0; m < kLossBandScales; ++m) {
      double sum = static_cast<double>(total[m]);
      MSVQ_NO_UNROLL
      for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
      if (lane() == 0) shared.totals[warp() - 2][m] += sum;
    }
  }
};

}  // namespace cuda
}  // namespace msvq
