// What the multi-scale loss's kernel for Hopper keeps in shared memory, and what it asks for ahead.
// See multiscale_loss_hopper.h.
#pragma once
#include "gaussian_blur/gaussian_blur_hopper.h"
#include "multiscale_loss/multiscale_loss_hopper_params.h"

namespace msvq {
namespace cuda {

constexpr int kLossTile = kBand * kBand * 4;  // bytes of 16 x 16 elements
// Tiles that a warp keeps to itself: x until it is compared, x blurred once of two steps, and
// contributions, from the time that they are asked for.
constexpr int kLossRing = 4, kLossBlurred = kLossRing, kLossGiven = kLossBlurred + 2;
constexpr int kLossTiles = kLossGiven + kLossBandScales;
constexpr int kOuterTile = kLossTiles * kLossBandBlocks;  // the first of warps that compare nothing
// Tiles of sums: of x from all warps, of x blurred once from all but the first and the last.
constexpr int kLossSums = 2 * kLossBandWarps - 2;

struct alignas(128) LossBandShared {
  char tiles[kOuterTile + 4][kLossTile];
  Fragment sums[kLossSums][2][2][32];  // of two turns, both parts: right sides of products along
  Fragment low_band[kBandBlocks][32];  // the second parts of the band
  uint64_t ready[kLossSums][2];        // barriers: the sums of a turn are there
  float factors[kLossSums][2];         // what sums are multiplied by
  float4 grad_factors;
  int strips[kLossBandWarps];     // that the warps are in
  uint64_t bad[kLossBandBlocks];  // of these: bits of a stream's steps that they compare again
  double totals[kLossBandBlocks][kLossBandScales];  // squares, of the warps that compare
};
static_assert(sizeof(LossBandShared) <= 227 << 10, "more than a multiprocessor has");

// What a warp does: the outer ones only sum x down, the next also blur it and sum that down.
enum class LossRole { sums, blurs, compares };

// Thread 4 g + q of a warp has columns 2 g and 2 g + 1 of 16 and rows 4 q to 4 q + 3.
struct LossTiles {
  static constexpr int kOutside = 1;

  const LossBandParams& p;
  LossBandShared& shared;
  // The first element that this thread copies of the block of rows from 0 on: of a warp outside of
  // the image of a column in turn, else of four columns.
  unsigned own_copy;
  // In bytes from shared.tiles: what it copies to, and what it reads.
  unsigned to_copy, to_read;

  MSVQ_WARPS LossTiles(const LossBandParams& params, LossBandShared& memory)
      : p(params), shared(memory) {}

  static MSVQ_WARPS int lane() { return thread_again() & 31; }
  static MSVQ_WARPS int warp() { return thread_again() >> 5; }
  MSVQ_WARPS int last_warp() const { return p.strip_blocks + 3; }

  MSVQ_WARPS int strip() const { return shared.strips[warp()]; }
  // The warp's first column; the plane's first element.
  MSVQ_WARPS int column() const {
    return (strip() % p.count_x * p.strip_blocks + warp() - 2) * kBand;
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
    own_copy = origin() + (outside ? static_cast<unsigned>(source_column(column() + l % kBand))
                                   : index(l / 4, column() + l % 4 * 4));
    const bool inner = own > 1 && own < last_warp() - 1;
    const int tile =
        inner ? kLossTiles * (own - 2) : kOuterTile + (own < 2 ? own : own - p.strip_blocks);
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
  // This thread's pair of row r of four in tile i of the warp's.
  MSVQ_WARPS float2& pair(int i, int r) const {
    const unsigned at = r % 2 ? to_read ^ 64 : to_read;
    return *reinterpret_cast<float2*>(shared.tiles[0] + at + r / 2 * 128 + i * kLossTile);
  }
  // The 16 bytes that it copies of the upper or lower eight rows of a tile.
  MSVQ_WARPS char* quad(int i, int lower) const {
    return shared.tiles[0] + (lower ? to_copy ^ 64 : to_copy) + lower * 512 + i * kLossTile;
  }

  MSVQ_WARPS unsigned index(int y, int x) const { return static_cast<unsigned>(y * p.width + x); }

  // Asks for 16 rows of x from row y on, tile i. The columns of a warp that compares are inside.
  MSVQ_WARPS void fetch_x(int y, int i, bool compares) const {
    if (compares || to_copy % kLossTile != kOutside) {
      unsigned from = own_copy + index(y, 0), next = from + static_cast<unsigned>(8 * p.width);
      if (y < 0 || y >= p.height) {
        const int row = lane() / 4;
        from = own_copy + index(source_row(y + row) - row, 0);
        next = own_copy + index(source_row(y + row + 8) - row, 0);
      }
      copy_ahead<16>(quad(i, 0), p.x + from);
      copy_ahead<16>(quad(i, 1), p.x + next);
    } else {
      const int at = lane() % kBand;
      MSVQ_NO_UNROLL
      for (int row = lane() / kBand; row < kBand; row += 2)
        copy_ahead<4>(shared.tiles[0] + (to_copy - kOutside) + i * kLossTile +
                          quad_place(row, at / 4) + at % 4 * 4,
                      p.x + (own_copy + index(source_row(y + row), 0)));
    }
  }

  MSVQ_WARPS void fetch_contributions(int y) const {
    const unsigned from = own_copy + index(y, 0);
    MSVQ_UNROLL
    for (int m = 0; m < kLossBandScales; ++m) {
      copy_ahead<16>(quad(kLossGiven + m, 0), p.contributions[m] + from);
      copy_ahead<16>(quad(kLossGiven + m, 1),
                     p.contributions[m] + (from + static_cast<unsigned>(8 * p.width)));
    }
  }

  // Writes a level's block of rows from row y on.
  MSVQ_WARPS void write(float* level, const float (&sum)[2][4], int y) const {
    float* const to = level + (own_pair() + index(y, 0));
    MSVQ_UNROLL
    for (int r = 0; r < 4; ++r)
      *reinterpret_cast<float2*>(to + static_cast<unsigned>(r * p.width)) =
          make_float2(sum[r % 2][r / 2], sum[r % 2][2 + r / 2]);
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
  template <bool kLoss>
  MSVQ_WARPS void do_again(int first, float (&total)[kLossBandScales]) const {
    const float4 factors = shared.grad_factors;
    MSVQ_NO_UNROLL
    for (int i = 0; i < 8 * kLossBandSteps; ++i) {
      if (!(shared.bad[warp() - 2] >> i / 8 & 1)) continue;
      const int y = (first + i / 8) * kBand + lane() % 4 * 4 + i / 2 % 4;
      const int x = column() + lane() / 4 * 2 + i % 2;
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
    if (lane() == 0) shared.bad[warp() - 2] = 0;
  }
};

}  // namespace cuda
}  // namespace msvq
