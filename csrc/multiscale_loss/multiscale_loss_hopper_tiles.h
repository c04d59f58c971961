// What the multi-scale loss's kernel for Hopper keeps in shared memory, and what it asks for ahead.
// See multiscale_loss_hopper.h.
#pragma once
#include "gaussian_blur/gaussian_blur_hopper.h"
#include "multiscale_loss/multiscale_loss_hopper_params.h"

namespace msvq {
namespace cuda {

constexpr int kLossTile = kBand * kBand * 4;  // bytes of 16 x 16 elements
// Tiles of every block of pixels, of one kind after the other: of a loss x until it is compared, x
// blurred once of two steps, and contributions, from the time that they are asked for; of a pyramid
// x of two steps.
constexpr int kLossRing = 4, kLossBlurred = kLossRing, kLossGiven = kLossBlurred + 2;
constexpr int kLossKinds = kLossGiven + kLossBandScales, kPyramidKinds = 2;

template <bool kLoss>
struct alignas(128) LossBandShared {
  static constexpr int kBlocks = 2 * kLossBandWarps;
  // From a kind to the next. A loss's outer blocks come first, a tile each.
  static constexpr int kKind = kLoss ? 2 * kLossBandPairs : kBlocks;
  static constexpr int kTiles = kLoss ? 4 + kLossKinds * kKind : kPyramidKinds * kKind;
  // Tiles of sums: of x from all blocks, of x blurred once from all but the first and the last.
  static constexpr int kSums = 2 * kBlocks - 2;

  char tiles[kTiles][kLossTile];
  Fragment sums[kSums][2][2][32];  // of two turns, both parts: right sides of products along
  float taps[2 * kBandHalo + 1];
  uint64_t ready[2][kLossBandWarps][2];  // barriers: the sums of a turn are there
  float factors[2][kLossBandWarps][2];   // what sums are multiplied by
  float4 grad_factors;
  int strips[kLossBandWarps];    // that the warps are in
  uint64_t bad[kLossBandPairs];  // of a pair: bits of a stream's steps to be compared again
  double totals[kLossBandPairs][kLossBandScales];  // squares
};
static_assert(sizeof(LossBandShared<true>) <= 227 << 10 &&
                  sizeof(LossBandShared<false>) <= 227 << 10,
              "more than a multiprocessor has");

// Thread 4 g + q of a warp has columns 2 g and 2 g + 1 of 16 and rows 4 q to 4 q + 3.
template <bool kLoss>
struct LossTiles {
  using Shared = LossBandShared<kLoss>;
  static constexpr int kOutside = 1;

  const LossBandParams& p;
  Shared& shared;
  // The first element that this thread copies of the block of rows from 0 on: of a warp outside of
  // the image of a column in turn, else of four columns of its first block.
  unsigned own_copy;
  // In bytes from shared.tiles: what it copies to, and what it reads.
  unsigned to_copy, to_read;

  MSVQ_WARPS LossTiles(const LossBandParams& params, Shared& memory) : p(params), shared(memory) {}

  static MSVQ_WARPS int lane() { return thread_again() & 31; }
  static MSVQ_WARPS int warp() { return thread_again() >> 5; }
  MSVQ_WARPS int last_warp() const { return p.strip_pairs + 1; }
  // Not of the pairs beside the strip.
  MSVQ_WARPS bool is_inner() const { return warp() > 0 && warp() < last_warp(); }

  MSVQ_WARPS int strip() const { return shared.strips[warp()]; }
  // The warp's first column; the plane's first element.
  MSVQ_WARPS int column() const {
    return (strip() % p.count_x * p.strip_pairs + warp() - 1) * 2 * kBand;
  }
  MSVQ_WARPS unsigned origin() const {
    return static_cast<unsigned>(strip() / p.count_x * p.height * p.width);
  }
  // The first that it compares.
  MSVQ_WARPS unsigned own_pair() const {
    const int g = lane() / 4, q = lane() % 4;
    return own_copy + index(4 * q - g, 2 * g - 4 * q);
  }
  MSVQ_WARPS int source_row(int y) const { return walked_source(p.border, y, again(p.height)); }
  MSVQ_WARPS int source_column(int x) const { return walked_source(p.border, x, again(p.width)); }

  MSVQ_WARPS void begin_strip(int at) {
    __syncwarp();
    if (lane() == 0) shared.strips[warp()] = at;
    __syncwarp();
    const int l = lane(), own = warp();
    const bool outside = column() < 0 || column() >= p.width;
    own_copy = origin() + (outside ? static_cast<unsigned>(source_column(column() + l))
                                   : index(l / 4, column() + l % 4 * 4));
    const int tile = !kLoss ? 2 * own : own == 0 ? 0 : own == last_warp() ? 2 : 2 + 2 * own;
    to_copy =
        static_cast<unsigned>(tile * kLossTile + (outside ? kOutside : quad_place(l / 4, l % 4)));
    to_read = static_cast<unsigned>(tile * kLossTile + l % 4 * 256 + (l / 8 ^ l % 4 * 2) * 16 +
                                    l / 4 % 2 * 8);
  }

  // The 16 bytes of a row in a tile that hold its columns from 4 i on: two rows a line of the
  // banks, in an order in which neither copies nor reads of pairs meet in a bank.
  static MSVQ_WARPS int quad_place(int row, int i) {
    return row / 2 * 128 + ((row % 2 * 4 + i) ^ row / 4 * 2) * 16;
  }
  // This thread's pair of row r of four in tile i of block w.
  MSVQ_WARPS float2& pair(int i, int w, int r) const {
    const unsigned at = r % 2 ? to_read ^ 64 : to_read;
    const int tile = i * Shared::kKind + w;
    return *reinterpret_cast<float2*>(shared.tiles[0] + at + r / 2 * 128 + tile * kLossTile);
  }
  // The 16 bytes that it copies of the upper or lower eight rows of that tile.
  MSVQ_WARPS char* quad(int i, int w, int lower) const {
    const int tile = i * Shared::kKind + w;
    return shared.tiles[0] + (lower ? to_copy ^ 64 : to_copy) + lower * 512 + tile * kLossTile;
  }

  MSVQ_WARPS unsigned index(int y, int x) const { return static_cast<unsigned>(y * p.width + x); }

  MSVQ_WARPS bool is_outside() const { return to_copy % kLossTile == kOutside; }

  // Asks for 16 rows of x from row y on, tile i of every block.
  MSVQ_WARPS void fetch_x(int y, int i) const {
    if (!is_outside()) {
      unsigned from = own_copy + index(y, 0), next = from + static_cast<unsigned>(8 * p.width);
      if (y < 0 || y >= p.height) {
        const int row = lane() / 4;
        from = own_copy + index(source_row(y + row) - row, 0);
        next = own_copy + index(source_row(y + row + 8) - row, 0);
      }
      MSVQ_UNROLL
      for (int w = 0; w < 2; ++w) {
        copy_ahead<16>(quad(i, w, 0), p.x + (from + w * kBand));
        copy_ahead<16>(quad(i, w, 1), p.x + (next + w * kBand));
      }
    } else {
      const int at = lane() % kBand, tile = i * Shared::kKind + lane() / kBand;
      char* const to = shared.tiles[0] + (to_copy - kOutside) + tile * kLossTile + at % 4 * 4;
      const float* from = p.x + (own_copy + index(y, 0));
      if (y >= 0 && y + kBand <= p.height) {
        MSVQ_UNROLL
        for (int row = 0; row < kBand; ++row, from += p.width)
          copy_ahead<4>(to + quad_place(row, at / 4), from);
      } else {
        MSVQ_NO_UNROLL
        for (int row = 0; row < kBand; ++row)
          copy_ahead<4>(to + quad_place(row, at / 4),
                        p.x + (own_copy + index(source_row(y + row), 0)));
      }
    }
  }

  MSVQ_WARPS void fetch_contributions(int y) const {
    const unsigned from = own_copy + index(y, 0);
    MSVQ_UNROLL
    for (int i = 0; i < 2 * kLossBandScales; ++i) {
      const int m = i / 2, w = i % 2;
      const float* const of = p.contributions[m] + (from + w * kBand);
      copy_ahead<16>(quad(kLossGiven + m, w, 0), of);
      copy_ahead<16>(quad(kLossGiven + m, w, 1), of + static_cast<unsigned>(8 * p.width));
    }
  }

  // Writes a level's blocks of rows from row y on.
  MSVQ_WARPS void write(float* level, const float (&sum)[2][2][4], int y) const {
    float* const to = level + (own_pair() + index(y, 0));
    MSVQ_UNROLL
    for (int i = 0; i < 8; ++i) {
      const int r = i / 2, w = i % 2;
      *reinterpret_cast<float2*>(to + static_cast<unsigned>(r * p.width) + w * kBand) =
          make_float2(sum[w][r % 2][r / 2], sum[w][r % 2][2 + r / 2]);
    }
  }

  // A pixel of x, which may be outside of the image, blurred so many times: tap by tap.
  MSVQ_WARPS float blurred(int times, int y, int x) const {
    const float* const taps = times == 1 ? p.half : p.twice;
    const int radius = times * p.radius;
    float sum = 0;
    MSVQ_NO_UNROLL
    for (int j = -radius; j <= radius; ++j) {
      const unsigned row = origin() + index(source_row(y + j), 0);
      float along = 0;
      MSVQ_NO_UNROLL
      for (int k = -radius; k <= radius; ++k)
        along +=
            taps[k < 0 ? -k : k] * __ldg(p.x + (row + static_cast<unsigned>(source_column(x + k))));
      sum += taps[j < 0 ? -j : j] * along;
    }
    return sum;
  }

  // Compares the blocks of rows that could not be, tap by tap, and leaves their gradients; or
  // writes their levels.
  MSVQ_WARPS void do_again(int first, float (&total)[kLossBandScales]) const {
    const float4 factors = shared.grad_factors;
    MSVQ_NO_UNROLL
    for (int i = 0; i < 16 * kLossBandSteps; ++i) {
      if (!(shared.bad[warp() - 1] >> i / 16 & 1)) continue;
      const int y = (first + i / 16) * kBand + lane() % 4 * 4 + i / 2 % 4;
      const int x = column() + i / 8 % 2 * kBand + lane() / 4 * 2 + i % 2;
      const unsigned at = origin() + index(y, x);
      if (!kLoss) {
        p.levels[0][at] = blurred(2, y, x), p.levels[1][at] = blurred(1, y, x);
        continue;
      }
      const float first_sum = __ldg(p.contributions[0] + at);
      const float second_sum = first_sum + __ldg(p.contributions[1] + at);
      const float difference[kLossBandScales] = {
          first_sum - blurred(2, y, x), second_sum - blurred(1, y, x),
          second_sum + __ldg(p.contributions[2] + at) - __ldg(p.x + at)};
      float grad = 0;
      MSVQ_UNROLL
      for (int m = kLossBandScales - 1; m >= 0; --m) {
        total[m] += difference[m] * difference[m];
        grad += (m == 2 ? factors.z : m == 1 ? factors.y : factors.x) * difference[m];
        if (p.wanted >> m & 1) p.grads[m][at] = grad;
      }
    }
    __syncwarp();
    if (lane() == 0) shared.bad[warp() - 1] = 0;
  }
};

}  // namespace cuda
}  // namespace msvq
