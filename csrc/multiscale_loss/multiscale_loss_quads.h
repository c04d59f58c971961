// The multi-scale loss on a CUDA device where rows are whole quads: four neighbours at a multiple
// of four. See multiscale_loss_stream.h for the order of its steps.
//
// A warp blurs eight rows of 32 columns along their lines and then down these columns, so a step
// has one barrier. A block has an equal share of all strips' rows, from inside one to inside
// another.
#pragma once
#include "gaussian_blur/gaussian_blur_tile.h"
#include "multiscale_loss/multiscale_loss_quad_strips.h"
#include "multiscale_loss/quads.h"

namespace msvq {
namespace cuda {

struct QuadShared {
  MSVQ_HOST_DEVICE QuadShared(const QuadStrips& s, SharedCarver carver)
      : lines(carver.take<float>(s.words)),
        blurred(carver.take<float>(s.threads / kWarp * kRows * kWarpRow)),
        source(carver.take<int32_t>(s.elements)),
        place(carver.take<int32_t>(s.elements)),
        tasks(carver.take<int32_t>(s.tasks)),
        factors(carver.take<float>(kMaxScales)),
        rows(carver.take<int64_t>(2 * kRows)),
        sums(carver.take<double>((s.levels + 1) * s.threads)) {}
  Shared<float> lines;
  Shared<float> blurred;  // a warp's 8 x 32 values
  // Of every value of a row of x: its offset in memory from the row's start, -1 for zero; its place
  // in the lines.
  Shared<int32_t> source, place;
  Shared<int32_t> tasks;  // what a thread does, see QuadStream::task
  Shared<float> factors;  // of the differences in the gradients
  Shared<int64_t> rows;   // where the rows of this and of the next step begin, -1 for zeros
  Shared<double> sums;
};

template <int kRadius, int kScales>
struct QuadState {
  float open[2 * kRadius];  // sums of the rows that are not complete
  float total[kScales];     // squared differences of this strip
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

// border_source of lengths in 32 bits: a remainder in 64 is a call.
MSVQ_DEVICE int short_border_source(Border border, int i, int n) {
  if (i >= 0 && i < n) return i;
  if (border == Border::constant) return -1;
  if (n == 1) return 0;
  const int period = border == Border::circular    ? n
                     : border == Border::symmetric ? 2 * n
                                                   : 2 * n - 2;
  int j = i % period;
  if (j < 0) j += period;
  const int mirrored = border == Border::symmetric ? 2 * n - 1 - j : period - j;
  return border == Border::circular || j < mirrored ? j : mirrored;
}

// T is the type of contributions and gradients, bfloat16 for both of 16 bits: kernels of their own
// would differ in a few conversions.
template <int kRadius, int kScales, class T>
struct QuadStream {
  using State = QuadState<kRadius, kScales>;
  static constexpr int kLevels = kScales - 1;
  static constexpr int kThreads = quad_threads(kRadius);
  static constexpr int kStaged = staged_quads(kScales), kCompared = compared_quads(kScales);

  const QuadParams<kRadius>& p;
  const QuadStrips& s;
  const QuadShared shared;
  int64_t origin;  // of the plane in the tensors
  int pixel, row, rows, top;
  int at[kScales];  // where every level's rows of this step begin in its ring

  MSVQ_DEVICE QuadStream(const QuadParams<kRadius>& params, char* memory)
      : p(params), s(params.strips), shared(s, SharedCarver{memory, 0}) {}

  // What thread blurs along and across: level << 16 | first value, kNoLevel for nothing; where it
  // puts what it blurs along. Of its quads of contributions: row << 16 | first value, kNoRow for
  // none. Of its quads of x the same, -1 for none, and the offset of those that lie together in
  // memory, else -1. Tables of one thread lie at constant distances: one register for all.
  static constexpr int kAlong = 0, kAcross = 1, kAlongTo = 2, kToCompare = 3,
                       kToStage = kToCompare + kCompared, kStageFrom = kToStage + kStaged;
  MSVQ_DEVICE int32_t& task(int kind, int thread) const {
    return shared.tasks[thread + kind * kThreads];
  }

  // Calls body with the type of x: see in_quads.
  template <class Body>
  MSVQ_DEVICE void for_x(const Body& body) const {
    if (s.x_type == s.type) return body(Type<T>());
    if constexpr (sizeof(T) < sizeof(float)) {
      if (s.x_type == ImageType::float32) return body(Type<float>());
    }
    body(Type<uint8_t>());
  }

  // Calls body with the type that X stands for.
  template <class X, class Body>
  MSVQ_DEVICE void for_stored(Type<X> type, const Body& body) const {
    if constexpr (sizeof(X) == 2) {
      if (s.type == ImageType::float16) return body(Type<float16>());
    }
    body(type);
  }

  // Runs the share of block `first` of `blocks` and leaves the sums of its squared differences.
  MSVQ_DEVICE void run(Block<State>& block, int first, int blocks) {
    block.each([&](int thread, State&) {
      for (int m = 0; m < kScales; ++m) shared.sums[m * s.threads + thread] = 0;
      if (thread < kScales)
        shared.factors[thread] = p.factors[thread] * (p.upstream ? *p.upstream : 1.0f);
    });
    const int cost = s.around + s.units;
    const int share = s.strips * cost / blocks, rest = s.strips * cost % blocks;
    const int end = (first + 1) * share + (first + 1 < rest ? first + 1 : rest);
    MSVQ_NO_UNROLL
    for (int at = first * share + (first < rest ? first : rest); at < end;) {
      const int strip = at / cost, begin = strip * cost + s.around;
      const int from = at < begin ? 0 : at - begin;
      at = begin + s.units < end ? begin + s.units : end;
      if (at > begin + from) run_strip(block, strip, from * kRows, (at - begin) * kRows);
    }
    if (!p.partials) return;
    block.each([&](int thread, State&) {
      if (thread >= kWarp) return;
      MSVQ_NO_UNROLL
      for (int m = 0; m < kScales; ++m) {
        double sum = 0;
        MSVQ_NO_UNROLL
        for (int i = thread; i < s.threads; i += kWarp) sum += shared.sums[m * s.threads + i];
        shared.sums[m * s.threads + thread] = sum;
      }
    });
    block.each([&](int thread, State&) {
      if (thread >= kScales) return;
      double sum = 0;
      MSVQ_NO_UNROLL
      for (int i = 0; i < kWarp; ++i) sum += shared.sums[thread * s.threads + i];
      p.partials[first * kMaxScales + thread] = sum;
    });
  }

  // Rows `from` to `to`, as far as there are, of a strip.
  MSVQ_DEVICE void run_strip(Block<State>& block, int strip, int from, int to) {
    pixel = strip % s.count_x * s.pixels;
    origin = int64_t{strip / s.count_x} * s.height * s.pitch;
    row = from;
    rows = (to < s.height ? to : s.height) - from;
    top = row - kLevels * kRadius;
    const int read = (rows + 2 * kLevels * kRadius + kRows - 1) / kRows;  // steps that need x
    MSVQ_UNROLL
    for (int l = 0; l < kScales; ++l) at[l] = (2 * s.ring[l] - (l + 1) * kRows * s.row) % s.ring[l];
    block.each([&](int thread, State& state) {
      settle(thread, state);
      fill_tables(thread);
      name_rows(thread, 0);
    });
    block.each([&](int thread, State&) { settle_quads(thread); });
    MSVQ_NO_UNROLL
    for (int step = -1; step < read + kLevels; ++step) {
      int next[kScales];
      int on = 0;  // levels with rows that anything kept is blurred from
      MSVQ_UNROLL
      for (int l = 0; l < kScales; ++l) {
        next[l] = at[l] + kRows * s.row;
        if (next[l] == s.ring[l]) next[l] = 0;
        if (step - l >= 2 * l * kRadius / kRows && step - l < read) on |= 1 << l;
      }
      each_in_warps(
          block,
          [&](int thread, State& state) {
            uint32_t values[kCompared][kScales][4], x[kCompared][4];
            read_contributions(thread, step, values, x);
            blur_along(thread, on);
            compare(thread, state, step, values, x);
          },
          [&](int thread, State& state) {
            uint32_t bits[kStaged][4];
            const bool more = step + 1 < read;
            if (more) fetch(thread, step + 1, bits);
            name_rows(thread, step + 2);
            blur_across(thread, state, step, on, next);
            if (more) put(thread, step + 1, bits);
          });
      MSVQ_UNROLL
      for (int l = 0; l < kScales; ++l) at[l] = next[l];
    }
    block.each([&](int thread, State& state) {
      for (int m = 0; m < kScales; ++m) shared.sums[m * s.threads + thread] += state.total[m];
    });
  }

  // Of its warp's 8 x 32 values a thread blurs eight of a row along it, and then its own column.
  MSVQ_DEVICE int along_row(int thread) const { return thread / 4 % 2 + thread / 8 % 4 * 2; }

  // Columns that no pixel of the image is blurred from are nobody's.
  MSVQ_DEVICE void settle(int thread, State& state) const {
    const int along = thread / kWarp * kWarp + thread % 4 * kRows;
    task(kAlong, thread) = task(kAcross, thread) = kNoLevel << 16;
    task(kAlongTo, thread) =
        (thread / kWarp * kRows + along_row(thread)) * kWarpRow + thread % 4 * kRows;
    MSVQ_UNROLL
    for (int l = 0; l < kLevels; ++l) {
      const int first = s.column[l + 1], wide = s.wide[l + 1], end = first + s.channels * wide;
      const int beyond = s.width - pixel + s.lead[l + 1] + (kLevels - l - 1) * kRadius;
      const auto place = [&](int column) {
        return (column - first) / wide * s.line + (column - first) % wide;
      };
      if (along >= first && along < end && (along - first) % wide < beyond)
        task(kAlong, thread) = l << 16 | (s.base[l] + along_row(thread) * s.row + place(along));
      if (thread >= first && thread < end && (thread - first) % wide < beyond)
        task(kAcross, thread) = l << 16 | (s.base[l + 1] + place(thread));
    }
    MSVQ_UNROLL
    for (int k = 0; k < kCompared; ++k) {
      const int quads = s.own_elements / 4, i = thread + k * s.threads, first = i % quads * 4;
      const bool mine = i < kRows * quads && pixel * s.channels + first < s.pitch;
      task(kToCompare + k, thread) = (mine ? i / quads : kNoRow) << 16 | first;
    }
    for (int j = 0; j < 2 * kRadius; ++j) state.open[j] = 0;
    for (int m = 0; m < kScales; ++m) state.total[m] = 0;
  }

  MSVQ_DEVICE void fill_tables(int thread) const {
    for (int i = thread; i < s.elements; i += s.threads) {
      const int c = i % s.channels, x = i / s.channels;
      const int from = short_border_source(s.border, pixel + x - s.lead[0], s.width);
      shared.source[i] = from < 0 ? -1 : from * s.channels + c;
      shared.place[i] = c * s.line + x;
    }
  }

  MSVQ_DEVICE void settle_quads(int thread) const {
    const int quads = s.elements / 4;
    MSVQ_UNROLL
    for (int k = 0; k < kStaged; ++k) {
      const int i = thread + k * s.threads, first = i % quads * 4;
      const bool mine = i < kRows * quads;
      task(kToStage + k, thread) = mine ? i / quads << 16 | first : -1;
      // Around a fold values do not lie together, and beyond it off the multiples of four.
      const int from = mine ? shared.source[first] : -1;
      const bool quad = from >= 0 && from % 4 == 0 && shared.source[first + 3] == from + 3;
      task(kStageFrom + k, thread) = quad ? from : -1;
    }
  }

  // Once per step: the fold at the border divides.
  MSVQ_DEVICE void name_rows(int thread, int step) const {
    if (thread >= kRows) return;
    const int y = top + step * kRows + thread;
    const bool needed = y < row + rows + kLevels * kRadius;
    const int from = needed ? short_border_source(s.border, y, s.height) : -1;
    shared.rows[step % 2 * kRows + thread] = from < 0 ? -1 : origin + int64_t{from} * s.pitch;
  }

  MSVQ_DEVICE void fetch(int thread, int step, uint32_t (&bits)[kStaged][4]) const {
    for_x([&](auto type) {
      const auto* const x = static_cast<const typename decltype(type)::type*>(p.x);
      MSVQ_UNROLL
      for (int k = 0; k < kStaged; ++k) {
        const int staged = task(kToStage + k, thread);
        if (staged < 0) continue;
        const int64_t line = shared.rows[step % 2 * kRows + (staged >> 16)];
        const int from = task(kStageFrom + k, thread);
        if (line >= 0 && from >= 0) {
          read_quad<false>(x + line + from, bits[k]);
        } else {
          MSVQ_UNROLL
          for (int j = 0; j < 4; ++j) {
            const int source = shared.source[(staged & 0xffff) + j];
            bits[k][j] = line < 0 || source < 0 ? 0 : read_bits(x + line + source);
          }
        }
      }
    });
  }

  MSVQ_DEVICE void put(int thread, int step, const uint32_t (&bits)[kStaged][4]) const {
    for_x([&](auto type) {
      using X = typename decltype(type)::type;
      MSVQ_UNROLL
      for (int k = 0; k < kStaged; ++k) {
        const int staged = task(kToStage + k, thread);
        if (staged < 0) continue;
        const int r = staged >> 16, first = staged & 0xffff;
        float value[4];
        if constexpr (sizeof(X) == 4) {
          MSVQ_UNROLL
          for (int j = 0; j < 4; ++j) value[j] = widen_bits<X>(bits[k][j]);
        } else {
          const bool there = shared.rows[step % 2 * kRows + r] >= 0;
          const bool packed = there && task(kStageFrom + k, thread) >= 0;
          for_stored(type, [&](auto stored) {
            using S = typename decltype(stored)::type;
            MSVQ_UNROLL
            for (int j = 0; j < 4; ++j)
              value[j] = packed ? quad_value<S>(bits[k], j) : widen_bits<S>(bits[k][j]);
          });
          if constexpr (sizeof(X) == 1) {
            MSVQ_UNROLL
            for (int j = 0; j < 4; ++j)
              value[j] = there && shared.source[first + j] >= 0 ? signed_value(value[j]) : 0.0f;
          }
        }
        const int to = s.base[0] + (step % 2 * kRows + r) * s.row;
        if (s.channels == 1) {
          store_quad(shared.lines, to + first, value);
        } else {
          MSVQ_UNROLL
          for (int j = 0; j < 4; ++j) shared.lines[to + shared.place[first + j]] = value[j];
        }
      }
    });
  }
  // x / 127.5 - 1, the division as two products.
  MSVQ_DEVICE float signed_value(float x) const {
    constexpr float kInverse = 1.0f / 127.5f;
    const float quotient = x * kInverse;
    return quotient + (x - quotient * 127.5f) * kInverse - 1.0f;
  }

  MSVQ_DEVICE int of_level(const int (&values)[kScales], int level) const {
    int value = values[0];
    MSVQ_UNROLL
    for (int l = 1; l < kScales; ++l) value = level == l ? values[l] : value;
    return value;
  }

  MSVQ_DEVICE void blur_along(int thread, int on) const {
    const int along = task(kAlong, thread), level = along >> 16;
    if ((on >> level & 1) == 0) return;
    float sum[kRows] = {};
    correlate_quads<kRadius>(p.taps, shared.lines, (along & 0xffff) + of_level(at, level), sum);
    const int to = task(kAlongTo, thread);
    store_quad(shared.blurred, to, sum);
    store_quad(shared.blurred, to + 4, sum + 4);
  }

  MSVQ_DEVICE void blur_across(int thread, State& state, int step, int on,
                               const int (&next)[kScales]) const {
    const int across = task(kAcross, thread), level = (across >> 16) + 1;
    if ((on >> (level - 1) & 1) == 0) return;
    const int from = thread / kWarp * (kRows * kWarpRow) + thread % kWarp;
    float value[kRows], done[kRows];
    MSVQ_UNROLL
    for (int r = 0; r < kRows; ++r) value[r] = shared.blurred[from + r * kWarpRow];
    add_rows<kRadius>(p.taps, value, state.open, done);
    if (s.border == Border::constant) {
      int lead = 0, base = 0;
      MSVQ_UNROLL
      for (int l = 1; l < kScales; ++l)
        if (level == l) lead = s.lead[l], base = s.base[l];
      const int x = pixel + ((across & 0xffff) - base) % s.line - lead;
      const int y = top - level * kRadius + (step + 1 - level) * kRows;
      MSVQ_UNROLL
      for (int r = 0; r < kRows; ++r)
        if (x < 0 || x >= s.width || y + r < 0 || y + r >= s.height) done[r] = 0;
    }
    const int to = (across & 0xffff) + of_level(next, level);
    MSVQ_UNROLL
    for (int r = 0; r < kRows; ++r) shared.lines[to + r * s.row] = done[r];
  }

  // Whether a quad's row, of the rows of the coarsest level that a step completed, is kept.
  MSVQ_DEVICE bool is_kept(int compared, int step) const {
    const int i = (step - kLevels) * kRows - 2 * kLevels * kRadius + (compared >> 16);
    return static_cast<unsigned>(i) < static_cast<unsigned>(rows);
  }
  // Where these rows begin in the tensors, and from there a thread's quad.
  MSVQ_DEVICE int64_t compared_line(int step) const {
    const int y = row + (step - kLevels) * kRows - 2 * kLevels * kRadius;
    return origin + int64_t{y} * s.pitch + pixel * s.channels;
  }
  MSVQ_DEVICE int quad_offset(int compared) const {
    return (compared >> 16) * s.pitch + (compared & 0xffff);
  }

  MSVQ_DEVICE void read_contributions(int thread, int step,
                                      uint32_t (&values)[kCompared][kScales][4],
                                      uint32_t (&x)[kCompared][4]) const {
    MSVQ_UNROLL
    for (int k = 0; k < kCompared; ++k) {
      const int compared = task(kToCompare + k, thread);
      if (!is_kept(compared, step)) continue;
      const int64_t from = compared_line(step) + quad_offset(compared);
      MSVQ_UNROLL
      for (int m = 0; m < kScales; ++m)
        read_quad<true>(static_cast<const T*>(p.contributions[m]) + from, values[k][m]);
      for_x([&](auto type) {
        read_quad<false>(static_cast<const typename decltype(type)::type*>(p.x) + from, x[k]);
      });
    }
  }

  MSVQ_DEVICE void compare(int thread, State& state, int step,
                           const uint32_t (&values)[kCompared][kScales][4],
                           const uint32_t (&x)[kCompared][4]) const {
    MSVQ_UNROLL
    for (int k = 0; k < kCompared; ++k) {
      const int compared = task(kToCompare + k, thread), first = compared & 0xffff;
      if (!is_kept(compared, step)) continue;
      float target[kScales][4];
      for_x([&](auto type) {
        for_stored(type, [&](auto stored) {
          using S = typename decltype(stored)::type;
          MSVQ_UNROLL
          for (int j = 0; j < 4; ++j) {
            const float value = quad_value<S>(x[k], j);
            target[kLevels][j] = sizeof(S) == 1 ? signed_value(value) : value;
          }
        });
      });
      MSVQ_UNROLL
      for (int m = 0; m < kLevels; ++m) {
        constexpr int kBehind = kRows + kRadius;  // rows a level is behind the one before
        const int level = kLevels - m;
        int from = at[level] + ((compared >> 16) - m * kBehind) * s.row;
        if (m > 0 && from < 0) from += s.ring[level];
        from += s.base[level] + s.lead[level];
        if (s.channels == 1) {
          load_quad(shared.lines, from + first, target[m]);
        } else {
          MSVQ_UNROLL
          for (int j = 0; j < 4; ++j) target[m][j] = shared.lines[from + shared.place[first + j]];
        }
      }
      compare_quad(state, values[k], target, compared_line(step) + quad_offset(compared));
    }
  }

  MSVQ_DEVICE void compare_quad(State& state, const uint32_t (&values)[kScales][4],
                                const float (&target)[kScales][4], int64_t to) const {
    float partial[4] = {}, grad[4] = {}, difference[kScales][4], factor[4];
    load_quad(shared.factors, 0, factor);
    MSVQ_UNROLL
    for (int m = 0; m < kScales; ++m) {
      for_stored(Type<T>(), [&](auto stored) {
        using S = typename decltype(stored)::type;
        MSVQ_UNROLL
        for (int j = 0; j < 4; ++j) partial[j] += quad_value<S>(values[m], j);
      });
      MSVQ_UNROLL
      for (int j = 0; j < 4; ++j) {
        difference[m][j] = partial[j] - target[m][j];
        state.total[m] += difference[m][j] * difference[m][j];
      }
    }
    MSVQ_UNROLL
    for (int m = kLevels; m >= 0; --m) {
      MSVQ_UNROLL
      for (int j = 0; j < 4; ++j) grad[j] += factor[m] * difference[m][j];
      if (!p.grads[m]) continue;
      for_stored(Type<T>(), [&](auto stored) {
        write_quad(grad, static_cast<typename decltype(stored)::type*>(p.grads[m]) + to);
      });
    }
  }
};

// Calls body with the number of scales, of which there is a blur, and T of a QuadStream.
template <class Body>
auto for_quads(const MultiscaleLossParams& g, const Body& body) {
  const auto with = [&](auto scales) {
    if (g.type == ImageType::float32) return body(scales, Type<float>());
    return body(scales, Type<bfloat16>());
  };
  if (g.num_scales == 2) return with(Radius<2>());
  if (g.num_scales == 3) return with(Radius<3>());
  return with(Radius<4>());
}

}  // namespace cuda
}  // namespace msvq
