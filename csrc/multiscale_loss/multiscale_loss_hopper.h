// The multi-scale loss of three scales and its gradients on tensor cores (sm_90a), in one pass over
// contiguous float32 images. See gaussian_blur_hopper.h for the products and their scales.
//
// A block streams the rows of a strip of 256 pixels, 16 rows a step. A warp has 32 columns, two
// blocks of 16, whose products share their left sides and whose numbers share a scale. What a
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
#include "multiscale_loss/multiscale_loss_hopper_blur.h"

namespace msvq {
namespace cuda {

// Or the levels alone, blurred once and twice, which are written where they would be compared.
template <bool kLoss>
struct BandLevels : LevelsBlur<kLoss> {
  using Blur = LevelsBlur<kLoss>;
  using Blur::blur_again, Blur::blur_along, Blur::blur_x_down, Blur::fetch_contributions;
  using Blur::fetch_x, Blur::index, Blur::is_first, Blur::kNextTurn, Blur::lane, Blur::last_warp;
  using Blur::meet, Blur::own_sums, Blur::p, Blur::pair, Blur::say_left, Blur::shared;
  using Blur::strip, Blur::turn, Blur::warp, Blur::x_tile;
  using typename Blur::Products, typename Blur::Shared;

  MSVQ_WARPS BandLevels(const LossBandParams& params, Shared& memory) : Blur(params, memory) {}

  MSVQ_WARPS void run() {
    const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
    if (thread <= 2 * p.radius)
      shared.taps[thread] = (1 << kBandTapScale) * tap_at(p.half, p.radius, thread);
    if (thread < 4 * kLossBandWarps) init_barrier(&shared.ready[0][0][0] + thread, 1);
    if (thread < kLossBandPairs) shared.bad[thread] = 0;
    if (thread < kLossBandPairs * kLossBandScales)
      shared.totals[thread / kLossBandScales][thread % kLossBandScales] = 0;
    if (thread == 0) {
      const float upstream = p.upstream ? *p.upstream : 1.0f;
      shared.grad_factors = make_float4(p.factors[0] * upstream, p.factors[1] * upstream,
                                        p.factors[2] * upstream, 0.0f);
    }
    __syncthreads();
    if (warp() <= last_warp()) run_share();
    __syncthreads();
    if (!p.partials || thread >= kLossBandScales) return;
    double sum = 0;
    MSVQ_NO_UNROLL
    for (int i = 0; i < kLossBandPairs; ++i) sum += shared.totals[i][thread];
    p.partials[block * kMaxScales + thread] = sum;
  }

  // The block's share of the strips one after the other, each with what beginning inside it costs.
  MSVQ_WARPS void run_share() {
    MSVQ_NO_UNROLL
    for (int at = share_from(0);;) {
      const int cost = p.steps + kLossBandAround;
      this->begin_strip(at / cost);
      const int begin = strip() * cost + kLossBandAround, from = max(at - begin, 0);
      const int count = min(min(p.steps - from, kLossBandSteps), share_from(1) - begin - from);
      if (count <= 0) return;
      const int end = stream(from, count);
      at = strip() * (p.steps + kLossBandAround) + kLossBandAround + end;
    }
  }
  // Where the share of this thread block, or of the next one, begins.
  MSVQ_WARPS int share_from(int next) const {
    const int block = again(static_cast<int>(blockIdx.x)) + next;
    return block * p.share + min(block, p.rest);
  }

  // `count` blocks of rows of a strip from block `first` on. Returns where it ends.
  MSVQ_WARPS int stream(int first, int count) {
    constexpr int kNext = kLoss ? 1 : 2;  // steps ahead that x is asked for
    const bool compares = this->is_inner() && !this->is_outside();
    float total[kLossBandScales] = {};
    int y = (first - kLossBandAhead / 2) * kBand;  // the first row of step t's block
    MSVQ_UNROLL
    for (int t = 0; t < kNext; ++t) {
      fetch_x(y + t * kBand, x_tile(turn + t * kNextTurn));
      end_copies();
    }
    if (kLoss) {
      if (compares) fetch_contributions(first * kBand);
      end_copies();
    }
    this->begin_sums();  // while they come
    turn = (turn & 3u << 30) | static_cast<unsigned>(count + kLossBandAhead) << 15;
    MSVQ_NO_UNROLL
    for (;; turn += kNextTurn + 1, y += kBand) {
      const unsigned t = turn & 0x7fff, read = turn >> 15 & 0x7fff;
      // What nobody needs, sums that lack rows above a stream or come after it, is left out.
      const bool last = t + 1 >= read;
      if (t < read) {
        wait_copies<1>();  // contributions or the next x may be on their way
        __syncwarp();
        blur_x_down(t >= 2, !last);
      }
      if (!kLoss) {  // no place is read any more
        __syncwarp();
        if (t + kNext < read) fetch_x(y + kNext * kBand, x_tile(turn + kNext * kNextTurn));
        end_copies();
      }
      const bool ends = compares && t > static_cast<unsigned>(kLossBandAhead);
      if (ends) {
        Products coarsest[2];
        const unsigned before = turn - kNextTurn;
        meet(1, before);
        const bool good = blur_along(1, before, coarsest) > Blur::kNoScale;
        if (kLoss) {
          wait_copies<0>();
          __syncwarp();
        }
        if (good)
          kLoss ? compare(coarsest, y - 3 * kBand, total)
                : this->write(p.levels[0], coarsest, y - 3 * kBand);
        else if (is_first())
          shared.bad[warp() - 1] |= uint64_t{1} << (t - kLossBandAhead - 1);
      }
      if (t == read) break;
      if (kLoss) {
        __syncwarp();
        if (t + 1 < read) fetch_x(y + kBand, x_tile(turn + kNextTurn));
        end_copies();
        if (ends) fetch_contributions(y - 2 * kBand);
        end_copies();
      }
      own_sums = again(own_sums);  // what follows from it would take registers that sums need
      meet(0, turn);
      const bool seen = compares && (kLoss || (t > 2 && !last));
      t >= 2 ? blur_again(seen, y - kBand, t >= 4, !last) : say_left(1);
    }
    const int end = y / kBand - kLossBandAhead / 2;
    if (compares) {
      __syncwarp();
      if (shared.bad[warp() - 1])
        this->do_again(end - static_cast<int>(turn >> 15 & 0x7fff) + kLossBandAhead, total);
      if (kLoss) add_totals(total);
    }
    return end;
  }

  // Compares the blocks of rows from row y on, read three turns ago, and leaves their gradients.
  MSVQ_WARPS void compare(const Products (&coarsest)[2], int y,
                          float (&total)[kLossBandScales]) const {
    const float4 factors = shared.grad_factors;
    const int last = static_cast<int>(turn >> 30);
    float* to[kLossBandScales];
    MSVQ_UNROLL
    for (int m = 0; m < kLossBandScales; ++m) to[m] = p.grads[m] + (this->own_pair() + index(y, 0));
    MSVQ_UNROLL
    for (int i = 0; i < 8; ++i) {
      const int r = i / 2, w = i % 2;
      const float2 once = pair(kLossBlurred + last % 2, w, r);
      const float2 x = pair((last + 1) % kLossRing, w, r);
      const float targets[kLossBandScales][2] = {
          {coarsest[w][r % 2][r / 2], coarsest[w][r % 2][2 + r / 2]}, {once.x, once.y}, {x.x, x.y}};
      float partial[2], difference[kLossBandScales][2];
      MSVQ_UNROLL
      for (int m = 0; m < kLossBandScales; ++m) {
        const float2 given = pair(kLossGiven + m, w, r);
        partial[0] = m == 0 ? given.x : partial[0] + given.x;
        partial[1] = m == 0 ? given.y : partial[1] + given.y;
        MSVQ_UNROLL
        for (int k = 0; k < 2; ++k) {
          difference[m][k] = partial[k] - targets[m][k];
          total[m] += difference[m][k] * difference[m][k];
        }
      }
      float grad[2] = {};
      MSVQ_UNROLL
      for (int m = kLossBandScales - 1; m >= 0; --m) {
        const float factor = m == 2 ? factors.z : m == 1 ? factors.y : factors.x;
        grad[0] += factor * difference[m][0], grad[1] += factor * difference[m][1];
        if (p.wanted >> m & 1)
          __stcs(reinterpret_cast<float2*>(to[m] + static_cast<unsigned>(r * p.width) + w * kBand),
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
      if (lane() == 0) shared.totals[warp() - 1][m] += sum;
    }
  }
};

}  // namespace cuda
}  // namespace msvq
