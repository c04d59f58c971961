// The multi-scale loss on a CUDA device: a block streams the rows of a strip of columns through all
// blurs at once.
//
// A step takes kRows rows of every level, each kRows + radius rows behind the one it is blurred
// from. Its first phase blurs along the lines and compares the rows of which every level is known
// with the contributions, whose reads it started before. Its second phase blurs down the columns,
// one per thread, into the rings of the next levels, and reads the next rows of x. Borders that
// fold need no care beyond x: a blur of the folded image is the folded blur.
#pragma once
#include "cuda/block.h"
#include "gaussian_blur/gaussian_blur_tile.h"
#include "multiscale_loss/multiscale_loss_strips.h"
#include "multiscale_loss/quads.h"

namespace msvq {
namespace cuda {

struct LossShared {
  MSVQ_HOST_DEVICE LossShared(const LossStrips& s, SharedCarver carver)
      : lines(carver.take<float>(s.words)),
        blurred(carver.take<float>(kRows * s.blurred_row)),
        source(carver.take<int32_t>(s.elements)),
        place(carver.take<int32_t>(s.elements)),
        own(carver.take<int32_t>(s.own_elements)),
        rows(carver.take<int64_t>(2 * kRows)),
        sums(carver.take<double>(s.threads)) {}
  Shared<float> lines, blurred;
  // Of every value of a row of x and of the strip, as they lie in memory: the offset from the row's
  // start, -1 for none; and the place in the lines.
  Shared<int32_t> source, place, own;
  Shared<int64_t> rows;  // where the rows of this and of the next step begin in the plane
  Shared<double> sums;
};

template <int kRadius, int kScales>
struct LossState {
  float open[2 * kRadius];                            // sums of the rows that are not complete
  float total[kScales];                               // squared differences of every scale
  int along_level, along_from, along_to, along_ring;  // the level this thread blurs along, -1: none
  int across_level, across_to, across_x, across_ring;  // and across
  int staged[staged_quads(kScales)];  // row << 16 | quad of x that this thread reads, -1: none
  int compared[compared_quads(kScales)];
};

// correlate_line from the multiple of 4 at or before the first value.
template <int kRadius>
MSVQ_DEVICE void correlate_quads(const float* half, const Shared<float>& lines, int from,
                                 float (&sum)[kRows]) {
  constexpr int kBefore = (4 - kRadius % 4) % 4;
  MSVQ_UNROLL
  for (int quad = 0; quad < 2 * kRadius + kRows + kBefore; quad += 4) {
    float word[4];
    load_quad(lines, from + quad, word);
    MSVQ_UNROLL
    for (int k = 0; k < 4; ++k) {
      MSVQ_UNROLL
      for (int i = 0; i < kRows; ++i) {
        const int j = quad + k - kBefore - i;
        if (j >= 0 && j <= 2 * kRadius) sum[i] += tap_at(half, kRadius, j) * word[k];
      }
    }
  }
}

template <int kRadius, int kScales>
struct LossStream {
  using State = LossState<kRadius, kScales>;
  using Params = StreamParams<kRadius>;
  static constexpr int kMaxThreads = kWideStripThreads, kBlocks = 1;  // of the launch
  static constexpr int kLevels = kScales - 1;
  static constexpr int kStaged = staged_quads(kScales), kCompared = compared_quads(kScales);

  const Params& p;
  const LossStrips& s;
  const LossShared shared;
  const float scale;  // of the gradients
  int64_t pixel, channel, row, rows, top;
  int64_t origin;  // of the plane's channels in the tensors
  int channels;
  int newest[kScales];  // first row in every level's ring of those to compare

  MSVQ_DEVICE LossStream(const Params& params, char* memory)
      : p(params),
        s(params.strips),
        shared(s, SharedCarver{memory, 0}),
        scale(params.upstream ? *params.upstream : 1.0f) {}

  // Runs the share of block `first` of `blocks` and leaves the sums of its squared differences.
  MSVQ_DEVICE void run(Block<State>& block, int64_t first, int64_t blocks) {
    block.each([&](int thread, State& state) {
      for (int m = 0; m < kScales; ++m) state.total[m] = 0;
      settle(thread, state);
    });
    const int64_t cost = s.around + s.units, end = s.strips * cost * (first + 1) / blocks;
    for (int64_t at = s.strips * cost * first / blocks; at < end;) {
      const int64_t strip = at / cost, begin = strip * cost + s.around;
      const int64_t from = at < begin ? 0 : at - begin;
      at = begin + s.units < end ? begin + s.units : end;
      if (at > begin + from) run_strip(block, strip, from * kRows, (at - begin) * kRows);
    }
    if (!p.partials) return;
    MSVQ_UNROLL
    for (int m = 0; m < kScales; ++m) {
      block.each([&](int thread, State& state) { shared.sums[thread] = state.total[m]; });
      block.each([&](int thread, State&) {
        if (thread >= 32) return;
        double sum = 0;
        MSVQ_NO_UNROLL
        for (int i = thread; i < s.threads; i += 32) sum += shared.sums[i];
        shared.sums[thread] = sum;
      });
      block.each([&](int thread, State&) {
        if (thread != 0) return;
        double sum = 0;
        MSVQ_NO_UNROLL
        for (int i = 0; i < 32; ++i) sum += shared.sums[i];
        p.partials[first * kMaxScales + m] = sum;
      });
    }
  }

  // Rows `from` to `to`, as far as there are, of a strip.
  MSVQ_DEVICE void run_strip(Block<State>& block, int64_t strip, int64_t from, int64_t to) {
    pixel = strip % s.count_x * s.pixels;
    strip /= s.count_x;
    channel = strip % s.count_channels * s.channels;
    channels = static_cast<int>(s.inner - channel < s.channels ? s.inner - channel : s.channels);
    origin = strip / s.count_channels * s.height * s.pitch + channel;
    row = from;
    rows = (to < s.height ? to : s.height) - from;
    top = row - kLevels * kRadius;
    MSVQ_UNROLL
    for (int l = 1; l < kLevels; ++l) {
      const int behind = kLevels * kRows + (kLevels - l) * kRadius;
      newest[l] = s.ring[l] - 1 - (behind - 1) % s.ring[l];
    }
    const int steps =
        kLevels + static_cast<int>((rows + 2 * kLevels * kRadius + kRows - 1) / kRows);
    block.each([&](int thread, State& state) {
      prepare(thread, state);
      name_rows(thread, 0);
      name_rows(thread, 1);
    });
    block.each([&](int, State& state) {
      uint32_t bits[kStaged][4];
      fetch(state, 0, bits);
      put(state, 0, bits);
    });
    MSVQ_NO_UNROLL
    for (int step = 0; step < steps; ++step) {
      const bool more = step + 1 < steps;
      block.each([&](int, State& state) {
        uint32_t values[kCompared][kScales][4], x[kCompared][4];
        read_contributions(state, step, values, x);
        if (more) blur_along(state, step);
        compare(state, step, values, x);
      });
      MSVQ_UNROLL
      for (int l = 1; l < kLevels; ++l)
        newest[l] =
            newest[l] + kRows < s.ring[l] ? newest[l] + kRows : newest[l] + kRows - s.ring[l];
      if (!more) break;
      block.each([&](int thread, State& state) {
        uint32_t next[kStaged][4];
        fetch(state, step + 1, next);
        name_rows(thread, step + 2);
        blur_across(state, step, thread);
        put(state, step + 1, next);
      });
    }
  }

  // What a thread does is the same for every strip.
  MSVQ_DEVICE void settle(int thread, State& state) const {
    const int rest = thread / 8;
    const int r = thread / 4 % 2 + 2 * (rest % 4), b = thread % 4 + 4 * (rest / 4);
    state.along_level = state.across_level = -1;
    for (int l = 0; l < kLevels; ++l) {
      const int first = s.column[l + 1], wide = s.wide[l + 1], end = first + s.channels * wide;
      const int along = b * kRows;
      if (along >= first && along < end) {
        const int c = (along - first) / wide, x = (along - first) % wide;
        state.along_level = l;
        state.along_from = s.base[l] + r * s.row + c * s.line + x;
        state.along_to = along + r * s.blurred_row;
      }
      if (thread >= first && thread < end) {
        const int c = (thread - first) / wide, x = (thread - first) % wide;
        state.across_level = l;
        state.across_to = s.base[l + 1] + c * s.line + x;
        state.across_x = x - s.lead[l + 1];
      }
    }
    const auto quad_of = [&](int k, int elements) {
      const int i = thread + k * s.threads, quads = elements / 4;
      return i < kRows * quads ? i / quads << 16 | i % quads : -1;
    };
    for (int k = 0; k < kStaged; ++k) state.staged[k] = quad_of(k, s.elements);
    for (int k = 0; k < kCompared; ++k) state.compared[k] = quad_of(k, s.own_elements);
  }

  MSVQ_DEVICE void prepare(int thread, State& state) const {
    for (int i = thread; i < s.elements; i += s.threads) {
      const int c = i % s.channels, x = i / s.channels;
      const int64_t from = border_source(s.border, pixel + x - s.lead[0], s.width);
      const bool there = from >= 0 && c < channels;
      shared.source[i] = there ? static_cast<int32_t>(from * s.inner + c) : -1;
      shared.place[i] = c * s.line + x;
      if (i >= s.own_elements) continue;
      const bool mine = c < channels && pixel + x < s.width;
      shared.own[i] = mine ? static_cast<int32_t>((pixel + x) * s.inner + c) : -1;
    }
    for (int j = 0; j < 2 * kRadius; ++j) state.open[j] = 0;
    state.along_ring = state.across_ring = 0;
  }

  // Once per step: the fold at the border divides. -1 is a row of zeros.
  MSVQ_DEVICE void name_rows(int thread, int step) const {
    if (thread >= kRows) return;
    const int64_t y = top + int64_t{step} * kRows + thread;
    const bool needed = y < row + rows + kLevels * kRadius;
    const int64_t from = needed ? border_source(s.border, y, s.height) : -1;
    shared.rows[step % 2 * kRows + thread] = from < 0 ? -1 : from * s.pitch;
  }

  // Whether four values, or none, lie together: a fold turns round or leaves a gap.
  MSVQ_DEVICE bool together(const int (&at)[4]) const {
    return s.quads && at[0] >= 0 && at[3] - at[0] == 3;
  }
  MSVQ_DEVICE int64_t staged_row(int step, int staged) const {
    return shared.rows[step % 2 * kRows + (staged >> 16)];
  }

  MSVQ_DEVICE void fetch(const State& state, int step, uint32_t (&bits)[kStaged][4]) const {
    for_size(s.x_type, [&](auto type) {
      const auto* const x = static_cast<const typename decltype(type)::type*>(p.x) + origin;
      MSVQ_UNROLL
      for (int k = 0; k < kStaged; ++k) {
        const int staged = state.staged[k];
        if (staged < 0) continue;
        const int64_t line = staged_row(step, staged);
        int at[4];
        load_quad(shared.source, (staged & 0xffff) * 4, at);
        if (line >= 0 && together(at)) {
          read_quad<false>(x + line + at[0], bits[k]);
        } else {
          MSVQ_UNROLL
          for (int j = 0; j < 4; ++j)
            bits[k][j] = line < 0 || at[j] < 0 ? 0 : read_bits(x + line + at[j]);
        }
      }
    });
  }

  MSVQ_DEVICE void put(const State& state, int step, const uint32_t (&bits)[kStaged][4]) const {
    for_type(s.x_type, [&](auto type) {
      using T = typename decltype(type)::type;
      MSVQ_UNROLL
      for (int k = 0; k < kStaged; ++k) {
        const int staged = state.staged[k];
        if (staged < 0) continue;
        const int i = (staged & 0xffff) * 4;
        float value[4];
        if constexpr (sizeof(T) == 4) {
          MSVQ_UNROLL
          for (int j = 0; j < 4; ++j) value[j] = widen_bits<T>(bits[k][j]);
        } else {
          int at[4];
          load_quad(shared.source, i, at);
          const bool there = staged_row(step, staged) >= 0, packed = there && together(at);
          MSVQ_UNROLL
          for (int j = 0; j < 4; ++j) {
            value[j] = packed ? quad_value<T>(bits[k], j) : widen_bits<T>(bits[k][j]);
            if (sizeof(T) == 1) value[j] = there && at[j] >= 0 ? value[j] / 127.5f - 1.0f : 0.0f;
          }
        }
        const int to = s.base[0] + (step % 2 * kRows + (staged >> 16)) * s.row;
        if (s.channels == 1) {
          store_quad(shared.lines, to + i, value);
        } else {
          int place[4];
          load_quad(shared.place, i, place);
          MSVQ_UNROLL
          for (int j = 0; j < 4; ++j) shared.lines[to + place[j]] = value[j];
        }
      }
    });
  }

  // Whether a step has rows of a level that anything kept is blurred from.
  MSVQ_DEVICE bool has_rows(int level, int step) const {
    const int i = (step - level) * kRows;
    return i + kRows > 2 * level * kRadius && i < rows + 2 * kLevels * kRadius;
  }
  // Where a level's rows begin in its ring; the next step's follow.
  MSVQ_DEVICE int pass(int& at, int level) const {
    const int now = at, next = at + kRows * s.row;
    at = next == s.ring[level] * s.row ? 0 : next;
    return now;
  }

  MSVQ_DEVICE void blur_along(State& state, int step) const {
    const int level = state.along_level;
    if (level < 0 || step < level) return;
    const int from = state.along_from + pass(state.along_ring, level);
    if (!has_rows(level, step)) return;
    float sum[kRows] = {};
    correlate_quads<kRadius>(p.taps, shared.lines, from, sum);
    store_quad(shared.blurred, state.along_to, sum);
    store_quad(shared.blurred, state.along_to + 4, sum + 4);
  }

  MSVQ_DEVICE void blur_across(State& state, int step, int thread) const {
    const int level = state.across_level;
    if (level < 0 || step < level) return;
    const int to = state.across_to + pass(state.across_ring, level + 1);
    if (!has_rows(level, step)) return;
    float value[kRows], done[kRows];
    MSVQ_UNROLL
    for (int r = 0; r < kRows; ++r) value[r] = shared.blurred[r * s.blurred_row + thread];
    add_rows<kRadius>(p.taps, value, state.open, done);
    if (s.border == Border::constant) {
      const int64_t x = pixel + state.across_x;
      const int64_t y = top - (level + 1) * kRadius + (step - level) * kRows;
      MSVQ_UNROLL
      for (int r = 0; r < kRows; ++r)
        if (x < 0 || x >= s.width || y + r < 0 || y + r >= s.height) done[r] = 0;
    }
    MSVQ_UNROLL
    for (int r = 0; r < kRows; ++r) shared.lines[to + r * s.row] = done[r];
  }

  // The row of the coarsest level's step that a quad is of; -1 is none.
  MSVQ_DEVICE int64_t compared_row(int compared, int step) const {
    const int64_t y = top - kLevels * kRadius + (step - kLevels) * kRows + (compared >> 16);
    return compared >= 0 && y >= row && y < row + rows ? y : -1;
  }

  MSVQ_DEVICE void read_contributions(const State& state, int step,
                                      uint32_t (&values)[kCompared][kScales][4],
                                      uint32_t (&x)[kCompared][4]) const {
    MSVQ_UNROLL
    for (int k = 0; k < kCompared; ++k) {
      const int64_t y = compared_row(state.compared[k], step);
      if (y < 0) continue;
      int own[4];
      load_quad(shared.own, (state.compared[k] & 0xffff) * 4, own);
      const int64_t line = origin + y * s.pitch;
      for_size(s.type, [&](auto type) {
        MSVQ_UNROLL
        for (int m = 0; m < kScales; ++m)
          read_own<true>(type, p.contributions[m], line, own, values[k][m]);
      });
      for_size(s.x_type, [&](auto type) { read_own<false>(type, p.x, line, own, x[k]); });
    }
  }

  template <bool kOnce, class T>
  MSVQ_DEVICE void read_own(Type<T>, const void* tensor, int64_t line, const int (&own)[4],
                            uint32_t (&bits)[4]) const {
    const T* const from = static_cast<const T*>(tensor) + line;
    if (s.quads) {
      if (own[0] >= 0) read_quad<kOnce>(from + own[0], bits);
    } else {
      MSVQ_UNROLL
      for (int j = 0; j < 4; ++j) bits[j] = own[j] < 0 ? 0 : read_bits(from + own[j]);
    }
  }

  MSVQ_DEVICE void compare(State& state, int step, const uint32_t (&values)[kCompared][kScales][4],
                           const uint32_t (&x)[kCompared][4]) const {
    MSVQ_UNROLL
    for (int k = 0; k < kCompared; ++k) {
      const int64_t y = compared_row(state.compared[k], step);
      if (y < 0) continue;
      const int i = (state.compared[k] & 0xffff) * 4;
      int own[4];
      load_quad(shared.own, i, own);
      if (s.quads && own[0] < 0) continue;
      float target[kScales][4];
      for_type(s.x_type, [&](auto type) {
        using T = typename decltype(type)::type;
        MSVQ_UNROLL
        for (int j = 0; j < 4; ++j) {
          const float value = s.quads ? quad_value<T>(x[k], j) : widen_bits<T>(x[k][j]);
          target[kLevels][j] = sizeof(T) == 1 ? value / 127.5f - 1.0f : value;
        }
      });
      int place[4];
      if (s.channels > 1) load_quad(shared.place, i, place);
      MSVQ_UNROLL
      for (int m = 0; m < kLevels; ++m) {
        const int level = kLevels - m;
        int r = state.compared[k] >> 16;
        if (level < kLevels) {
          r += newest[level];
          if (r >= s.ring[level]) r -= s.ring[level];
        }
        const int from = s.base[level] + r * s.row + s.lead[level];
        if (s.channels == 1) {
          load_quad(shared.lines, from + i, target[m]);
        } else {
          MSVQ_UNROLL
          for (int j = 0; j < 4; ++j) target[m][j] = shared.lines[from + place[j]];
        }
      }
      for_float_type(s.type, [&](auto type) {
        compare_quad(type, state, values[k], target, own, origin + y * s.pitch);
      });
    }
  }

  template <class T>
  MSVQ_DEVICE void compare_quad(Type<T>, State& state, const uint32_t (&values)[kScales][4],
                                const float (&target)[kScales][4], const int (&own)[4],
                                int64_t line) const {
    float partial[4] = {}, grad[4] = {}, difference[kScales][4];
    MSVQ_UNROLL
    for (int m = 0; m < kScales; ++m) {
      float squares = 0;
      MSVQ_UNROLL
      for (int j = 0; j < 4; ++j) {
        partial[j] += s.quads ? quad_value<T>(values[m], j) : widen_bits<T>(values[m][j]);
        difference[m][j] = partial[j] - target[m][j];
        if (s.quads || own[j] >= 0) squares += difference[m][j] * difference[m][j];
      }
      state.total[m] += squares;
    }
    MSVQ_UNROLL
    for (int m = kLevels; m >= 0; --m) {
      const float factor = p.factors[m] * scale;
      MSVQ_UNROLL
      for (int j = 0; j < 4; ++j) grad[j] += factor * difference[m][j];
      if (!p.grads[m]) continue;
      T* const to = static_cast<T*>(p.grads[m]) + line;
      if (s.quads) {
        write_quad(grad, to + own[0]);
      } else {
        MSVQ_UNROLL
        for (int j = 0; j < 4; ++j)
          if (own[j] >= 0) narrow(grad[j], to + own[j]);
      }
    }
  }
};

}  // namespace cuda
}  // namespace msvq
