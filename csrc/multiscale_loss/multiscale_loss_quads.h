// The multi-scale loss on a CUDA device where rows are whole quads: four neighbours at a multiple
// of four. See multiscale_loss_stream.h for the order of its steps.
//
// A warp blurs eight rows of 32 columns along their lines and then down these columns, so a step
// has one barrier. A block has an equal share of all strips' rows, from inside one to inside
// another.
#pragma once
#include "multiscale_loss/multiscale_loss_quad_rows.h"

namespace msvq {
namespace cuda {

template <int kRadius, int kScales, class T>
struct QuadStream : QuadRows<kRadius, kScales, T> {
  using Rows = QuadRows<kRadius, kScales, T>;
  using State = QuadState<kRadius, kScales>;
  using Rows::at;
  using Rows::fetch;
  using Rows::fill_tables;
  using Rows::for_stored;
  using Rows::for_x;
  using Rows::kAcross;
  using Rows::kAlong;
  using Rows::kAlongTo;
  using Rows::kCompared;
  using Rows::kLevels;
  using Rows::kStaged;
  using Rows::kToCompare;
  using Rows::name_rows;
  using Rows::origin;
  using Rows::p;
  using Rows::pixel;
  using Rows::put;
  using Rows::QuadRows;
  using Rows::row;
  using Rows::rows;
  using Rows::s;
  using Rows::settle;
  using Rows::settle_once;
  using Rows::settle_quads;
  using Rows::shared;
  using Rows::signed_value;
  using Rows::task;
  using Rows::top;

  // Runs the share of block `first` and leaves the sums of its squared differences.
  MSVQ_DEVICE void run(Block<State>& block, int first) {
    block.each([&](int thread, State&) {
      settle_once(thread);
      for (int m = 0; m < kScales; ++m) shared.sums[m * s.threads + thread] = 0;
      if (thread < kScales)
        shared.factors[thread] = p.factors[thread] * (p.upstream ? *p.upstream : 1.0f);
    });
    const int cost = s.around + s.units;
    const int end = (first + 1) * s.share + (first + 1 < s.rest ? first + 1 : s.rest);
    MSVQ_NO_UNROLL
    for (int at = first * s.share + (first < s.rest ? first : s.rest); at < end;) {
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
    constexpr int kBefore = (4 - kRadius % 4) % 4;
    const int from = (along & 0xffff) + of_level(at, level);
    correlate_line<kRadius, kBefore>(p.taps, kRadius, shared.lines, from, sum);
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
  return g.num_scales == 2 ? with(Radius<2>()) : with(Radius<3>());
}

}  // namespace cuda
}  // namespace msvq
