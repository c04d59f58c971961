// How the multi-scale loss's streaming CUDA kernel cuts a tensor into strips.
#pragma once
#include <cstdint>

#include "gaussian_blur/gaussian_blur_cuda.h"
#include "multiscale_loss/multiscale_loss.h"

namespace msvq {

constexpr int kMaxLossBlocks = 4096;  // each leaves kMaxScales sums in `partials`

namespace cuda {

constexpr int kLossThreads = 256;  // of the kernels around the streaming one
// Two blocks of kStripThreads share a multiprocessor, or one of kWideStripThreads has it. Multiples
// of 128: the four schedulers of a multiprocessor then have as many warps each.
constexpr int kStripThreads = 384;
constexpr int kWideStripThreads = 768;

struct LossTensors {
  const void* x;
  const void* contributions[kMaxScales];
  void* grads[kMaxScales];
  float factors[kMaxScales];  // of the differences in the gradients
  const float* upstream;
  double* partials;
};

// Level l of a strip is x blurred l times; the last is the coarsest target. Pixel 0 of a strip has
// place lead[l] in the lines of level l, a multiple of 4. Every level has lines of one length.
struct LossStrips {
  ImageType x_type, type;
  Border border;
  int radius, levels, pixels, channels, threads;  // levels: how many blurs
  int line, row, lead[kMaxScales];                // words of a channel's line; of a row
  int ring[kMaxScales], base[kMaxScales];         // rows kept; first word
  int wide[kMaxScales], column[kMaxScales];       // outputs per channel in eights; first of a row's
  int columns, blurred_row, words;
  int elements, own_elements;  // of a row: of x with what is around the strip; of the strip
  bool quads;                  // four neighbours are read and written at once
  int pitch;                   // elements of a row of the tensor
  int64_t planes, height, width, inner;
  int64_t count_x, count_channels, strips;
  int64_t units, around;  // kRows rows of a strip; units that beginning inside a plane costs
};

template <int kRadius>
struct StreamParams : LossTensors {
  LossStrips strips;
  float taps[kRadius + 1];  // by their distance from the middle
};

// A thread takes up to so many quads of a step's rows of x, and of the contributions.
constexpr int staged_quads(int num_scales) { return num_scales == 2 ? 3 : 2; }
constexpr int compared_quads(int num_scales) { return num_scales == 2 ? 2 : 1; }

inline int eights(int n) { return (n + 7) / 8 * 8; }
inline int fours(int n) { return (n + 3) / 4 * 4; }

inline int loss_shared_bytes(const LossStrips& s) {
  const int words = s.words + 8 * s.blurred_row + 2 * s.elements + s.own_elements;
  return words * 4 + 16 * 8 + s.threads * 8;
}

// Lays out strips of `pixels` columns; false if a block has too few threads for them.
inline bool lay_out(LossStrips& s, int threads, int channels, int pixels) {
  const int last = s.levels, lead = fours(s.radius);
  s.threads = threads, s.channels = channels, s.pixels = pixels;
  s.columns = s.words = 0;
  for (int l = last; l >= 0; --l) s.lead[l] = (last - l) * lead;
  for (int l = 1; l <= last; ++l) {
    s.wide[l] = eights(pixels + s.lead[l] + (last - l) * s.radius);
    s.column[l] = s.columns;
    s.columns += channels * s.wide[l];
  }
  // The last 8 outputs of a line read 2 * radius + 8 values from a multiple of 4 on.
  s.line = s.wide[1] - 8 + fours(lead + s.radius + 8);
  if (s.line < pixels + 2 * s.lead[0]) s.line = pixels + 2 * s.lead[0];
  s.line = eights(s.line);
  // 4 words past a multiple of 8: 16-byte accesses of 4 neighbours on two rows meet in no bank.
  s.row = channels * s.line + 4;
  for (int l = 0; l <= last; ++l) {
    s.ring[l] = l == 0 ? 16 : eights((last - l) * (8 + s.radius) + 8);
    s.base[l] = s.words;
    s.words += s.ring[l] * s.row;
  }
  s.blurred_row = s.columns + 4;
  s.elements = channels * (pixels + 2 * s.lead[0]);
  s.own_elements = channels * pixels;
  return s.columns <= threads && 2 * s.elements <= staged_quads(last + 1) * threads &&
         2 * s.own_elements <= compared_quads(last + 1) * threads;
}

// The widest strips of which `room` bytes of shared memory hold one, none wider than the image.
inline bool widest(LossStrips& s, int threads, int room) {
  for (int channels = static_cast<int>(s.inner < 4 ? s.inner : 4); channels > 0; --channels) {
    const int64_t most = threads / channels / 8 * 8;
    for (int pixels = static_cast<int>(s.width < most ? (s.width + 7) / 8 * 8 : most); pixels > 0;
         pixels -= 8) {
      if (!lay_out(s, threads, channels, pixels) || loss_shared_bytes(s) > room) continue;
      if (pixels < 16 && s.width > 8 && channels > 1) break;  // fewer channels waste less
      s.count_x = (s.width + pixels - 1) / pixels;
      lay_out(s, threads, channels, eights(static_cast<int>((s.width - 1) / s.count_x + 1)));
      s.count_x = (s.width + s.pixels - 1) / s.pixels;
      s.count_channels = (s.inner + channels - 1) / channels;
      return true;
    }
  }
  return false;
}

inline bool in_quads(const MultiscaleLossParams& g, const LossStrips& s) {
  bool quads = s.channels == s.inner && s.pitch % 4 == 0;
  const auto check = [&](const void* tensor, ImageType type) {
    const uintptr_t bytes = type == ImageType::float32 ? 16 : type == ImageType::uint8 ? 4 : 8;
    quads = quads && reinterpret_cast<uintptr_t>(tensor) % bytes == 0;
  };
  check(g.x, g.x_type);
  for (int64_t m = 0; m < g.num_scales; ++m)
    check(g.contributions[m], g.type), check(g.grads[m], g.type);
  return quads;
}

// Cuts for blocks of at most `room` bytes of shared memory; false if that is too little.
inline bool cut(const MultiscaleLossParams& g, int64_t, int room, LossStrips& s) {
  s.x_type = g.x_type, s.type = g.type, s.border = g.border;
  s.levels = static_cast<int>(g.num_scales) - 1;
  s.radius = static_cast<int>(g.radius);
  s.planes = g.planes, s.height = g.height, s.width = g.width, s.inner = g.inner;
  s.pitch = static_cast<int>(g.width * g.inner);
  LossStrips wide = s;
  // The driver keeps 1 KiB of every block's share.
  const bool fits = widest(s, kStripThreads, room / 2 - 1024);
  const bool wide_fits = widest(wide, kWideStripThreads, room);
  if (!fits && !wide_fits) return false;
  const auto warps = [](const LossStrips& strips) {
    return strips.count_x * strips.count_channels * ((strips.columns + 31) / 32);
  };
  // Two blocks wait for their barriers at different times: worth a tenth.
  if (!fits || (wide_fits && 11 * warps(wide) < 10 * warps(s))) s = wide;
  s.quads = in_quads(g, s);
  s.strips = s.planes * s.count_x * s.count_channels;
  s.units = (s.height + 7) / 8;
  s.around = (2 * s.levels * s.radius + 7) / 8;
  return true;
}

// Blocks that share the strips on a device with room for `pairs` blocks of half a multiprocessor.
inline int64_t loss_blocks(const LossStrips& s, int64_t pairs) {
  int64_t blocks = s.threads == kStripThreads || pairs < 2 ? pairs : pairs / 2;
  if (blocks > kMaxLossBlocks) blocks = kMaxLossBlocks;
  return blocks < s.strips * s.units ? blocks : s.strips * s.units;
}

inline void set_tensors(const MultiscaleLossParams& g, LossTensors& t) {
  t.x = g.x;
  for (int64_t m = 0; m < g.num_scales; ++m) {
    t.contributions[m] = g.contributions[m];
    t.grads[m] = g.grads[m];
    t.factors[m] = static_cast<float>(2 * g.weights[m] * g.grad_factor);
  }
  t.upstream = g.upstream;
  t.partials = g.partials;
}

template <int kRadius>
bool loss_params(const MultiscaleLossParams& g, int64_t blocks, int room,
                 StreamParams<kRadius>& params) {
  if (!cut(g, blocks, room, params.strips)) return false;
  set_tensors(g, params);
  for (int j = 0; j <= kRadius; ++j) params.taps[kRadius - j] = g.taps[j];
  return true;
}

}  // namespace cuda
}  // namespace msvq
