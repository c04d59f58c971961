// The Gaussian blur on a CUDA device: a block streams the rows of a strip of columns.
//
// A step takes kRows rows and passes through three stages, one phase each, so that a phase holds a
// stage of three steps. Down the columns, one per thread, straight from memory: every row that
// arrives is added to the sums it belongs to, and the kRows sums that are then complete go to
// shared memory. Along the lines, kRows neighbouring outputs in the registers of a thread. To
// memory, in the order of memory. The rows of the next step are asked for before the sums of this
// one. kRadius = 0 is any radius up to kMaxRadius: its columns read again what lies around a step.
#pragma once
#include "cuda/block.h"
#include "gaussian_blur/gaussian_blur_column.h"
#include "gaussian_blur/gaussian_blur_cuda.h"

namespace msvq {
namespace cuda {

struct BlurShared {
  MSVQ_HOST_DEVICE BlurShared(const BlurStrips& s, SharedCarver carver)
      : lines(carver.take<float>(2 * kRows * s.line_row)),
        outputs(carver.take<float>(2 * kRows * s.line_row)),
        rows(carver.take<int32_t>(4 * kRows)) {}
  Shared<float> lines, outputs;  // of the rows of two steps
  Shared<int32_t> rows;          // that the columns read in four steps, -1: zeros; near the border
};

template <int kRadius, class T>
struct BlurState {
  float open[kRadius ? 2 * kRadius : 1];  // sums of the rows that are not complete
  T next[kRows];                          // the column's elements of the next step
  int column, place;                      // the column's in a row of the tensor, of lines, -1: none
  int along;                              // the outputs' in rows of lines, -1: none
  int output, out;                        // see settle_output
};

template <int kRadius, class T>
struct BlurStream {
  using State = BlurState<kRadius, T>;
  using Column = BlurColumn<kRadius>;
  const BlurParams<kRadius>& p;
  const BlurStrips& s;
  const BlurShared shared;
  const int64_t pitch;
  int64_t plane, next, written;  // where the plane, the next step's rows, those written begin
  int pixel, channel, channels, row, steps;  // channels: there are; steps: of outputs
  int lines;  // where the step's rows, and those of the last but one, begin in shared memory

  MSVQ_DEVICE BlurStream(const BlurParams<kRadius>& params, char* memory)
      : p(params), s(params.strips), shared(s, SharedCarver{memory, 0}), pitch(s.pitch) {}

  MSVQ_DEVICE int radius_x() const { return kRadius ? kRadius : s.radius_x; }
  MSVQ_DEVICE int radius_y() const { return kRadius ? kRadius : s.radius_y; }

  // Adjoints that treat the edges apart: see streamed_radius.
  MSVQ_DEVICE bool scaled() const { return kRadius == 0 && s.scaled; }
  MSVQ_DEVICE bool collected() const { return kRadius == 0 && s.collected; }

  MSVQ_DEVICE void run(Block<State>& block, int64_t task) {
    pixel = static_cast<int>(task % s.count_x) * s.pixels;
    task /= s.count_x;
    row = static_cast<int>(task % s.count_y) * s.rows;
    steps = ((s.height - row < s.rows ? s.height - row : s.rows) + kRows - 1) / kRows;
    task /= s.count_y;
    channel = static_cast<int>(task % s.count_channels) * s.channels;
    channels = s.inner - channel < s.channels ? s.inner - channel : s.channels;
    plane = task / s.count_channels * s.height * pitch;
    block.each([&](int thread, State& state) {
      prepare(thread, state);
      for (int step = 0; step < 2; ++step) name_rows(thread, step);
    });
    next = plane + first_row(1) * pitch;
    written = plane + (row - (Column::kAhead + 2) * kRows) * pitch;
    if constexpr (kRadius > 0) block.each([&](int, State& state) { fetch(state, 0); });
    // Steps in the middle: neither they nor the next two meet an edge of the task or the image.
    const int inside = (s.height - first_row(2)) / kRows;
    const int end = inside < steps ? inside : steps;
    int step = 0;
    const auto advance = [&] {
      ++step, next += kRows * pitch, written += kRows * pitch;
      lines = last_lines();
    };
    lines = 0;
    MSVQ_NO_UNROLL
    while (step < steps + Column::kAhead + 2) {
      block.each([&](int thread, State& state) {
        name_rows(thread, step + 2);
        if (step < steps + Column::kAhead) blur_columns(state, step);
        if (collected() && step < steps) collect_rows(state, step);
        if (step > Column::kAhead && step <= steps + Column::kAhead) {
          blur_lines(state);
          if (collected()) collect_line(state);
        }
        if (step > Column::kAhead + 1) write(thread, state, step - 2);
      });
      advance();
      if constexpr (kRadius > 0) {
        MSVQ_NO_UNROLL
        for (; step >= Column::kAhead && step < end; advance())
          block.each([&](int, State& state) {
            stream_rows(state);
            if (step > Column::kAhead) blur_lines(state);
            if (step > Column::kAhead + 1) write_rows(state);
          });
      }
    }
  }

  MSVQ_DEVICE void prepare(int thread, State& state) const {
    const int c = thread % s.channels, x = thread / s.channels;
    const int at = walked_source(s.border, pixel + x - radius_x(), s.width);
    const bool there = thread < s.columns && at >= 0 && c < channels;
    state.column = there ? at * s.inner + channel + c : -1;
    state.place = c * s.line + x;
    if (thread < s.columns && !there)
      for (int r = 0; r < 2 * kRows; ++r) shared.lines[r * s.line_row + state.place] = 0;
    MSVQ_UNROLL
    for (int r = 0; r < kRows; ++r) state.next[r] = T{};
    MSVQ_UNROLL
    for (int j = 0; j < (kRadius ? 2 * kRadius : 1); ++j) state.open[j] = 0;
    const int rest = thread / 8;
    const int r = thread / 4 % 2 + 2 * (rest % 4), i = (thread % 4 + 4 * (rest / 4)) * kRows;
    const bool along = i < s.channels * s.wide;
    state.along = along ? r * s.line_row + i / s.wide * s.line + i % s.wide : -1;
    settle_output(thread, state);
  }

  // A thread writes an element of every row of a step, or four neighbours of two rows four apart:
  // the first at `out` from the step's rows, taken from `output`.
  MSVQ_DEVICE int out_row(int thread) const { return s.quads ? thread / (s.pixels / 4) : 0; }
  MSVQ_DEVICE void settle_output(int thread, State& state) const {
    const int r = out_row(thread), i = s.quads ? thread % (s.pixels / 4) : thread;
    const int c = s.quads ? 0 : i % s.channels, x = s.quads ? 4 * i : i / s.channels;
    const bool there = r < 4 && x < s.pixels && pixel + x < s.width && c < channels;
    state.out = there ? r * s.pitch + (pixel + x) * s.inner + channel + c : -1;
    state.output = r * s.line_row + c * s.line + x;
  }

  // The first row that a step adds to its columns' sums.
  MSVQ_DEVICE int first_row(int step) const {
    return row + radius_y() + (step - Column::kAhead) * kRows;
  }
  MSVQ_DEVICE bool is_inside(int y) const { return y >= 0 && y + kRows <= s.height; }

  MSVQ_DEVICE void name_rows(int thread, int step) const {
    const int y = first_row(step);
    if (kRadius == 0 || is_inside(y) || thread >= kRows) return;
    shared.rows[(step & 3) * kRows + thread] = walked_source(s.border, y + thread, s.height);
  }

  MSVQ_DEVICE void fetch(State& state, int step) const {
    if (state.column < 0) return;
    const int y = first_row(step);
    const T* from = static_cast<const T*>(p.x) + state.column + plane;
    if (is_inside(y)) {
      from += y * pitch;
      MSVQ_UNROLL
      for (int r = 0; r < kRows; ++r) {
        state.next[r] = *from;
        from += pitch;
      }
    } else {
      MSVQ_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const int at = shared.rows[(step & 3) * kRows + r];
        state.next[r] = at < 0 ? T{} : from[at * pitch];
      }
    }
  }

  // The adjoint of the reflect border takes twice the edge rows and columns in, half of them out.
  MSVQ_DEVICE bool is_edge_row(int y) const {
    return s.height > 1 && (y == 0 || y == s.height - 1);
  }
  MSVQ_DEVICE bool is_edge_column(int x) const {
    return s.width > 1 && (x == 0 || x == s.width - 1);
  }

  MSVQ_DEVICE void blur_columns(State& state, int step) {
    if (state.column < 0) return;
    const auto put = [&](const float (&done)[kRows]) {
      const int to = lines + state.place;
      const bool twice = scaled() && is_edge_column(state.column / s.inner);
      MSVQ_UNROLL
      for (int r = 0; r < kRows; ++r)
        shared.lines[to + r * s.line_row] = twice ? 2 * done[r] : done[r];
    };
    if constexpr (kRadius > 0) {
      float value[kRows];
      MSVQ_UNROLL
      for (int r = 0; r < kRows; ++r) value[r] = widen(state.next[r]);
      const int first = Column::kAhead - step, end = steps + Column::kAhead - step;
      Column::add(p.taps.across, value, state.open, first, end, put);
      if (end > 1) fetch(state, step + 1);
    } else {
      float done[kRows];
      sum_rows(state, step, done);
      put(done);
    }
  }

  MSVQ_DEVICE int last_lines() const { return kRows * s.line_row - lines; }

  // blur_columns where no edge is near: as soon as a row is in its sums, the same row of the next
  // step is asked for, in the same register.
  MSVQ_DEVICE void stream_rows(State& state) {
    if (state.column < 0) return;
    int to = lines + state.place;
    const T* from = static_cast<const T*>(p.x) + next + state.column;
    float sum[2 * kRadius + kRows];
    MSVQ_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const float value = widen(state.next[r]);
      MSVQ_UNROLL
      for (int j = 0; j <= 2 * kRadius; ++j) {
        const float before = j == 2 * kRadius ? 0.0f : r > 0 ? sum[r + j] : state.open[j];
        sum[r + j] = before + tap_at(p.taps.across, kRadius, j) * value;
      }
      state.next[r] = *from;
      from += pitch;
      shared.lines[to] = sum[r];
      to += s.line_row;
    }
    MSVQ_UNROLL
    for (int j = 0; j < 2 * kRadius; ++j) state.open[j] = sum[kRows + j];
  }

  MSVQ_DEVICE float read(const State& state, int y) const {
    const int at = walked_source(s.border, y, s.height);
    if (at < 0) return 0;
    const float value = widen(static_cast<const T*>(p.x)[plane + at * pitch + state.column]);
    return scaled() && is_edge_row(at) ? 2 * value : value;
  }

  MSVQ_DEVICE void sum_rows(const State& state, int step, float (&done)[kRows]) const {
    const int top = row + step * kRows - s.radius_y;
    float word[2 * kRows];
    MSVQ_UNROLL
    for (int i = 0; i < kRows; ++i) done[i] = 0, word[i] = read(state, top + i);
    MSVQ_NO_UNROLL
    for (int j0 = 0; j0 <= 2 * s.radius_y; j0 += kRows) {
      MSVQ_UNROLL
      for (int i = 0; i < kRows; ++i) word[kRows + i] = read(state, top + j0 + kRows + i);
      MSVQ_UNROLL
      for (int j = 0; j < kRows; ++j) {
        if (j0 + j > 2 * s.radius_y) break;
        const float weight = tap_at(p.taps.across, s.radius_y, j0 + j);
        MSVQ_UNROLL
        for (int i = 0; i < kRows; ++i) done[i] += weight * word[i + j];
      }
      MSVQ_UNROLL
      for (int i = 0; i < kRows; ++i) word[i] = word[kRows + i];
    }
  }

  // The adjoint of the replicate border: what lies outside is collected by the edge rows.
  MSVQ_DEVICE void collect_rows(const State& state, int step) const {
    if (state.column < 0) return;
    const int to = lines + state.place, first = row + step * kRows, last = s.height - 1;
    MSVQ_NO_UNROLL
    for (int edge = 0; edge < 2; ++edge) {
      const int y = edge ? last : 0;
      if (y < first || y >= first + kRows) continue;
      float sum = 0;
      MSVQ_NO_UNROLL
      for (int j = 0; j <= s.radius_y && j <= last; ++j)
        sum += p.taps.tail_across[j] * read(state, edge ? last - j : j);
      shared.lines[to + (y - first) * s.line_row] = sum;
    }
  }

  MSVQ_DEVICE void blur_lines(const State& state) const {
    if (state.along < 0) return;
    const int at = last_lines() + state.along;
    float sum[kRows] = {};
    correlate_line<kRadius>(p.taps.along, radius_x(), shared.lines, at, sum);
    store_quad(shared.outputs, at, sum);
    store_quad(shared.outputs, at + 4, sum + 4);
  }

  MSVQ_DEVICE void collect_line(const State& state) const {
    if (state.along < 0) return;
    const int from = last_lines() + state.along;
    const int x = pixel + state.along % s.line_row % s.line;
    MSVQ_NO_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const bool first = x + i == 0, last = x + i == s.width - 1;
      if (!first && !last) continue;
      float sum = 0;
      MSVQ_NO_UNROLL
      for (int j = 0; j <= s.radius_x && j < s.width; ++j) {
        const int at_pixel = from + i + s.radius_x + (first ? j : -j);
        sum += p.taps.tail_along[j] * shared.lines[at_pixel];
      }
      shared.outputs[from + i] = sum;
    }
  }

  MSVQ_DEVICE void write(int thread, const State& state, int step) const {
    const int y = row + (step - Column::kAhead) * kRows;
    if (y + kRows <= s.height && !scaled()) return write_rows(state);
    if (state.out < 0) return;
    const float half = scaled() && is_edge_column(pixel + thread / s.channels) ? 0.5f : 1.0f;
    const int by = s.quads ? 4 : 1;
    int from = lines + state.output;
    T* to = static_cast<T*>(p.out) + (written + state.out);
    MSVQ_NO_UNROLL
    for (int at = y + out_row(thread); at < y + kRows && at < s.height; at += by) {
      if (s.quads) {
        write_quad(from, to);
      } else {
        const float value = shared.outputs[from];
        narrow(scaled() && is_edge_row(at) ? half / 2 * value : half * value, to);
      }
      from += by * s.line_row, to += by * pitch;
    }
  }
  MSVQ_DEVICE void write_quad(int from, T* to) const {
    float quad[4];
    load_quad(shared.outputs, from, quad);
    narrow_quad(quad, to);
  }

  // write of whole rows.
  MSVQ_DEVICE void write_rows(const State& state) const {
    if (state.out < 0) return;
    int from = lines + state.output;
    T* to = static_cast<T*>(p.out) + (written + state.out);
    if (s.quads) {
      write_quad(from, to);
      write_quad(from + s.line_quad, to + s.pitch_quad);
    } else {
      MSVQ_UNROLL
      for (int r = 0; r < kRows; ++r) {
        narrow(shared.outputs[from], to);
        from += s.line_row, to += pitch;
      }
    }
  }
};

}  // namespace cuda
}  // namespace msvq
