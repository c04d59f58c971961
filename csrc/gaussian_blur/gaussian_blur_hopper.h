// The Gaussian blur of contiguous images on tensor cores (sm_90a): down the columns and along the
// rows, 16 outputs at a time, as products with a banded matrix of the taps.
//
// A block streams the rows of a strip of 128 columns, 16 rows a step. Down: a warp has 16 columns,
// and in registers the rows that 16 outputs need, as the right side of products. Their sums go to
// shared memory, from where they are the right side of the products along.
//
// A number of float32 is the sum of two of half precision but for 2^-24 of it, and a product the
// sum of three products of these parts but for 2^-24, if the parts stay in the range of half
// precision. So 16 x 16 numbers share a power of two that brings the largest to 2^13 or above; what
// is lost of the smallest is then 2^-38 of the largest. The zeros of a band are multiplied too, by
// what lies up to 15 pixels outside of a window. If that is Inf or NaN so is the output, and
// outputs that are not finite are computed once more.
#pragma once
#include "cuda/hopper.h"
#include "gaussian_blur/gaussian_blur_column.h"
#include "gaussian_blur/gaussian_blur_hopper_params.h"

namespace msvq {
namespace cuda {

// Sums in shared memory, in bytes: of a row, 16 past a multiple of 32 so that 8 rows meet in no
// bank; of 16 rows; of both parts.
constexpr int kBandPitch = 2 * kBandColumns + 16;
constexpr int kBandPart = kBand * kBandPitch;
constexpr int kBandSums = 2 * kBandPart;

// What a thread has of a 16 x 16 left side of a product.
struct alignas(16) Fragment {
  uint32_t words[4];
};

struct alignas(16) BandShared {
  char sums[2 * kBandSums];            // of two steps
  Fragment low_band[kBandBlocks][32];  // the second parts of the band
  float factors[2][kBandWarps];        // what every warp's sums are multiplied by
  float taps[2 * kBandHalo + 1];
  int units[2];  // the block's, from and to
  uint64_t
      bad[kBandWarps];  // bits of the steps of which every warp has to compute outputs once more
};

// The parts of two numbers, the first in the low bits.
template <int kParts>
MSVQ_WARPS void split(float low, float high, uint32_t (&parts)[kParts]) {
  MSVQ_UNROLL
  for (int i = 0; i < kParts; ++i) {
    parts[i] = pack_halves(low, high);
    const float2 taken = unpack_halves(parts[i]);
    low -= taken.x, high -= taken.y;
  }
}

// A power of two by the bits of its exponent; of 255 Inf.
MSVQ_WARPS float power_of_two(int bits) { return __int_as_float(bits << 23); }

template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T first, second;
};
template <class T>
MSVQ_WARPS void read_pair(const T* from, uint32_t (&bits)[2]) {
  const Pair<T> pair = *reinterpret_cast<const Pair<T>*>(from);
  bits[0] = 0;
  memcpy(bits, &pair, sizeof pair);
}

// Thread 4 g + q of a warp. Its warp's columns are `first` and 15 more, 16 to the left of its
// pixels.
template <class T>
struct BandBlur {
  static constexpr int kParts = sizeof(T) == 4 ? 2 : 1;  // that elements have

  const BandParams& p;
  BandShared& shared;
  Fragment band[kBandBlocks];  // the products' left side, its first parts: rows 2 g and 2 g + 1
  uint32_t rows[kBandBlocks][kParts][4];  // [2 j + h]: column 2 g + j, rows 2 q and on, 8 h further
  unsigned scales;                        // of these blocks, exponents of a byte each
  uint32_t next[4][2];                    // rows 2 q, 2 q + 1, 8 further: elements, or pairs in [0]
  int first;
  const T* plane;
  T* out;
  int sums;  // of this step, in shared.sums

  MSVQ_WARPS BandBlur(const BandParams& params, BandShared& memory) : p(params), shared(memory) {}

  MSVQ_WARPS float tap(int j) const {
    return j >= 0 && j <= 2 * p.radius ? (1 << kBandTapScale) * shared.taps[j] : 0.0f;
  }

  MSVQ_WARPS void run() {
    const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
    if (thread <= 2 * p.radius) shared.taps[thread] = tap_at(p.half, p.radius, thread);
    if (thread < 2)
      shared.units[thread] =
          static_cast<int>(int64_t{block / p.count_x + thread} * p.units / p.groups);
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
    first = block % p.count_x * kBandPixels + thread / 32 * kBand - kBandHalo;
    sums = 0, scales = 0;
    MSVQ_NO_UNROLL
    for (int unit = shared.units[0]; unit < shared.units[1];) {
      const int number = unit / p.steps, step = unit % p.steps;
      const int count = min(min(shared.units[1] - unit, p.steps - step), kBandSteps);
      const int64_t begin = number * p.height * p.pitch;
      plane = static_cast<const T*>(p.x) + begin;
      out = static_cast<T*>(p.out) + begin;
      stream(kBand * step, count);
      unit += count;
    }
  }

  // `left` steps of outputs, up to 32, from row `row` on.
  MSVQ_WARPS void stream(int row, int left) {
    // The first outputs need all blocks of rows, and a block is asked for a turn ahead.
    row -= kBand * kBandBlocks;
    int missing = kBandBlocks;
    unsigned bad = 0;  // bits of the steps that this warp has to compute once more
    MSVQ_NO_UNROLL
    while (left > 0) {
      const int newest = row + kBand * (kBandBlocks - 1) - kBandHalo;
      if (missing < kBandBlocks) take(newest);
      if (missing == 0) blur_down();
      if (left > 1 || missing > 0) fetch(newest + kBand);
      if (missing == 0) {
        __syncthreads();
        --left;
        if (thread_again() < kBandPixels / kBand * 32) bad |= blur_along(row) << left;
        sums = kBandSums - sums;
      } else {
        --missing;
      }
      row += kBand;
    }
    if (bad) write_again(bad, row - kBand);
  }

  // From the first element of row y to row 2 q further, column 2 g of the warp's.
  MSVQ_WARPS int corner(int y) const {
    const int lane = thread_again() % 32;
    return (y + lane % 4 * 2) * p.width + first + lane / 4 * 2;
  }

  // Whether the block of 16 rows from y on is read in pairs.
  MSVQ_WARPS bool is_paired(int y) const {
    return p.pairs && first >= 0 && first + kBand <= p.width && y >= 0 && y + kBand <= p.height;
  }

  // Asks for that block.
  MSVQ_WARPS void fetch(int y) {
    if (is_paired(y)) {
      const T* from = plane + corner(y);
      MSVQ_UNROLL
      for (int r = 0; r < 4; ++r) {
        read_pair(from, next[r]);
        from += r == 1 ? 7 * p.pitch : p.pitch;
      }
    } else {
      const int lane = thread_again() % 32, column = first + lane / 4 * 2;
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

  MSVQ_WARPS float element(int r, int j, bool paired) const {
    constexpr int kBits = 8 * static_cast<int>(sizeof(T));
    if (kBits == 32 || !paired) return widen_bits<T>(next[r][j]);
    return widen_bits<T>(next[r][0] >> (kBits * j % 32));
  }

  // Makes the block from row y on, which has been asked for, the last of `rows`.
  MSVQ_WARPS void take(int y) {
    MSVQ_UNROLL
    for (int k = 1; k < kBandBlocks; ++k) {
      MSVQ_UNROLL
      for (int i = 0; i < 4 * kParts; ++i) rows[k - 1][i / 4][i % 4] = rows[k][i / 4][i % 4];
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
    for (int i = 0; i < 4; ++i) {
      uint32_t parts[kParts];
      split(power_of_two(scale) * value[i][0], power_of_two(scale) * value[i][1], parts);
      MSVQ_UNROLL
      for (int part = 0; part < kParts; ++part) rows[kBandBlocks - 1][part][i] = parts[part];
    }
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
  MSVQ_WARPS void blur_down() const {
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
        uint32_t low[kParts], high[kParts];
        MSVQ_UNROLL
        for (int part = 0; part < kParts; ++part)
          low[part] = rows[k][part][2 * j], high[part] = rows[k][part][2 * j + 1];
        add_product(k, low_band, low, high, factor, sum[j]);
      }
    }
    const int thread = thread_again(), row = thread % 32 / 4 * 2;
    if (thread % 32 == 0)
      shared.factors[sums != 0][thread / 32] =
          power_of_two(254 - scale) * (1.0f / (1 << kBandTapScale));
    char* const to =
        shared.sums + sums + row * kBandPitch + thread / 32 * (2 * kBand) + thread % 4 * 8;
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

  // The outputs of rows y to y + 15 and the warp's pixels; whether any is not finite. Column n of
  // product j is row 8 j + n.
  MSVQ_WARPS unsigned blur_along(int y) const {
    const int thread = thread_again();
    const uint32_t from =
        shared_address(shared.sums + sums + (thread % 8 + thread % 32 / 16 * 8) * kBandPitch +
                       thread / 32 * (2 * kBand) + thread % 16 / 8 * 16);
    float sum[2][4] = {};
    MSVQ_UNROLL
    for (int k = 0; k < kBandBlocks; ++k) {
      uint32_t right[2][4];
      MSVQ_UNROLL
      for (int part = 0; part < 2; ++part)
        load_blocks(from + static_cast<uint32_t>(part * kBandPart + 2 * kBand * k), right[part]);
      const Fragment low_band = shared.low_band[k][thread % 32];
      const float factor = shared.factors[sums != 0][thread / 32 + k];
      MSVQ_UNROLL
      for (int j = 0; j < 2; ++j)
        add_product<2>(k, low_band, {right[0][2 * j], right[1][2 * j]},
                       {right[0][2 * j + 1], right[1][2 * j + 1]}, factor, sum[j]);
    }
    float total = 0;
    MSVQ_UNROLL
    for (int i = 0; i < 8; ++i) total += sum[i / 4][i % 4];
    const bool bad = __any_sync(~0u, !(fabsf(total) <= 3.4028234663852886e38f));
    if (p.out_pairs && y + kBand <= p.height && first + kBandHalo + kBand <= p.width) {
      T* to = out + (corner(y) + kBandHalo);
      MSVQ_UNROLL
      for (int i = 0; i < 4; ++i) {
        Pair<T> pair;
        narrow(sum[i / 2][i % 2], &pair.first), narrow(sum[i / 2][i % 2 + 2], &pair.second);
        *reinterpret_cast<Pair<T>*>(to) = pair;
        to += i == 1 ? 7 * p.pitch : p.pitch;
      }
    } else {
      MSVQ_UNROLL
      for (int i = 0; i < 8; ++i)
        write(y + i / 4 * 8 + thread % 4 * 2 + i % 2, i / 2 % 2, sum[i / 4][i % 4]);
    }
    return bad;
  }

  // An output of row y and pixel 2 g of the warp's or the next, if there is one.
  MSVQ_WARPS void write(int y, int next_pixel, float sum) const {
    const int x = first + kBandHalo + thread_again() % 32 / 4 * 2 + next_pixel;
    if (y < p.height && x < p.width) narrow(sum, out + (y * p.width + x));
  }

  // The outputs of blur_along in steps of `bad`, from memory; bit 0 is that of row `last`.
  MSVQ_WARPS void write_again(unsigned bad, int last) const {
    const int x = first + kBandHalo + thread_again() % 32 / 4 * 2;
    MSVQ_NO_UNROLL
    for (int i = 0; i < 8 * kBandSteps; ++i) {
      if (!(bad >> i / 8 & 1)) continue;
      const int y = last - i / 8 * kBand + i / 4 % 2 * 8 + thread_again() % 4 * 2 + i / 2 % 2;
      float sum = 0;
      MSVQ_NO_UNROLL
      for (int j = 0; j <= 2 * p.radius; ++j) {
        const int column = walked_source(p.border, x + i % 2 + j - p.radius, p.width);
        float down = 0;
        MSVQ_NO_UNROLL
        for (int k = 0; column >= 0 && k <= 2 * p.radius; ++k) {
          const int row = walked_source(p.border, y + k - p.radius, p.height);
          if (row >= 0) down += shared.taps[k] * widen(plane[row * p.width + column]);
        }
        sum += shared.taps[j] * down;
      }
      write(y, i % 2, sum);
    }
  }
};

}  // namespace cuda
}  // namespace msvq
