// The Gaussian blur on a CUDA device: a block streams the rows of a strip of columns.
//
// A step takes kRows rows. Its first phase blurs them along the line, kRows neighbouring outputs in
// the registers of a thread, and asks the memory for the next rows; its second phase blurs down the
// columns, one per thread: every row that passes is added to the 2 * kRadius + 1 sums it belongs
// to, and the kRows sums that are then complete go to memory. Sums move down by kRows places
// between steps, which costs nothing: the first product of a step is added to the old sum and
// stored in the new place. kRadius = 0 is any radius up to kMaxRadius: columns are summed from a
// ring of rows.
#pragma once
#include "cuda/block.h"
#include "gaussian_blur/gaussian_blur_cuda.h"
#include "gaussian_blur/gaussian_blur_tile.h"

namespace msvq {
namespace cuda {

constexpr int kFetched = 10;  // elements of the next rows that a thread keeps in registers
constexpr int kThreads = 128;

// Where things lie in shared memory; rows are 4 words past a multiple of 8 apart, so that the
// 16-byte accesses of 4 neighbours on each of two rows meet in no bank.
struct BlurLayout {
  MSVQ_HOST_DEVICE explicit BlurLayout(const BlurStrips& s)
      : wide(ceil_to(s.pixels, kRows)),
        blocks(s.channels * wide / kRows),
        elements(s.channels * (s.pixels + 2 * s.radius_x)),
        line(wide + ceil_to(2 * s.radius_x + 1, kRows)),
        line_row(s.channels * line / 8 * 8 + 4 + (s.channels * line % 8 ? 8 : 0)),
        blurred_row(s.channels * wide / 8 * 8 + 4),
        ring_rows(s.streamed ? kRows : 2 * s.radius_y + kRows) {}
  int wide, blocks;            // pixels of a line in whole blocks of kRows; blocks of all channels
  int elements;                // values read of a row
  int line, line_row;          // words of a channel's line with its borders; of a row
  int blurred_row, ring_rows;  // words of a blurred row; rows kept
};

struct BlurShared {
  MSVQ_HOST_DEVICE BlurShared(const BlurLayout& at, SharedCarver carver)
      : lines(carver.take<float>(kRows * at.line_row)),
        blurred(carver.take<float>(at.ring_rows * at.blurred_row)),
        source(carver.take<int32_t>(at.elements)),
        place(carver.take<int32_t>(at.elements)),
        rows(carver.take<int64_t>(2 * kRows)),
        bytes(carver.bytes) {}
  Shared<float> lines, blurred;
  Shared<int32_t> source, place;  // of every value of a row: its offset in memory, in `lines`
  Shared<int64_t> rows;           // where the rows of this and of the next step begin in the plane
  int bytes;
};

template <int kRadius>
struct BlurState {
  float sum[kRadius ? 2 * kRadius : 1];  // of the rows that are not complete
  float first, last;                     // collected outside the image: see BlurTaps
  uint32_t fetched[kFetched];
  int64_t out;  // this thread's column of the plane, -1: none
  int column;   // in a blurred row
  float factor;
};

template <int kRadius>
struct BlurStream {
  using State = BlurState<kRadius>;
  const BlurParams<kRadius>& p;
  const BlurStrips& s;
  const BlurLayout at;
  const BlurShared shared;
  const int64_t pitch;  // elements of a row of the tensor
  int64_t plane, pixel, channel, row, rows;
  int channels;

  MSVQ_DEVICE BlurStream(const BlurParams<kRadius>& params, char* memory)
      : p(params),
        s(params.strips),
        at(s),
        shared(at, SharedCarver{memory, 0}),
        pitch(s.width * s.inner) {}

  MSVQ_DEVICE int radius_x() const { return kRadius ? kRadius : s.radius_x; }
  MSVQ_DEVICE int radius_y() const { return kRadius ? kRadius : s.radius_y; }

  MSVQ_DEVICE void run(Block<State>& block, int64_t task) {
    pixel = task % s.count_x * s.pixels;
    task /= s.count_x;
    row = task % s.count_y * s.rows;
    rows = s.height - row < s.rows ? s.height - row : s.rows;
    task /= s.count_y;
    channel = task % s.count_channels * s.channels;
    channels = static_cast<int>(s.inner - channel < s.channels ? s.inner - channel : s.channels);
    plane = task / s.count_channels;
    const int64_t top = row - radius_y();
    const int steps = static_cast<int>((rows + 2 * radius_y() + kRows - 1) / kRows);
    block.each([&](int thread, State& state) {
      prepare(thread, state);
      name_rows(thread, top, 0);
      name_rows(thread, top, 1);
    });
    block.each([&](int thread, State& state) {
      fetch(thread, state, 0);
      put(thread, state, 0);
    });
    MSVQ_NO_UNROLL
    for (int step = 0; step < steps; ++step) {
      const int64_t y = top + int64_t{step} * kRows;
      const bool more = step + 1 < steps;
      block.each([&](int thread, State& state) {
        if (more) fetch(thread, state, step + 1);
        blur_lines(thread, step);
      });
      block.each([&](int thread, State& state) {
        if (more) put(thread, state, step + 1);
        name_rows(thread, top, step + 2);
        blur_columns(state, y, step);
      });
    }
  }

  MSVQ_DEVICE void prepare(int thread, State& state) {
    for (int i = thread; i < at.elements; i += kThreads) {
      const int c = i % s.channels, x = i / s.channels;
      const int64_t from = border_source(s.border, pixel + x - radius_x(), s.width);
      const bool there = from >= 0 && c < channels;
      shared.source[i] = there ? static_cast<int32_t>(from * s.inner + c) : -1;
      shared.place[i] = c * at.line + x;
    }
    // The line's end is read by the last block of outputs and belongs to none that is kept.
    for (int i = thread; i < kRows * at.line_row; i += kThreads) shared.lines[i] = 0;
    for (int j = 0; j < (kRadius ? 2 * kRadius : 1); ++j) state.sum[j] = 0;
    state.first = state.last = 0;
    const int c = thread % s.channels, x = thread / s.channels;
    const bool there = x < s.pixels && pixel + x < s.width && c < channels;
    state.out = there ? (pixel + x) * s.inner + channel + c : -1;
    state.column = c * at.wide + x;
    const bool edge = pixel + x == 0 || pixel + x == s.width - 1;
    state.factor = s.scaled && edge && s.width > 1 ? 0.5f : 1.0f;
  }

  // Once per step: the fold at the border divides. -1 is a row of zeros.
  MSVQ_DEVICE void name_rows(int thread, int64_t top, int step) const {
    if (thread >= kRows) return;
    const int64_t y = top + int64_t{step} * kRows + thread;
    const bool needed = y < row + rows + radius_y();
    const int64_t from = needed ? border_source(s.border, y, s.height) : -1;
    shared.rows[step % 2 * kRows + thread] = from < 0 ? -1 : from * pitch;
  }

  // Part k of a step's rows: row k % kRows, 32 neighbouring elements per warp.
  template <class Visit>
  MSVQ_DEVICE void visit(int thread, int k, int step, const Visit& visit_element) const {
    const int part = thread / 32 + k * (kThreads / 32);
    const int r = part % kRows, i = part / kRows * 32 + thread % 32;
    if (i < at.elements) visit_element(r, i, shared.rows[step % 2 * kRows + r]);
  }
  MSVQ_DEVICE int parts() const {
    return ((at.elements + 31) / 32 * kRows + kThreads / 32 - 1) / (kThreads / 32);
  }

  template <class T>
  MSVQ_DEVICE uint32_t read(const T* from, int64_t line, int i) const {
    const int at_row = shared.source[i];
    return line < 0 || at_row < 0 ? 0 : read_bits(from + line + at_row);
  }
  template <class T>
  MSVQ_DEVICE const T* input() const {
    return static_cast<const T*>(p.x) + plane * s.height * pitch + channel;
  }

  MSVQ_DEVICE void fetch(int thread, State& state, int step) const {
    for_type(s.type, [&](auto type) {
      const auto* from = input<typename decltype(type)::type>();
      MSVQ_UNROLL
      for (int k = 0; k < kFetched; ++k)
        visit(thread, k, step,
              [&](int, int i, int64_t line) { state.fetched[k] = read(from, line, i); });
    });
  }

  MSVQ_DEVICE void put(int thread, State& state, int step) const {
    for_type(s.type, [&](auto type) {
      using T = typename decltype(type)::type;
      const T* from = input<T>();
      MSVQ_UNROLL
      for (int k = 0; k < kFetched; ++k)
        visit(thread, k, step, [&](int r, int i, int64_t line) {
          shared.lines[r * at.line_row + shared.place[i]] =
              edge_scaled(widen_bits<T>(state.fetched[k]), line, i);
        });
      MSVQ_NO_UNROLL
      for (int k = kFetched; k < parts(); ++k)
        visit(thread, k, step, [&](int r, int i, int64_t line) {
          shared.lines[r * at.line_row + shared.place[i]] =
              edge_scaled(widen_bits<T>(read(from, line, i)), line, i);
        });
    });
  }

  // The adjoint of the reflect border: twice the edge rows and columns in, half of them out.
  MSVQ_DEVICE float edge_scaled(float value, int64_t line, int i) const {
    if (!s.scaled) return value;
    const int64_t at_row = shared.source[i];
    if (s.width > 1 && (at_row < s.inner || at_row >= pitch - s.inner)) value *= 2;
    return is_edge_row(line) ? 2 * value : value;
  }
  MSVQ_DEVICE bool is_edge_row(int64_t line) const {
    return s.height > 1 && (line == 0 || line == (s.height - 1) * pitch);
  }

  MSVQ_DEVICE void blur_lines(int thread, int step) const {
    const int rest = thread / 8;
    const int r = thread / 4 % 2 + 2 * (rest % 4), b = thread % 4 + 4 * (rest / 4);
    if (b >= at.blocks) return;
    const int c = b * kRows / at.wide, x = b * kRows % at.wide;
    const int from = r * at.line_row + c * at.line + x;
    const int to = slot(step * kRows + r) * at.blurred_row + c * at.wide + x;
    float sum[kRows] = {};
    correlate_line<kRadius>(p.taps.along, radius_x(), shared.lines, from, sum);
    store_quad(shared.blurred, to, sum);
    store_quad(shared.blurred, to + 4, sum + 4);
    if (s.collected) collect_line(from, to, pixel + x);
  }

  MSVQ_DEVICE void collect_line(int from, int to, int64_t x) const {
    for (int i = 0; i < kRows; ++i) {
      const bool first = x + i == 0, last = x + i == s.width - 1;
      if (!first && !last) continue;
      float sum = 0;
      for (int j = 0; j <= radius_x() && j < s.width; ++j) {
        const int at_pixel = from + i + radius_x() + (first ? j : -j);
        sum += p.taps.tail_along[j] * shared.lines[at_pixel];
      }
      shared.blurred[to + i] = sum;
    }
  }

  MSVQ_DEVICE int slot(int i) const { return kRadius ? i % kRows : i % at.ring_rows; }

  MSVQ_DEVICE void blur_columns(State& state, int64_t y, int step) {
    if (state.out < 0) return;
    float value[kRows], done[kRows];
    MSVQ_UNROLL
    for (int r = 0; r < kRows; ++r)
      value[r] = shared.blurred[slot(step * kRows + r) * at.blurred_row + state.column];
    if constexpr (kRadius > 0) {
      add_rows<kRadius>(p.taps.across, value, state.sum, done);
    } else {
      sum_rows(state, step, done);
    }
    if (s.collected) collect_rows(state, value, done, y);
    const int64_t first = y - radius_y();
    for_type(s.type, [&](auto type) {
      using T = typename decltype(type)::type;
      T* to = static_cast<T*>(p.out) + (plane * s.height + first) * pitch + state.out;
      MSVQ_UNROLL
      for (int r = 0; r < kRows; ++r) {
        if (first + r < row || first + r >= row + rows) continue;
        const float half = s.scaled && is_edge_row((first + r) * pitch) ? 0.5f : 1.0f;
        narrow(done[r] * half * state.factor, to + r * pitch);
      }
    });
  }

  MSVQ_DEVICE void sum_rows(const State& state, int step, float (&done)[kRows]) const {
    // The oldest row of the ring is y - 2 * radius_y.
    int oldest = slot(step * kRows + kRows);
    for (int r = 0; r < kRows; ++r) done[r] = 0;
    MSVQ_NO_UNROLL
    for (int j = 0; j < at.ring_rows; ++j) {
      const int line = oldest + j < at.ring_rows ? oldest + j : oldest + j - at.ring_rows;
      if ((step + 1) * kRows - at.ring_rows + j < 0) continue;  // not a row of this task yet
      const float value = shared.blurred[line * at.blurred_row + state.column];
      MSVQ_UNROLL
      for (int r = 0; r < kRows; ++r)
        if (j >= r && j - r <= 2 * s.radius_y)
          done[r] += tap_at(p.taps.across, radius_y(), j - r) * value;
    }
  }

  // The adjoint of the replicate border: what lies outside is collected by the edge rows.
  MSVQ_DEVICE void collect_rows(State& state, const float (&value)[kRows], float (&done)[kRows],
                                int64_t y) const {
    MSVQ_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const int64_t below = y + r, above = s.height - 1 - below;
      if (below < 0 || above < 0) continue;
      if (below <= radius_y()) state.first += p.taps.tail_across[below] * value[r];
      if (above <= radius_y()) state.last += p.taps.tail_across[above] * value[r];
    }
    MSVQ_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const int64_t to = y - radius_y() + r;
      if (to == 0) done[r] = state.first;
      if (to == s.height - 1) done[r] = state.last;
    }
  }
};

}  // namespace cuda
}  // namespace msvq
