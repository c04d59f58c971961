// The multi-scale loss on a CUDA device: a block streams the rows of a strip of columns through all
// blurs at once.
//
// A step takes kRows rows of every level, each kRows + radius rows behind the one it is blurred
// from. Its first phase blurs along the lines, reads the next rows of x, and compares the rows of
// which every level is known with the contributions, whose reads it started before. Its second
// phase blurs down the columns, one per thread, into the rings of the next levels. Borders that
// fold need no care beyond x: a blur of the folded image is the folded blur.
#pragma once
#include "cuda/block.h"
#include "gaussian_blur/gaussian_blur_tile.h"
#include "multiscale_loss/multiscale_loss_cuda.h"

namespace msvq {
namespace cuda {

constexpr int kXParts = 10;  // of a thread's values of the next rows of x, kept in registers
constexpr int kMaxContributionParts = 16;

struct LossShared {
  MSVQ_HOST_DEVICE LossShared(const LossStrips& s, SharedCarver carver)
      : lines(carver.take<float>(s.words)),
        blurred(carver.take<float>(s.blurred_rows * s.blurred_row)),
        source(carver.take<int32_t>(s.elements)),
        place(carver.take<int32_t>(s.elements)),
        rows(carver.take<int64_t>(2 * kRows)),
        sums(carver.take<double>(kLossThreads)) {}
  Shared<float> lines, blurred;
  Shared<int32_t> source, place;  // of every value of a row of x: its offset in memory, in a line
  Shared<int64_t> rows;           // where the rows of this and of the next step begin in the plane
  Shared<double> sums;
};

template <int kRadius>
struct LossState {
  float open[kRadius ? 2 * kRadius : 1];  // sums of the rows that are not complete
  double total[kMaxScales];               // squared differences of every scale
  int along_level, along_from, along_to;  // the level this thread blurs along, -1: none
  int across_level, across_to;            // and across, -1: none
  int64_t across_pixel;
};

template <int kValue>
struct Scales {
  static constexpr int value = kValue;
  // Values of a row per lane: all scales but the finest own columns of the block's threads.
  static constexpr int parts = kLossThreads / (kValue > 2 ? kValue - 1 : 1) / 32 + (kValue == 4);
};

template <int kRadius, class Body>
MSVQ_DEVICE void for_scales(int levels, const Body& body) {
  if constexpr (kRadius == 0) {  // one scale needs no blur: streamed_radius
    if (levels == 0) return body(Scales<1>());
  }
  if (levels == 1) return body(Scales<2>());
  if (levels == 2) return body(Scales<3>());
  body(Scales<4>());
}

MSVQ_DEVICE float image_value(float x, ImageType type) {
  return type == ImageType::uint8 ? x / 127.5f - 1.0f : x;
}

template <int kRadius>
struct LossStream {
  using State = LossState<kRadius>;
  const LossParams<kRadius>& p;
  const LossStrips& s;
  const LossShared shared;
  const int64_t pitch;  // elements of a row of the tensor
  const float scale;    // of the gradients
  int64_t plane, pixel, channel, row, rows, top;
  int channels;

  MSVQ_DEVICE LossStream(const LossParams<kRadius>& params, char* memory)
      : p(params),
        s(params.strips),
        shared(s, SharedCarver{memory, 0}),
        pitch(s.width * s.inner),
        scale(params.upstream ? *params.upstream : 1.0f) {}

  // Runs every `blocks`th task from `first` and leaves the sums of their squared differences.
  MSVQ_DEVICE void run(Block<State>& block, int64_t first, int64_t blocks) {
    block.each([&](int thread, State& state) {
      for (int m = 0; m < kMaxScales; ++m) state.total[m] = 0;
      settle(thread, state);
    });
    for (int64_t task = first; task < s.tasks; task += blocks) run(block, task);
    if (!p.partials) return;
    MSVQ_UNROLL
    for (int m = 0; m < kMaxScales; ++m) {
      if (m > s.levels) continue;
      block.each([&](int thread, State& state) { shared.sums[thread] = state.total[m]; });
      MSVQ_NO_UNROLL
      for (int half = kLossThreads / 2; half > 0; half /= 2)
        block.each([&](int thread, State&) {
          if (thread < half) shared.sums[thread] += shared.sums[thread + half];
        });
      block.each([&](int thread, State&) {
        if (thread == 0) p.partials[first * kMaxScales + m] = shared.sums[0];
      });
    }
  }

  MSVQ_DEVICE void run(Block<State>& block, int64_t task) {
    pixel = task % s.count_x * s.pixels;
    task /= s.count_x;
    row = task % s.count_y * s.rows;
    rows = s.height - row < s.rows ? s.height - row : s.rows;
    task /= s.count_y;
    channel = task % s.count_channels * s.channels;
    channels = static_cast<int>(s.inner - channel < s.channels ? s.inner - channel : s.channels);
    plane = task / s.count_channels;
    top = row - s.levels * s.radius;
    const int steps =
        s.levels + static_cast<int>((rows + 2 * s.levels * s.radius + kRows - 1) / kRows);
    block.each([&](int thread, State& state) {
      prepare(thread, state);
      name_rows(thread, 0);
      name_rows(thread, 1);
    });
    block.each([&](int thread, State&) {
      uint32_t bits[kXParts];
      fetch(thread, 0, bits);
      put(thread, 0, bits);
    });
    MSVQ_NO_UNROLL
    for (int step = 0; step < steps; ++step) {
      const bool more = step + 1 < steps;
      block.each([&](int thread, State& state) {
        uint32_t next[kXParts], values[kMaxContributionParts];
        if (more) fetch(thread, step + 1, next);
        read_contributions(thread, step, values);
        if (more) blur_along(state, step);
        compare(thread, state, step, values);
        if (more) put(thread, step + 1, next);
      });
      block.each([&](int thread, State& state) {
        name_rows(thread, step + 2);
        if (more) blur_across(state, step, thread);
      });
    }
  }

  // What a thread blurs is the same for every task.
  MSVQ_DEVICE void settle(int thread, State& state) const {
    const int rest = thread / 8;
    const int r = thread / 4 % 2 + 2 * (rest % 4), b = thread % 4 + 4 * (rest / 4);
    state.along_level = state.across_level = -1;
    for (int l = 0; l < s.levels; ++l) {
      const int first = s.column[l + 1], wide = s.wide[l + 1], end = first + s.channels * wide;
      const int along = b * kRows;
      if (along >= first && along < end) {
        const int c = (along - first) / wide, x = (along - first) % wide;
        state.along_level = l;
        state.along_from = s.base[l] + r * s.row[l] + c * s.line[l] + x;
        state.along_to = along + r * s.blurred_row;
      }
      if (thread >= first && thread < end) {
        const int c = (thread - first) / wide, x = (thread - first) % wide;
        state.across_level = l;
        state.across_to = s.base[l + 1] + c * s.line[l + 1] + x;
        state.across_pixel = x - (s.levels - l - 1) * s.radius;
        if (x >= s.pixels + 2 * s.radius * (s.levels - l - 1)) state.across_level = -1;
      }
    }
  }

  MSVQ_DEVICE void prepare(int thread, State& state) const {
    for (int i = thread; i < s.elements; i += kLossThreads) {
      const int c = i % s.channels, x = i / s.channels;
      const int64_t from = border_source(s.border, pixel + x - s.levels * s.radius, s.width);
      const bool there = from >= 0 && c < channels;
      shared.source[i] = there ? static_cast<int32_t>(from * s.inner + c) : -1;
      shared.place[i] = c * s.line[0] + x;
    }
    // The ends of the lines are read by the last outputs and belong to none that is kept.
    for (int i = thread; i < s.words; i += kLossThreads) shared.lines[i] = 0;
    for (int j = 0; j < (kRadius ? 2 * kRadius : 1); ++j) state.open[j] = 0;
  }

  // Once per step: the fold at the border divides. -1 is a row of zeros.
  MSVQ_DEVICE void name_rows(int thread, int step) const {
    if (thread >= kRows) return;
    const int64_t y = top + int64_t{step} * kRows + thread;
    const bool needed = y < row + rows + s.levels * s.radius;
    const int64_t from = needed ? border_source(s.border, y, s.height) : -1;
    shared.rows[step % 2 * kRows + thread] = from < 0 ? -1 : from * pitch;
  }

  template <class T>
  MSVQ_DEVICE uint32_t read(const T* from, int64_t line, int i) const {
    return read_bits(from + plane * s.height * pitch + channel + line + shared.source[i]);
  }
  MSVQ_DEVICE bool is_there(int64_t line, int i) const {
    return line >= 0 && shared.source[i] >= 0;
  }

  // A warp reads a row, 32 neighbouring values at a time.
  MSVQ_DEVICE void fetch(int thread, int step, uint32_t (&bits)[kXParts]) const {
    const int64_t line = shared.rows[step % 2 * kRows + thread / 32];
    for_type(s.x_type, [&](auto type) {
      const auto* from = static_cast<const typename decltype(type)::type*>(p.x);
      MSVQ_UNROLL
      for (int k = 0; k < kXParts; ++k) {
        const int i = thread % 32 + 32 * k;
        bits[k] = i < s.elements && is_there(line, i) ? read(from, line, i) : 0;
      }
    });
  }

  MSVQ_DEVICE void put(int thread, int step, const uint32_t (&bits)[kXParts]) const {
    const int r = thread / 32;
    const int64_t line = shared.rows[step % 2 * kRows + r];
    const int to = s.base[0] + (step * kRows % s.ring[0] + r) * s.row[0];
    for_type(s.x_type, [&](auto type) {
      using T = typename decltype(type)::type;
      const auto place = [&](int i, uint32_t value) {
        const float x = image_value(widen_bits<T>(value), s.x_type);
        shared.lines[to + shared.place[i]] = is_there(line, i) ? x : 0.0f;
      };
      MSVQ_UNROLL
      for (int k = 0; k < kXParts; ++k) {
        const int i = thread % 32 + 32 * k;
        if (i < s.elements) place(i, bits[k]);
      }
      MSVQ_NO_UNROLL
      for (int i = thread % 32 + 32 * kXParts; i < s.elements; i += 32)
        place(i, is_there(line, i) ? read(static_cast<const T*>(p.x), line, i) : 0);
    });
  }

  MSVQ_DEVICE void blur_along(const State& state, int step) const {
    const int level = state.along_level;
    if (level < 0 || step < level) return;
    const int i = (step - level) * kRows;
    float sum[kRows] = {};
    correlate_line<kRadius>(p.taps, s.radius, shared.lines,
                            state.along_from + i % s.ring[level] * s.row[level], sum);
    const int to = state.along_to + slot(i) * s.blurred_row;
    store_quad(shared.blurred, to, sum);
    store_quad(shared.blurred, to + 4, sum + 4);
  }

  MSVQ_DEVICE int slot(int i) const { return kRadius ? 0 : i % s.blurred_rows; }

  MSVQ_DEVICE void blur_across(State& state, int step, int thread) const {
    const int level = state.across_level;
    if (level < 0 || step < level) return;
    const int i = (step - level) * kRows;
    float done[kRows];
    if constexpr (kRadius > 0) {
      float value[kRows];
      MSVQ_UNROLL
      for (int r = 0; r < kRows; ++r) value[r] = shared.blurred[r * s.blurred_row + thread];
      add_rows<kRadius>(p.taps, value, state.open, done);
    } else {
      sum_rows(i, top - level * s.radius + i, thread, done);
    }
    const int64_t x = pixel + state.across_pixel;
    const bool inside_x = x >= 0 && x < s.width;
    if (s.border == Border::replicate && !inside_x) return;
    const int64_t y = top - (level + 1) * s.radius + i;
    const int to = state.across_to + i % s.ring[level + 1] * s.row[level + 1];
    MSVQ_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const bool inside = inside_x && y + r >= 0 && y + r < s.height;
      const float value = s.border == Border::constant && !inside ? 0.0f : done[r];
      shared.lines[to + r * s.row[level + 1]] = value;
      if (s.border == Border::replicate)
        repeat_edge(level + 1, x, to + r * s.row[level + 1], value);
    }
  }

  // The first and the last pixel of a line also stand for those outside.
  MSVQ_DEVICE void repeat_edge(int level, int64_t x, int at, float value) const {
    const int beyond = (s.levels - level) * s.radius;
    const int64_t left = pixel - beyond, right = pixel + s.pixels + beyond;
    if (x == 0)
      for (int64_t i = left; i < 0; ++i) shared.lines[at + static_cast<int>(i)] = value;
    if (x == s.width - 1)
      for (int64_t i = s.width; i < right; ++i) shared.lines[at + static_cast<int>(i - x)] = value;
  }

  // Sums from a ring whose newest rows are i to i + kRows - 1 of the task, y and on of the image.
  MSVQ_DEVICE void sum_rows(int i, int64_t y, int thread, float (&done)[kRows]) const {
    for (int r = 0; r < kRows; ++r) done[r] = 0;
    MSVQ_NO_UNROLL
    for (int j = 0; j < 2 * s.radius + kRows; ++j) {
      int64_t line = i - 2 * s.radius + j;
      if (s.border == Border::replicate) {
        const int64_t at = y - 2 * s.radius + j;
        line += at < 0 ? -at : at >= s.height ? s.height - 1 - at : 0;
      }
      if (line < 0 || line >= i + kRows) continue;  // not a row of this task yet
      const float value =
          shared.blurred[static_cast<int>(line) % s.blurred_rows * s.blurred_row + thread];
      MSVQ_UNROLL
      for (int r = 0; r < kRows; ++r)
        if (j >= r && j - r <= 2 * s.radius) done[r] += tap_at(p.taps, s.radius, j - r) * value;
    }
  }

  // The row of the coarsest level's step, which this thread's warp compares; -1 is none.
  MSVQ_DEVICE int64_t compared_row(int thread, int step) const {
    const int64_t y = top - s.levels * s.radius + int64_t{step - s.levels} * kRows + thread / 32;
    return step >= s.levels && y >= row && y < row + rows ? y : -1;
  }
  // Part k of a row: the offset in memory from the row's start, and channel and pixel; -1 is none.
  MSVQ_DEVICE int64_t element(int thread, int k, int& c, int& x) const {
    const int i = thread % 32 + 32 * k;
    c = s.channels == 1 ? 0 : i % s.channels;
    x = s.channels == 1 ? i : i / s.channels;
    if (x >= s.pixels || pixel + x >= s.width || c >= channels) return -1;
    return (pixel + x) * s.inner + channel + c;
  }

  MSVQ_DEVICE void read_contributions(int thread, int step,
                                      uint32_t (&values)[kMaxContributionParts]) const {
    const int64_t y = compared_row(thread, step);
    if (y < 0) return;
    const int64_t line = (plane * s.height + y) * pitch;
    for_scales<kRadius>(s.levels, [&](auto scales) {
      using S = decltype(scales);
      for_float_type(s.type, [&](auto type) {
        using T = typename decltype(type)::type;
        MSVQ_UNROLL
        for (int k = 0; k < S::parts; ++k) {
          int c, x;
          const int64_t at = element(thread, k, c, x);
          MSVQ_UNROLL
          for (int m = 0; m < S::value; ++m) {
            const T* from = static_cast<const T*>(p.contributions[m]);
            values[k * S::value + m] = at < 0 ? 0 : read_bits(from + line + at);
          }
        }
      });
    });
  }

  MSVQ_DEVICE void compare(int thread, State& state, int step,
                           const uint32_t (&values)[kMaxContributionParts]) const {
    const int64_t y = compared_row(thread, step);
    if (y < 0) return;
    const int64_t line = (plane * s.height + y) * pitch;
    for_scales<kRadius>(s.levels, [&](auto scales) {
      using S = decltype(scales);
      constexpr int kM = S::value;
      int from[kM];  // of every scale's target
      MSVQ_UNROLL
      for (int m = 0; m < kM; ++m) {
        const int level = kM - 1 - m, behind = m * s.radius;
        const int i = (step - s.levels) * kRows - behind + thread / 32;
        from[m] = s.base[level] + i % s.ring[level] * s.row[level] + behind;
      }
      for_float_type(s.type, [&](auto type) {
        using T = typename decltype(type)::type;
        float squares[kM] = {};
        MSVQ_UNROLL
        for (int k = 0; k < S::parts; ++k) {
          int c, x;
          const int64_t at = element(thread, k, c, x);
          if (at < 0) continue;
          float sum = 0, difference[kM];
          MSVQ_UNROLL
          for (int m = 0; m < kM; ++m) {
            sum += widen_bits<T>(values[k * kM + m]);
            difference[m] = sum - shared.lines[from[m] + c * s.line[kM - 1 - m] + x];
            squares[m] += difference[m] * difference[m];
          }
          float grad = 0;
          MSVQ_UNROLL
          for (int m = kM - 1; m >= 0; --m) {
            grad += p.factors[m] * difference[m];
            if (p.grads[m]) narrow(grad * scale, static_cast<T*>(p.grads[m]) + line + at);
          }
        }
        MSVQ_UNROLL
        for (int m = 0; m < kM; ++m) state.total[m] += squares[m];
      });
    });
  }
};

}  // namespace cuda
}  // namespace msvq
