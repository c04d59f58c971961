// The blurs of the multi-scale loss's kernel for Hopper, down and along, by products on the tensor
// cores. See multiscale_loss_hopper.h.
#pragma once
#include "multiscale_loss/multiscale_loss_hopper_tiles.h"

namespace msvq {
namespace cuda {

template <bool kLoss>
struct LevelsBlur : LossTiles<kLoss> {
  using Tiles = LossTiles<kLoss>;
  using Tiles::is_inner, Tiles::last_warp, Tiles::p, Tiles::pair, Tiles::shared;
  using typename Tiles::Shared;

  // The right side of the products of 16 x 16 numbers: [part], words 2 j + h of columns of parity
  // j, rows of parity h; for the products along, of rows of parity j and columns of parity h.
  struct Parts {
    Fragment of[2];
  };
  using Products = float[2][4];
  static constexpr unsigned kNextTurn = 1u << 30;
  static constexpr unsigned kSumsTile = sizeof(Shared::sums[0]);
  static constexpr int kNoScale = 12;  // below that of any finite numbers

  // The left side of all products, its first parts and its second.
  Fragment band[kBandBlocks], low_band[kBandBlocks];
  // Sums down of either blur that lack one block of rows, and two, of every block of columns.
  float open[2][2][2][8];
  // Bytes: the scale of either blur's last block of rows, the least of the last two.
  unsigned scales;
  // From bit 30 on the turn; below, from bit 15 on, the steps of this stream that read x, and the
  // step that runs.
  unsigned turn;
  unsigned own_sums;  // in bytes, of this thread's sums of x in its first block

  MSVQ_WARPS LevelsBlur(const LossBandParams& params, Shared& memory)
      : Tiles(params, memory),
        turn(0),
        own_sums(threadIdx.x / 32 * 2 * kSumsTile + threadIdx.x % 32 * 16) {}

  // Scaled; beyond the last none.
  MSVQ_WARPS float tap(int j) const { return j >= 0 && j <= 2 * p.radius ? shared.taps[j] : 0.0f; }

  // Before the first rows of a stream.
  MSVQ_WARPS void begin_sums() {
    MSVQ_UNROLL
    for (int i = 0; i < 64; ++i) open[i / 32][i / 16 % 2][i / 8 % 2][i % 8] = 0;
    scales = 127 * 0x01010101u;
    const int g = Tiles::lane() / 4, q = Tiles::lane() % 4;
    MSVQ_UNROLL
    for (int k = 0; k < kBandBlocks; ++k) {
      MSVQ_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int row = 2 * g + i % 2, from = kBand * k + i / 2 + 4 * q;
        const int at = from - row - (kBandHalo - p.radius);
        uint32_t parts[2];
        split(tap(at), tap(at + 2), parts);
        band[k].words[i] = parts[0];
        low_band[k].words[i] = parts[1];
      }
    }
  }

  // Where a turn's block of x is kept; in a loss, a warp that compares nothing needs it once.
  MSVQ_WARPS int x_tile(unsigned of_turn) const {
    if (!kLoss) return static_cast<int>(of_turn >> 30 & 1);
    return is_inner() ? static_cast<int>(of_turn >> 30) : 0;
  }

  // The scale of a warp's numbers, at most kNoScale if one is not finite or within 2^-15 of the
  // largest number, which rounded sums may exceed; nothing that follows from them is then finite.
  static MSVQ_WARPS int scale_for(float most) {
    const unsigned bound = __reduce_max_sync(~0u, __float_as_uint(most)) + (1u << 8);
    const int bits = static_cast<int>(bound >> 23);
    return min(127 + 13 + 127 - bits, 127 + 126 - kBandTapScale);
  }
  // 1 over that scale and the taps'.
  static MSVQ_WARPS float factor_for(int scale) {
    const int bits = 127 + 127 - kBandTapScale - scale;
    return __uint_as_float(scale > kNoScale ? static_cast<unsigned>(bits) << 23 : ~0u);
  }

  // Likewise, for averages of what has these factors: no larger than the largest of it.
  static MSVQ_WARPS int scale_for_factors(float a, float b, float c) {
    const unsigned most = max(max(__float_as_uint(a), __float_as_uint(b)), __float_as_uint(c));
    return max(127 + 127 - kBandTapScale - static_cast<int>(most >> 23), kNoScale);
  }

  // Of value[2 j + h], pairs [2 i] and [2 i + 1].
  static MSVQ_WARPS void split_all(const float (&value)[8], int scale, Parts& parts) {
    const float factor = power_of_two(scale);
    MSVQ_UNROLL
    for (int i = 0; i < 4; ++i) {
      uint32_t both[2];
      split(factor * value[2 * i], factor * value[2 * i + 1], both);
      parts.of[0].words[i] = both[0], parts.of[1].words[i] = both[1];
    }
  }

  // products += block k of the band times the right sides j = 0 and 1 of which these are the parts:
  // what takes a second part of either, and then the rest.
  template <int kBlocks>
  MSVQ_WARPS void multiply_low(int k, const Parts* const (&parts)[kBlocks],
                               Products* const (&to)[kBlocks]) const {
    MSVQ_UNROLL
    for (int w = 0; w < kBlocks; ++w) multiply_part(low_band[k], parts[w]->of[0], *to[w]);
    MSVQ_UNROLL
    for (int w = 0; w < kBlocks; ++w) multiply_part(band[k], parts[w]->of[1], *to[w]);
  }
  template <int kBlocks>
  MSVQ_WARPS void multiply_high(int k, const Parts* const (&parts)[kBlocks],
                                Products* const (&to)[kBlocks]) const {
    MSVQ_UNROLL
    for (int w = 0; w < kBlocks; ++w) multiply_part(band[k], parts[w]->of[0], *to[w]);
  }
  static MSVQ_WARPS void multiply_part(const Fragment& left, const Fragment& right, Products& to) {
    MSVQ_UNROLL
    for (int j = 0; j < 2; ++j)
      multiply(to[j], left.words, right.words[2 * j], right.words[2 * j + 1]);
  }
  template <int kBlocks>
  MSVQ_WARPS void multiply_parts(int k, const Parts (&parts)[kBlocks],
                                 Products (&products)[kBlocks]) const {
    const Parts* from[kBlocks];
    Products* to[kBlocks];
    MSVQ_UNROLL
    for (int w = 0; w < kBlocks; ++w) from[w] = parts + w, to[w] = products + w;
    multiply_low(k, from, to);
    multiply_high(k, from, to);
  }

  MSVQ_WARPS char* sums_of(int blur, unsigned of_turn) const {
    return reinterpret_cast<char*>(shared.sums) + own_sums + (of_turn >> 20 & 1024) +
           static_cast<unsigned>(blur * (Shared::kBlocks - 1)) * kSumsTile;
  }

  // Adds a block of rows, which `scale` is for, to the sums down of a blur and leaves those that it
  // completes.
  template <int kBlur, int kBlocks>
  MSVQ_WARPS void blur_down(const float (&value)[kBlocks][8], int scale, bool leaves, bool opens) {
    Parts parts[kBlocks];
    MSVQ_UNROLL
    for (int w = 0; w < kBlocks; ++w) split_all(value[w], scale, parts[w]);
    const float factor = factor_for(scale);
    if (leaves)
      leave<kBlur>(parts, factor, min(static_cast<int>(scales >> (16 * kBlur + 8) & 255), scale));
    else
      say_left(kBlur);
    if (!opens) return;
    const int least = min(static_cast<int>(scales >> 16 * kBlur & 255), scale);
    scales = (scales & 0xffffu << 16 * (1 - kBlur)) | static_cast<unsigned>(scale | least << 8)
                                                          << 16 * kBlur;
    MSVQ_UNROLL
    for (int k = 1; k >= 0; --k) {
      Products products[kBlocks] = {};
      multiply_parts(k, parts, products);
      MSVQ_UNROLL
      for (int i = 0; i < 8 * kBlocks; ++i) {
        const float product = products[i / 8][i / 4 % 2][i % 4];
        float (&sums)[2][2][8] = open[kBlur];
        if (k == 1) sums[0][i / 8][i % 8] = sums[1][i / 8][i % 8] + factor * product;
        if (k == 0) sums[1][i / 8][i % 8] = factor * product;
      }
    }
  }

  // Leaves the sums that a block of rows completes; `scale` is for them.
  template <int kBlur, int kBlocks>
  MSVQ_WARPS void leave(const Parts (&parts)[kBlocks], float factor, int scale) const {
    Products products[kBlocks] = {};
    multiply_parts(2, parts, products);
    MSVQ_UNROLL
    for (int w = 0; w < kBlocks; ++w) {
      float along[8];  // rows are columns: pair 2 j + h of rows of parity j
      MSVQ_UNROLL
      for (int i = 0; i < 8; ++i)
        along[i / 2 % 2 * 4 + i / 4 * 2 + i % 2] =
            open[kBlur][0][w][i] + factor * products[w][i / 4][i % 4];
      Parts sums;
      split_all(along, scale, sums);
      const unsigned at = kBlocks == 1 ? near_block() : static_cast<unsigned>(w);
      Fragment* const to = reinterpret_cast<Fragment*>(sums_of(kBlur, turn) + at * kSumsTile);
      to[0] = sums.of[0], to[32] = sums.of[1];
    }
    if (is_first()) shared.factors[kBlur][own_warp()][turn >> 30 & 1] = factor_for(scale);
    say_left(kBlur);
  }
  // The lane that speaks for the warp.
  MSVQ_WARPS bool is_first() const { return own_sums % 512 == 0; }
  MSVQ_WARPS unsigned own_warp() const { return own_sums / (2 * kSumsTile); }
  MSVQ_WARPS bool is_leftmost() const { return own_sums < 2 * kSumsTile; }
  MSVQ_WARPS bool is_rightmost() const { return own_warp() == static_cast<unsigned>(last_warp()); }
  // Of the two of an outer warp that beside the strip.
  MSVQ_WARPS unsigned near_block() const { return is_leftmost(); }
  MSVQ_WARPS void say_left(int blur) const {
    __syncwarp();
    if (is_first()) arrive(&shared.ready[blur][own_warp()][turn >> 30 & 1]);
  }

  // Until the warps on both sides have left what this one has left: lanes below 16 wait for the
  // left one, the others for the right one.
  MSVQ_WARPS void meet(int blur, unsigned of_turn) const {
    const bool right = own_sums >> 8 & 1;
    const int beside = static_cast<int>(own_warp()) + (right ? !is_rightmost() : is_leftmost() - 1);
    wait(&shared.ready[blur][beside][of_turn >> 30 & 1], of_turn >> 31);
    __syncwarp();
  }

  // The sums that a block of columns has left, `at` blocks from the first own one.
  MSVQ_WARPS Parts parts_left(int blur, unsigned of_turn, int at) const {
    const auto* from = reinterpret_cast<const Fragment*>(sums_of(blur, of_turn)) + 128 * at;
    return {{from[0], from[32]}};
  }

  // The blur of the warp's pixels: [j][2 i + h] is row 4 q + 2 h + j, column 2 g + i. Returns its
  // scale; where it is of what is not finite the zeros of a band have carried that too far.
  MSVQ_WARPS int blur_along(int blur, unsigned of_turn, Products (&sum)[2]) const {
    const float* const factors = shared.factors[blur][own_warp()] + (of_turn >> 30 & 1);
    const float left = factors[-2], own = factors[0], right = factors[2];
    const Parts parts[4] = {parts_left(blur, of_turn, -1), parts_left(blur, of_turn, 0),
                            parts_left(blur, of_turn, 1), parts_left(blur, of_turn, 2)};
    const Parts *const before[2] = {parts, parts + 1}, *const at[2] = {parts + 1, parts + 2};
    const Parts* const after[2] = {parts + 2, parts + 3};
    Products products[2] = {}, from_left = {}, from_right = {};
    Products *const to_left[2] = {&from_left, products + 1}, *const to[2] = {products,
                                                                             products + 1};
    Products* const to_right[2] = {products, &from_right};
    multiply_low(1, at, to), multiply_low(2, after, to_right), multiply_low(0, before, to_left);
    // Sums are cut off, so the largest part comes last.
    multiply_high(2, after, to_right), multiply_high(0, before, to_left), multiply_high(1, at, to);
    MSVQ_UNROLL
    for (int i = 0; i < 8; ++i) {
      const int j = i / 4, k = i % 4;
      sum[0][j][k] = own * products[0][j][k] + left * from_left[j][k];
      sum[1][j][k] = own * products[1][j][k] + right * from_right[j][k];
    }
    return scale_for_factors(left, own, right);
  }

  // Likewise the first blur of an outer warp's near block.
  MSVQ_WARPS int blur_near_along(Products (&sum)[1]) const {
    const int first = is_leftmost() ? 0 : -1;
    const float* const factors = shared.factors[0][own_warp()] + (turn >> 30 & 1);
    const float of[kBandBlocks] = {factors[2 * first], factors[0], factors[2 * first + 2]};
    MSVQ_UNROLL
    for (int k = 0; k < kBandBlocks; ++k) {
      const Parts parts[1] = {parts_left(0, turn, first + k)};
      Products products[1] = {};
      multiply_parts(k, parts, products);
      MSVQ_UNROLL
      for (int i = 0; i < 8; ++i) {
        float& own = sum[0][i / 4][i % 4];
        own = (k == 0 ? 0.0f : own) + of[k] * products[0][i / 4][i % 4];
      }
    }
    return scale_for_factors(of[0], of[1], of[2]);
  }

  // The blocks of x of this turn, as they were copied.
  MSVQ_WARPS void blur_x_down(bool leaves, bool opens) {
    float value[2][8];
    MSVQ_UNROLL
    for (int i = 0; i < 8; ++i) {
      const int w = i / 4, r = i % 4;
      const float2 two = pair(x_tile(turn), w, r);
      value[w][r % 2 * 2 + r / 2] = two.x, value[w][4 + r % 2 * 2 + r / 2] = two.y;
    }
    float most = fabsf(value[0][0]);
    MSVQ_UNROLL
    for (int i = 1; i < 16; ++i) most = larger_or_nan(most, fabsf(value[i / 8][i % 8]));
    blur_down<0>(value, scale_for(most), leaves, opens);
  }

  // The first blur of the blocks of rows from row y on, kept if it is `seen`, and the sums down of
  // the second.
  MSVQ_WARPS void blur_again(bool seen, int y, bool leaves, bool opens) {
    if (!is_inner()) {
      Products sum[1];
      const int scale = blur_near_along(sum);
      down_again(sum, scale, leaves, opens);
      return;
    }
    Products sum[2];
    const int scale = blur_along(0, turn, sum);
    if (!kLoss && seen) this->write(p.levels[1], sum, y);
    if (kLoss && seen) {
      MSVQ_UNROLL
      for (int i = 0; i < 8; ++i) {
        const int w = i / 4, r = i % 4;
        pair(kLossBlurred + static_cast<int>(turn >> 30 & 1), w, r) =
            make_float2(sum[w][r % 2][r / 2], sum[w][r % 2][2 + r / 2]);
      }
    }
    down_again(sum, scale, leaves, opens);
  }
  template <int kBlocks>
  MSVQ_WARPS void down_again(const Products (&sum)[kBlocks], int scale, bool leaves, bool opens) {
    float value[kBlocks][8];
    MSVQ_UNROLL
    for (int i = 0; i < 8 * kBlocks; ++i)
      value[i / 8][i % 8] = sum[i / 8][i / 2 % 2][i / 4 % 2 * 2 + i % 2];
    blur_down<1>(value, scale, leaves, opens);
  }
};

}  // namespace cuda
}  // namespace msvq
