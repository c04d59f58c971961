// The Gaussian blur of contiguous images in half precision on tensor cores (sm_90a): down the
// columns and along the rows, 16 outputs at a time, as products with a banded matrix of the taps.
//
// A block streams the rows of a strip of 128 columns, 16 rows a step. Down: a warp has 16 columns,
// and in registers the rows that 16 outputs need, as the right side of products. Their sums go to
// shared memory, from where they are the right side of the products along.
//
// A number of float32, a sum or a tap, is the sum of two of half precision but for 2^-24 of it, and
// a product the sum of three products of these parts but for 2^-24, if the parts stay in the range
// of half precision. So 16 x 16 numbers share a power of two that brings the largest to 2^13 or
// above; what is lost of the smallest is then 2^-38 of the largest. The zeros of a band are
// multiplied too, by what lies up to 15 pixels outside of a window. If that is Inf or NaN so is the
// output, and outputs that are not finite are computed once more.
#pragma once
#include "cuda/hopper.h"
#include "gaussian_blur/gaussian_blur_column.h"
#include "gaussian_blur/gaussian_blur_hopper_params.h"

namespace msvq {
namespace cuda {

// Bytes of a row of sums in shared memory, 16 past a multiple of 32 so that 8 rows meet in no bank;
// of 16 rows.
constexpr int kBandPitch = 2 * kBandColumns + 16;
constexpr int kBandPart = kBand * kBandPitch;

// What a thread has of a 16 x 16 left side of a product.
struct alignas(16) Fragment {
  uint32_t words[4];
};

// What the warps have for each other in a step: both parts of their sums, and what every warp's are
// multiplied by.
struct alignas(16) BandStep {
  char sums[2 * kBandPart];
  float factors[kBandWarps];
};

// A warp writes its sums of a step and then blurs the step before along, so that it waits for what
// the others wrote a turn ago. Whoever writes step n has waited for step n - 2, and who wrote that
// had read step n - 4: these two may share a place.
constexpr int kBandPlaces = 4;

struct alignas(16) BandShared {
  BandStep steps[kBandPlaces];
  uint64_t written[kBandPlaces];       // by all warps
  Fragment low_band[kBandBlocks][32];  // the second parts of the band
  float taps[2 * kBandHalo + 1];
  int units[2];              // the block's, from and to
  uint64_t bad[kBandWarps];  // bits of the steps that every warp has to compute once more
};

// The parts of two numbers, the first in the low bits.
MSVQ_WARPS void split(float low, float high, uint32_t (&parts)[2]) {
  MSVQ_UNROLL
  for (int i = 0; i < 2; ++i) {
    parts[i] = pack_halves(low, high);
    const float2 taken = unpack_halves(parts[i]);
    low -= taken.x, high -= taken.y;
  }
}

// A power of two by the bits of its exponent; of 255 Inf, of -1 -Inf.
MSVQ_WARPS float power_of_two(int bits) {
  return __uint_as_float(static_cast<unsigned>(bits) << 23);
}

// The first unit of a group of blocks. Each group gets as much work as the others: a plane costs
// its steps and kBandStart more, for the rows that are read before the first outputs.
MSVQ_WARPS int first_unit(const BandParams& p, int group) {
  const int plane = p.steps + kBandStart;
  const auto at = static_cast<int>(int64_t{group} * (p.units / p.steps * plane) / p.groups);
  const int past = at % plane - kBandStart;
  return at / plane * p.steps + max(past, 0);
}

// Thread 4 g + q of a warp. Warp w has 16 columns, from 16 w of the strip on, the last those before
// the strip: the two whose columns can be outside of the image do not blur along.
template <class T>
struct BandBlur {
  const BandParams& p;
  BandShared& shared;
  Fragment band[kBandBlocks];     // the products' left side, its first parts: rows 2 g and 2 g + 1
  uint32_t rows[kBandBlocks][4];  // [2 j + h]: column 2 g + j, rows 2 q and on, 8 h further
  unsigned scales;                // of these blocks, exponents of a byte each
  uint32_t next[4][2];            // rows 2 q, 2 q + 1, 8 further: elements, or pairs in [0]
  int64_t next_at;                // in p.x, where they were or will be read from in pairs
  int strip;                      // its first pixel
  bool inside;  // the warp's columns are inside the image and can be read in pairs
  const T* plane;
  T* out;
  unsigned turn;  // number of the next step to be blurred along

  MSVQ_WARPS BandBlur(const BandParams& params, BandShared& memory) : p(params), shared(memory) {}

  MSVQ_WARPS float tap(int j) const {
    return j >= 0 && j <= 2 * p.radius ? (1 << kBandTapScale) * shared.taps[j] : 0.0f;
  }

  MSVQ_WARPS void run() {
    const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
    if (thread <= 2 * p.radius) shared.taps[thread] = tap_at(p.half, p.radius, thread);
    if (thread < 2) shared.units[thread] = first_unit(p, block / p.count_x + thread);
    if (thread < kBandWarps) shared.bad[thread] = 0;
    if (thread < kBandPlaces) init_barrier(&shared.written[thread], kBandWarps);
    __syncthreads();
    const int g = thread % 32 / 4, q = thread % 4;
    MSVQ_UNROLL
    for (int k = 0; k < kBandBlocks; ++k) {
      MSVQ_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int row = 2 * g + i % 2, column = kBand * k + i / 2 * 8 + 2 * q;
        const int at = column - row - (kBandHalo - p.radius);
        uint32_t parts[2];
        split(tap(at), tap(at + 1), parts);
        band[k].words[i] = parts[0];
        shared.low_band[k][thread % 32].words[i] = parts[1];  // the same from every warp
      }
    }
    strip = block % p.count_x * kBandPixels;
    inside = p.pairs && first() >= 0 && first() + kBand <= p.width;
    turn = 0, scales = 0;
    MSVQ_UNROLL
    for (int r = 0; r < 4; ++r) next[r][0] = next[r][1] = 0;
    MSVQ_NO_UNROLL
    for (int unit = shared.units[0]; unit < shared.units[1];) {
      const int number = unit / p.steps, step = unit % p.steps;
      const int count = min(min(shared.units[1] - unit, p.steps - step), kBandSteps);
      const int64_t begin = int64_t{number * p.height} * p.width;
      plane = static_cast<const T*>(p.x) + begin;
      out = static_cast<T*>(p.out) + begin;
      unit += count;
      stream(kBand * step, count);
    }
  }

  // `left` steps of outputs, up to kBandSteps, from row `row` on.
  MSVQ_WARPS void stream(int row, int left) {
    // The first outputs need all blocks of rows, and a block is asked for a turn ahead.
    next_at = plane - static_cast<const T*>(p.x) + corner(row - kBandHalo - kBand);
    // The blocks after the first, which would be waited for one after another.
    MSVQ_UNROLL
    for (int i = 2; i <= kBandBlocks; ++i)
      if (is_paired(row - kBandHalo + kBand * (i - 1)))
        prefetch(static_cast<const T*>(p.x) + next_at + i * kBand * p.width);
    row -= kBand * kBandBlocks;
    int missing = kBandBlocks + 1;  // turns before there is a step to blur along
    MSVQ_NO_UNROLL
    while (left > 0) {
      const int newest = row + kBand * (kBandBlocks - 1) - kBandHalo;
      next_at += kBand * p.width;
      take(newest);  // where nobody needs it too: a condition would keep copies of rows
      if (left + missing > 2) fetch(newest + kBand);
      if (missing < 2 && left + missing > 1) {
        const unsigned number = turn + (missing == 0 ? 1 : 0);
        blur_down(shared.steps[number % kBandPlaces]);
        __syncwarp();
        if (thread_again() % 32 == 0) arrive(&shared.written[number % kBandPlaces]);
      }
      if (missing > 0) {
        --missing;
      } else {
        --left;
        wait(&shared.written[turn % kBandPlaces], turn / kBandPlaces % 2);
        if (thread_again() < kBandPixels / kBand * 32)
          blur_along(shared.steps[turn % kBandPlaces], row - kBand, left);
        ++turn;
      }
      row += kBand;
    }
    uint64_t& bad = shared.bad[thread_again() / 32];
    __syncwarp();
    if (bad) {
      write_again(bad, row - 2 * kBand);
      __syncwarp();
      bad = 0;
    }
  }

  // The warp's first column.
  MSVQ_WARPS int first() const { return strip + block_of_columns() * kBand - kBandHalo; }
  MSVQ_WARPS int block_of_columns() const {
    const int after = thread_again() / 32 + 1;
    return after < kBandWarps ? after : 0;
  }

  // From the first element of row y to row 2 q further, column 2 g of the warp's.
  MSVQ_WARPS int corner(int y) const {
    const int lane = thread_again() % 32;
    return (y + lane % 4 * 2) * p.width + first() + lane / 4 * 2;
  }

  // Whether the block of 16 rows from y on is read in pairs.
  MSVQ_WARPS bool is_paired(int y) const { return inside && y >= 0 && y + kBand <= p.height; }

  // Asks for that block.
  MSVQ_WARPS void fetch(int y) {
    if (is_paired(y)) {
      const T* const from = static_cast<const T*>(p.x) + next_at;
      MSVQ_UNROLL
      for (int r = 0; r < 4; ++r)
        next[r][0] = __ldg(reinterpret_cast<const uint32_t*>(from + (r % 2 + r / 2 * 8) * p.width));
    } else {
      const int lane = thread_again() % 32, column = first() + lane / 4 * 2;
      const int named = walked_source(p.border, y + lane % kBand, p.height);
      const int columns[2] = {walked_source(p.border, column, p.width),
                              walked_source(p.border, column + 1, p.width)};
      MSVQ_UNROLL
      for (int r = 0; r < 4; ++r) {
        const int row = __shfl_sync(~0u, named, lane % 4 * 2 + r % 2 + r / 2 * 8);
        MSVQ_UNROLL
        for (int j = 0; j < 2; ++j)
          next[r][j] =
              row < 0 || columns[j] < 0 ? 0 : read_bits(plane + (row * p.width + columns[j]));
      }
    }
  }

  // Brings that block's rows to the second-level cache, `from` being this thread's corner.
  MSVQ_WARPS void prefetch(const T* from) const {
    MSVQ_UNROLL
    for (int r = 0; r < 4; ++r) prefetch_second(from + (r % 2 + r / 2 * 8) * p.width);
  }

  MSVQ_WARPS float element(int r, int j, bool paired) const {
    return widen_bits<T>(paired ? next[r][0] >> 16 * j : next[r][j]);
  }

  // Makes the block from row y on, which has been asked for, the last of `rows`.
  MSVQ_WARPS void take(int y) {
    MSVQ_UNROLL
    for (int k = 1; k < kBandBlocks; ++k) {
      MSVQ_UNROLL
      for (int i = 0; i < 4; ++i) rows[k - 1][i] = rows[k][i];
    }
    const bool paired = is_paired(y);
    float value[4][2];  // as in rows, of two rows
    float most = 0;     // but for NaN, which spreads by itself
    MSVQ_UNROLL
    for (int i = 0; i < 8; ++i) {
      value[i / 2][i % 2] = element(i / 2 % 2 * 2 + i % 2, i / 4, paired);
      most = fmaxf(most, fabsf(value[i / 2][i % 2]));
    }
    const int bits = static_cast<int>(__reduce_max_sync(~0u, __float_as_uint(most)) >> 23);
    // Near Inf nothing that shares its scale is finite.
    const int scale = bits == 255 ? 255 : min(127 + 13 + 127 - bits, 253);
    scales = scales >> 8 | static_cast<unsigned>(scale) << 8 * (kBandBlocks - 1);
    MSVQ_UNROLL
    for (int i = 0; i < 4; ++i)
      rows[kBandBlocks - 1][i] =
          pack_halves(power_of_two(scale) * value[i][0], power_of_two(scale) * value[i][1]);
  }

  MSVQ_WARPS int scale_of(int k) const { return static_cast<int>(scales >> 8 * k & 255); }

  // sum += factor * block k of the band times the right side whose parts are low and high.
  template <int kOf>
  MSVQ_WARPS void add_product(int k, const Fragment& low_band, const uint32_t (&low)[kOf],
                              const uint32_t (&high)[kOf], float factor, float (&sum)[4]) const {
    float product[4] = {};
    multiply(product, low_band.words, low[0], high[0]);
    if constexpr (kOf > 1) multiply(product, band[k].words, low[1], high[1]);
    multiply(product, band[k].words, low[0], high[0]);
    MSVQ_UNROLL
    for (int i = 0; i < 4; ++i) sum[i] += factor * product[i];
  }

  // Sums down the columns to shared memory. Column n of product j is the warp's column 2 n + j.
  MSVQ_WARPS void blur_down(BandStep& step) const {
    int scale = 255;
    MSVQ_UNROLL
    for (int k = 0; k < kBandBlocks; ++k) scale = min(scale, scale_of(k));
    float sum[2][4] = {};
    MSVQ_UNROLL
    for (int k = 0; k < kBandBlocks; ++k) {
      const Fragment low_band = shared.low_band[k][thread_again() % 32];
      const float factor = power_of_two(max(127 - kBandTapScale + scale - scale_of(k), 0));
      MSVQ_UNROLL
      for (int j = 0; j < 2; ++j) {
        add_product<1>(k, low_band, {rows[k][2 * j]}, {rows[k][2 * j + 1]}, factor, sum[j]);
      }
    }
    const int thread = thread_again(), row = thread % 32 / 4 * 2;
    if (thread % 32 == 0)
      step.factors[block_of_columns()] = power_of_two(254 - scale) * (1.0f / (1 << kBandTapScale));
    char* const to =
        step.sums + row * kBandPitch + block_of_columns() * (2 * kBand) + thread % 4 * 8;
    MSVQ_UNROLL
    for (int h = 0; h < 2; ++h) {
      uint32_t left[2], right[2];
      split(sum[0][2 * h], sum[1][2 * h], left);
      split(sum[0][2 * h + 1], sum[1][2 * h + 1], right);
      MSVQ_UNROLL
      for (int part = 0; part < 2; ++part)
        *reinterpret_cast<uint2*>(to + h * kBandPitch + part * kBandPart) =
            make_uint2(left[part], right[part]);
    }
  }

  // Of 16 rows and 32 pixels warp 2 i has the first 8 rows, warp 2 i + 1 the others: this thread
  // rows 2 q and 2 q + 1, pixels 2 g, 2 g + 1 and both 16 further.
  MSVQ_WARPS int odd() const { return thread_again() / 32 % 2; }
  MSVQ_WARPS int own_row(int y) const { return y + odd() * 8 + thread_again() % 4 * 2; }
  MSVQ_WARPS int own_pixel() const {
    return strip + thread_again() / 64 * (2 * kBand) + thread_again() % 32 / 4 * 2;
  }

  // The outputs of the step of rows y to y + 15, after which there are `left`. Row n of product j
  // is pixel n of the 16 from 16 j on, column n is row n.
  MSVQ_WARPS void blur_along(const BandStep& step, int y, int left) const {
    const int thread = thread_again(), column = thread / 64 * (2 * kBand);
    const uint32_t from =
        shared_address(step.sums + (odd() * 8 + thread % 8) * kBandPitch + 2 * column +
                       thread % 16 / 8 * 16 + thread % 32 / 16 * kBandPart);
    const float* const factors = step.factors + column / kBand;
    uint32_t right[2][4];  // of 16 columns and the next 16, in turns: both halves of both parts
    float factor[2];
    load_blocks(from, right[0]);
    factor[0] = factors[0];
    float sum[2][4] = {};
    MSVQ_UNROLL
    for (int k = 0; k < kBandBlocks; ++k) {
      const int next_16 = (k + 1) % 2;
      load_blocks(from + static_cast<uint32_t>(2 * kBand * (k + 1)), right[next_16]);
      factor[next_16] = factors[k + 1];
      const Fragment low_band = shared.low_band[k][thread % 32];
      MSVQ_UNROLL
      for (int j = 0; j < 2; ++j) {
        const uint32_t (&of)[4] = right[(k + j) % 2];
        add_product<2>(k, low_band, {of[0], of[2]}, {of[1], of[3]}, factor[(k + j) % 2], sum[j]);
      }
    }
    float total = sum[0][0];
    MSVQ_UNROLL
    for (int i = 1; i < 8; ++i) total += sum[i / 4][i % 4];
    if (__any_sync(~0u, !(fabsf(total) <= 3.4028234663852886e38f)) && thread % 32 == 0)
      shared.bad[thread / 32] |= uint64_t{1} << left;
    if (p.out_pairs && y + kBand <= p.height && strip + column + 2 * kBand <= p.width) {
      const int back = 3 * kBand * p.width - odd() * (8 * p.width - kBand);
      T* const to = static_cast<T*>(p.out) + (next_at - back);
      MSVQ_UNROLL
      for (int i = 0; i < 4; ++i)
        narrow_pair(sum[i / 2][i % 2], sum[i / 2][i % 2 + 2],
                    to + (i % 2 * p.width + i / 2 * kBand));
    } else {
      MSVQ_UNROLL
      for (int i = 0; i < 8; ++i)
        write(own_row(y) + i % 2, own_pixel() + i / 4 * kBand + i / 2 % 2, sum[i / 4][i % 4]);
    }
  }

  // An output, if there is one.
  MSVQ_WARPS void write(int y, int x, float sum) const {
    if (y < p.height && x < p.width) narrow(sum, out + (y * p.width + x));
  }

  // The outputs of blur_along in steps of `bad`, from memory; bit 0 is that of row `last`.
  MSVQ_WARPS void write_again(uint64_t bad, int last) const {
    MSVQ_NO_UNROLL
    for (int i = 0; i < 8 * kBandSteps; ++i) {
      if (!(bad >> i / 8 & 1)) continue;
      const int y = own_row(last - i / 8 * kBand) + i % 2;
      const int x = own_pixel() + i / 4 % 2 * kBand + i / 2 % 2;
      float sum = 0;
      MSVQ_NO_UNROLL
      for (int j = 0; j <= 2 * p.radius; ++j) {
        const int column = walked_source(p.border, x + j - p.radius, p.width);
        float down = 0;
        MSVQ_NO_UNROLL
        for (int k = 0; column >= 0 && k <= 2 * p.radius; ++k) {
          const int row = walked_source(p.border, y + k - p.radius, p.height);
          if (row >= 0) down += shared.taps[k] * widen(plane[row * p.width + column]);
        }
        sum += shared.taps[j] * down;
      }
      write(y, x, sum);
    }
  }
};

}  // namespace cuda
}  // namespace msvq
