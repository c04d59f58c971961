// How the multi-scale loss's CUDA kernel for rows of whole quads cuts a tensor into strips.
#pragma once
#include <cstdint>

#include "multiscale_loss/multiscale_loss_cuda.h"

namespace msvq {
namespace cuda {

// Threads of a multiprocessor, in one block or several: as many as leave each the registers that
// the sums of a column need.
constexpr int quad_threads(int radius, int num_scales) {
  return radius > 15 || (radius == 15 && num_scales == 2) ? 512 : 640;
}
constexpr int kWarp = 32;
constexpr int kWarpRow = kWarp + 4;  // words: 16-byte stores to two rows meet in no bank
constexpr int kNoLevel = 31, kNoRow = 0x7fff;

// Level l of a strip is x blurred l times; the last is the coarsest target. A ring of rows in
// shared memory holds each level until the contributions meet it. Pixel 0 of a strip has place
// lead[l] in the lines of level l, a multiple of 4.
struct QuadStrips {
  ImageType x_type, type;
  Border border;
  int levels, radius, pixels, channels;      // levels: how many blurs
  int threads, together;                     // of a block; blocks on a multiprocessor
  int line, row, lead[kMaxScales];           // words of a channel's line; of a row
  int ring[kMaxScales], base[kMaxScales];    // words kept of a level; first word
  int wide[kMaxScales], column[kMaxScales];  // outputs per channel in eights; first of a row's
  int columns, words, tasks;                 // words of the threads' tasks
  int elements, own_elements;                // values of a row of x; of the strip
  int pitch;                                 // elements of a row of the tensor
  int height, width, count_x, strips;
  int blocks, share, rest;  // units of a block; blocks that have one more
  int units, around;        // kRows rows of a strip; units that beginning inside a plane costs
};

template <int kRadius>
struct QuadParams {
  const void* x;
  const void* contributions[kMaxScales];
  void* grads[kMaxScales];
  QuadStrips strips;
  float taps[kRadius + 1];    // by their distance from the middle
  float factors[kMaxScales];  // of the differences in the gradients
  const float* upstream;
  double* partials;
};

// Quads of a step's rows of x, and of the contributions, that a thread takes at most.
constexpr int kStagedQuads = 2, kComparedQuads = 1;
constexpr int kThreadTasks = 3 + 2 * kStagedQuads + kComparedQuads;

inline int fours(int n) { return (n + 3) / 4 * 4; }

inline int quad_shared_bytes(const QuadStrips& s) {
  const int words =
      s.words + s.threads / kWarp * 8 * kWarpRow + 2 * s.elements + s.tasks + kMaxScales;
  return words * 4 + 16 * 8 + (s.levels + 1) * s.threads * 8;
}

// Lays out strips of `pixels` columns; false if blocks would need more threads or shared memory
// than a multiprocessor has.
inline bool lay_out(QuadStrips& s, int pixels, int room) {
  const int last = s.levels, lead = fours(s.radius);
  s.pixels = pixels;
  s.tasks = kThreadTasks * quad_threads(s.radius, s.levels + 1);
  s.columns = s.words = 0;
  for (int l = 0; l <= last; ++l) s.lead[l] = (last - l) * lead;
  for (int l = 1; l <= last; ++l) {
    s.wide[l] = eights(pixels + s.lead[l] + (last - l) * s.radius);
    s.column[l] = s.columns;
    s.columns += s.channels * s.wide[l];
  }
  // The last 8 outputs of a line read 2 * radius + 8 values from a multiple of 4 on.
  s.line = eights(s.wide[1] - 8 + fours(lead + s.radius + 8));
  if (s.line < pixels + 2 * s.lead[0]) s.line = eights(pixels + 2 * s.lead[0]);
  // 4 words past a multiple of 8: 16-byte accesses of 4 neighbours on two rows meet in no bank.
  s.row = s.channels * s.line + 4;
  for (int l = 0; l <= last; ++l) {
    // What is compared lies behind what is blurred along, and that behind what is being written.
    s.ring[l] = (l == 0 ? 16 : eights((last - l) * (8 + s.radius) + 16)) * s.row;
    s.base[l] = s.words;
    s.words += s.ring[l];
  }
  s.elements = s.channels * (pixels + 2 * s.lead[0]);
  s.own_elements = s.channels * pixels;
  const int quads = 2 * s.elements / kStagedQuads;
  const int own_quads = 2 * s.own_elements / kComparedQuads;
  s.threads = s.columns > quads ? s.columns : quads;
  s.threads = ((s.threads > own_quads ? s.threads : own_quads) + kWarp - 1) / kWarp * kWarp;
  const int most = quad_threads(s.radius, s.levels + 1), bytes = quad_shared_bytes(s);
  // The driver keeps 1 KiB of every block's share.
  const int by_room = (room + 1024) / (bytes + 1024);
  s.together = most / s.threads < by_room ? most / s.threads : by_room;
  s.count_x = (s.width + pixels - 1) / pixels;
  return s.together > 0;
}

// Time of a row of strips, in warps: a multiprocessor needs some to hide latencies, and one block
// alone waits at its barriers.
inline double strips_time(const QuadStrips& s) {
  const double warps = s.threads / kWarp, busy = warps * s.together;
  return s.count_x * warps * (s.together == 1 ? 1.1 : 1.0) * (busy < 16 ? 16 / busy : 1.0);
}

// Whether rows are of whole quads, and scales and x such as the kernel is compiled for.
inline bool in_quads(const MultiscaleLossParams& g) {
  if (g.num_scales != 2 && g.num_scales != 3) return false;
  const int64_t pitch = g.width * g.inner;
  // Offsets within eight rows are 32 bits wide, rows 15.
  bool quads = pitch % 4 == 0 && pitch < int64_t{1} << 26 && g.height < kNoRow - 1024;
  quads = quads &&
          (g.x_type == g.type || g.x_type == ImageType::float32 || g.x_type == ImageType::uint8);
  const auto check = [&](const void* tensor, ImageType type) {
    const uintptr_t bytes = type == ImageType::float32 ? 16 : type == ImageType::uint8 ? 4 : 8;
    quads = quads && reinterpret_cast<uintptr_t>(tensor) % bytes == 0;
  };
  check(g.x, g.x_type);
  for (int64_t m = 0; m < g.num_scales; ++m)
    check(g.contributions[m], g.type), check(g.grads[m], g.type);
  return quads;
}

// Cuts for blocks of at most `room` bytes of shared memory; false if that is too little, or if rows
// are not of whole quads.
inline bool cut(const MultiscaleLossParams& g, int room, QuadStrips& s) {
  if (!in_quads(g)) return false;
  s.x_type = g.x_type, s.type = g.type, s.border = g.border;
  s.levels = static_cast<int>(g.num_scales) - 1, s.radius = static_cast<int>(g.radius);
  s.height = static_cast<int>(g.height), s.width = static_cast<int>(g.width);
  s.channels = static_cast<int>(g.inner), s.pitch = static_cast<int>(g.width * g.inner);
  const int most = quad_threads(s.radius, s.levels + 1);
  double best = 0;
  int pixels = 0;
  for (int p = s.width < most ? eights(s.width) : most; p > 0; p -= 8) {
    if (p < 32 && p < s.width) break;  // most of a strip would be halo
    const bool even = p == eights((s.width - 1) / ((s.width + p - 1) / p) + 1);
    if (!even || !lay_out(s, p, room)) continue;
    if (pixels == 0 || strips_time(s) < best) best = strips_time(s), pixels = p;
  }
  if (pixels == 0) return false;
  lay_out(s, pixels, room);
  s.units = (s.height + 7) / 8;
  s.around = (2 * s.levels * s.radius + 7) / 8;
  const int64_t strips = g.planes * s.count_x;
  s.strips = static_cast<int>(strips);
  return strips * (s.units + s.around) < int64_t{1} << 31;
}

// Shares the strips among the blocks that a device with `pairs` halves of multiprocessors runs.
inline void share_out(QuadStrips& s, int64_t pairs) {
  int64_t blocks = pairs * s.together / 2;
  if (blocks < 1) blocks = 1;
  if (blocks > kMaxLossBlocks) blocks = kMaxLossBlocks;
  const int64_t most = int64_t{s.strips} * s.units;
  s.blocks = static_cast<int>(blocks < most ? blocks : most);
  const int units = s.strips * (s.around + s.units);
  s.share = units / s.blocks, s.rest = units % s.blocks;
}

template <int kRadius>
bool quad_params(const MultiscaleLossParams& g, int64_t pairs, int room,
                 QuadParams<kRadius>& params) {
  if (!cut(g, room, params.strips)) return false;
  share_out(params.strips, pairs);
  params.x = g.x;
  for (int64_t m = 0; m < g.num_scales; ++m) {
    params.contributions[m] = g.contributions[m];
    params.grads[m] = g.grads[m];
    params.factors[m] = static_cast<float>(2 * g.weights[m] * g.grad_factor);
  }
  for (int j = 0; j <= kRadius; ++j) params.taps[kRadius - j] = g.taps[j];
  params.upstream = g.upstream;
  params.partials = g.partials;
  return true;
}

}  // namespace cuda
}  // namespace msvq
