// The Gaussian blur on the CPU.
//
// A task is one plane's strip of columns and band of rows, in tiles of kLanes rows. A ring in the
// second-level cache holds the image's rows around a tile (ring.h). Each output is one sum of sums
// in a fixed order (correlate.h), so neither the split into tasks nor the register tile it falls in
// changes a bit of it.
#include <type_traits>

#include "elements.h"
#include "gaussian_blur/correlate.h"
#include "gaussian_blur/gaussian_blur.h"
#include "gaussian_blur/lines.h"
#include "gaussian_blur/ring.h"
#include "parallel.h"
#include "simd.h"

namespace msvq {
namespace MSVQ_ISA {
namespace {

constexpr int64_t kStrip = 1024;     // elements of a strip: the ring of k = 31 takes 193 KiB
constexpr int64_t kChannels = 16;    // channels of a strip of a channels_last tensor
constexpr int64_t kPixels = 128;     // of a strip at least: it blurs 2 * radius more
constexpr int64_t kGrain = 1 << 20;  // multiply-adds worth a thread

// The taps of one axis. The adjoint of the replicate border is the constant border, but its first
// and last output also collect what falls outside: `first` and `last` are the taps of those two.
struct AxisTaps {
  AxisTaps(const float* taps, int64_t radius, int64_t length)
      : taps(taps), radius(radius), size(2 * radius + 1), first(size), last(size) {
    double tail = 0;
    for (int64_t j = 0; j <= radius; ++j) {
      tail += taps[j];
      first[2 * radius - j] = last[j] = static_cast<float>(tail);
    }
    if (length > 1) return;
    for (int64_t j = radius + 1; j < size; ++j) tail += taps[j];
    first[radius] = last[radius] = static_cast<float>(tail);
  }

  const float* taps;
  int64_t radius, size;
  Array<float> first, last;
};

// Pixels x channels x rows of one plane.
struct Strip {
  int64_t plane, pixel, pixels, channel, channels, row, rows;
};

// Memory of a thread.
struct Work {
  Work(const GaussianBlurParams& p, int64_t pixels, int64_t channels)
      : padded(pixels + 2 * p.radius_x),
        ring(2 * p.radius_y + kLanes, padded * channels),
        source(padded),
        zeros(ring.stride),
        columns((padded + kLanes) * channels * kLanes),
        collected(2 * channels * kLanes),
        staged(kLanes * ring.stride),
        lines(ring.size) {}

  const int64_t padded;
  Ring ring;
  Array<int64_t> source;  // the pixel that every pixel of the padded strip reads
  Array<float> zeros;
  Array<float> columns;       // of the padded strip, blurred down: a tile's rows are the lanes
  Array<float> collected;     // results of the first and the last column, likewise
  Array<float> staged;        // rows of results
  Array<const float*> lines;  // what the vertical pass reads
};

template <class T>
struct StripBlur {
  StripBlur(const GaussianBlurParams& p, const AxisTaps& y, const AxisTaps& x, const Strip& s,
            Work* work)
      : p(p),
        y(y),
        x(x),
        s(s),
        w(*work),
        border(p.adjoint && p.border == Border::replicate ? Border::constant : p.border),
        scaled(p.adjoint && p.border == Border::reflect),
        collected(p.adjoint && p.border == Border::replicate),
        whole(s.channels == p.inner),
        padded(s.pixels + 2 * x.radius),
        low(border == Border::circular ? 0 : min(max(x.radius - s.pixel, 0), padded)),
        high(border == Border::circular ? padded
                                        : max(min(p.width - s.pixel + x.radius, padded), low)),
        past_cache(goes_past_cache(p.out, p.width * p.inner, p.planes * p.height)),
        contiguous(whole && !scaled && border != Border::circular) {
    for (int64_t i = 0; i < padded; ++i)
      w.source[i] = border_source(border, s.pixel - x.radius + i, p.width);
  }

  void run() {
    for (int64_t row = s.row; row < s.row + s.rows; row += kLanes) {
      const int64_t top = row - y.radius;
      const int64_t known = row == s.row ? 0 : contiguous ? w.ring.size : w.ring.size - kLanes;
      for (int64_t k = known; k < w.ring.size; ++k) {
        const int64_t from = ring_source(top + k);
        if (from >= 0) read_row(from, w.ring.row(k));
      }
      for (int64_t k = 0; k < w.ring.size; ++k) w.lines[k] = line_of(top, k);
      blur_rows(row);
      fill_borders();
      if (collected) collect();
      w.ring.advance(kLanes);
      blur_columns(row);
    }
  }

  bool is_inside(int64_t row) const { return row >= 0 && row < p.height; }
  bool is_needed(int64_t row) const { return row < p.height + y.radius; }
  bool is_edge_row(int64_t row) const { return p.height > 1 && (row == 0 || row == p.height - 1); }
  float* column(int64_t pixel, int64_t channel) const {
    return w.columns.data + (pixel * s.channels + channel) * kLanes;
  }

  // The image row that the ring holds at position `row`, or -1: outside the image only the circular
  // border needs one of its own, the other borders' sources are in the ring already.
  int64_t ring_source(int64_t row) const {
    if (is_inside(row)) return row;
    if (border != Border::circular || !is_needed(row)) return -1;
    return border_source(border, row, p.height);
  }

  const float* line_of(int64_t top, int64_t k) const {
    const int64_t row = top + k;
    if (ring_source(row) >= 0) return w.ring.row(k);
    const int64_t from = is_needed(row) ? border_source(border, row, p.height) : -1;
    return from < 0 ? w.zeros.data : w.ring.row(from - top);
  }

  const T* input(int64_t row) const {
    return static_cast<const T*>(p.x) + (s.plane * p.height + row) * p.width * p.inner + s.channel;
  }
  T* output(int64_t row) const {
    return static_cast<T*>(p.out) + ((s.plane * p.height + row) * p.width + s.pixel) * p.inner +
           s.channel;
  }

  // Reads pixels [low, high) of a padded row.
  void read_row(int64_t row, float* to) const {
    const T* from = input(row);
    const int64_t c = s.channels;
    // Runs of pixels: those of the circular border pass the image's end.
    for (int64_t i = low; i < high;) {
      const int64_t run = whole ? min(high - i, p.width - w.source[i]) : 1;
      widen_row(from + w.source[i] * p.inner, to + (i - low) * c, run * c);
      i += run;
    }
    if (scaled && is_edge_row(row))
      for (int64_t i = 0; i < (high - low) * c; ++i) to[i] *= 2;
  }

  // Blurs a tile's rows and stores their columns.
  void blur_rows(int64_t row) const {
    const int64_t elements = (high - low) * s.channels, last = p.height - 1 - row;
    blur_down(y.taps, y.radius, w.lines.data, elements, column(low, 0));
    if (collected && row == 0) collect_row(y.first.data, 0);
    if (collected && last < kLanes) collect_row(y.last.data, last);
    if (!scaled || p.width == 1) return;
    scale_column(0);
    scale_column(p.width - 1);
  }

  void scale_column(int64_t pixel) const {
    const int64_t i = pixel - s.pixel + x.radius;
    if (i < low || i >= high) return;
    for (int64_t k = 0; k < s.channels; ++k) store(column(i, k), load(column(i, k)) * 2.0f);
  }

  // What the image's first or last row collects.
  void collect_row(const float* taps, int64_t t) const {
    float* const to = column(low, 0) + t;
    for (int64_t e = 0; e < (high - low) * s.channels; ++e) {
      float sum = 0;
      for (int64_t j = 0; j < y.size; ++j) sum += taps[j] * w.lines[t + j][e];
      to[e * kLanes] = sum;
    }
  }

  // Copies or clears the columns outside the image.
  void fill_borders() const {
    const auto fill = [&](int64_t first, int64_t end) {
      for (int64_t i = first; i < end; ++i) {
        const int64_t from = w.source[i] - s.pixel + x.radius;
        for (int64_t k = 0; k < s.channels; ++k)
          store(column(i, k), w.source[i] < 0 ? vfloat{} : load(column(from, k)));
      }
    };
    fill(0, low);
    fill(high, padded);
  }

  // What the image's first and last column collect, if they are in the strip.
  void collect() const {
    for (int64_t k = 0; k < 2 * s.channels; ++k) {
      const bool first = k < s.channels;
      const int64_t pixel = first ? 0 : p.width - 1 - s.pixel;
      if (first ? s.pixel > 0 : pixel >= s.pixels) continue;
      const float* const taps = (first ? x.first : x.last).data;
      vfloat sum = {};
      for (int64_t j = 0; j < x.size; ++j)
        sum += broadcast(taps[j]) * load(column(pixel + j, k % s.channels));
      store(w.collected.data + k * kLanes, sum);
    }
  }

  // Blurs a tile's columns and writes its rows. Meanwhile reads the rows that the next tile adds to
  // the ring, whose places this tile no longer needs.
  void blur_columns(int64_t row) const {
    const int64_t elements = s.pixels * s.channels, count = min(kLanes, s.row + s.rows - row);
    bool in_place = false;  // rows go straight to the output where nothing is left to do to them
    if constexpr (std::is_same_v<T, float>)
      in_place = !scaled && whole && count == kLanes && elements % kLanes == 0;
    NextRows<T> next = next_rows(row);
    T* const first = output(row);
    const int64_t width = p.width * p.inner;
    const auto put = [&](int64_t at, const vfloat(&rows)[kLanes]) __attribute__((always_inline)) {
      next.advance();
      // Copies: what the lambda refers to would be read again after every store.
      float* to = w.staged.data + at;
      const int64_t stride = in_place ? width : w.ring.stride;
      if constexpr (std::is_same_v<T, float>) {
        if (in_place) to = first + at;
        if (past_cache && in_place) {
#pragma GCC unroll 16
          for (int t = 0; t < kLanes; ++t) store_past_cache(to + t * stride, rows[t]);
          return;
        }
      }
#pragma GCC unroll 16
      for (int t = 0; t < kLanes; ++t) store(to + t * stride, rows[t]);
    };
    if (collected) {
      blur_in_place(x.taps, x.radius, w.columns.data, s.pixels, s.channels);
      place_collected();
      read_by_rows(w.columns.data, elements, put);
    } else {
      blur_along(x.taps, x.radius, w.columns.data, s.pixels, s.channels, put);
    }
    next.finish();
    if (in_place) return;
    for (int64_t t = 0; t < count; ++t) write_row(row + t, w.staged.data + t * w.ring.stride);
  }

  // The image's rows that the next tile reads and this one did not.
  NextRows<T> next_rows(int64_t row) const {
    const int64_t first = row + kLanes + y.radius, end = min(s.row + s.rows + y.radius, p.height);
    return {w.ring,
            input(first) + w.source[low] * p.inner,
            p.width * p.inner,
            whole ? min(end - first, kLanes) : 0,
            (high - low) * s.channels,
            contiguous};
  }

  void place_collected() const {
    const int64_t last = p.width - 1 - s.pixel;
    for (int64_t k = 0; k < s.channels; ++k) {
      if (s.pixel == 0) store(column(0, k), load(w.collected.data + k * kLanes));
      if (last < s.pixels)
        store(column(last, k), load(w.collected.data + (s.channels + k) * kLanes));
    }
  }

  void write_row(int64_t row, float* sums) const {
    const int64_t c = s.channels;
    if (scaled) {
      if (is_edge_row(row))
        for (int64_t i = 0; i < s.pixels * c; ++i) sums[i] *= 0.5f;
      const int64_t last = p.width - 1 - s.pixel;
      for (int64_t k = 0; k < c && p.width > 1; ++k) {
        if (s.pixel == 0) sums[k] *= 0.5f;
        if (last < s.pixels) sums[last * c + k] *= 0.5f;
      }
    }
    T* to = output(row);
    if (whole) return narrow_row(sums, to, s.pixels * c);
    for (int64_t i = 0; i < s.pixels; ++i) narrow_row(sums + i * c, to + i * p.inner, c);
  }

  const GaussianBlurParams& p;
  const AxisTaps &y, &x;
  const Strip s;
  Work& w;
  const Border border;
  const bool scaled;     // reflect: G^T = D G D^-1 with 1/2 at both ends of D's diagonal
  const bool collected;  // replicate: the edges collect what falls outside
  const bool whole;      // the strip holds all channels of its pixels
  const int64_t padded;
  const int64_t low, high;  // the pixels of the padded strip that are read from the image
  const bool past_cache;    // the output is more than a cache keeps
  const bool contiguous;    // a padded row reads one run of the image's values, as they are
};

template <class T>
void blur(const GaussianBlurParams& p) {
  const AxisTaps y(p.taps_y, p.radius_y, p.height), x(p.taps_x, p.radius_x, p.width);
  const int64_t channels = min(p.inner, kChannels);
  const int64_t chunks = ceil_div(p.inner, channels);
  const int64_t work = p.planes * p.height * p.width * p.inner * (y.size + x.size);
  const int threads = static_cast<int>(max(min(p.threads, work / kGrain), 1));
  const int64_t pixels = min(max(kStrip / channels / 16 * 16, kPixels), p.width);
  const int64_t strips = ceil_div(p.width, pixels);
  // Enough tasks that no thread waits long for the last; a band reads the rows around it again.
  const int64_t wanted = threads > 1 ? 3 * threads : 1;
  int64_t bands = ceil_div(wanted, p.planes * chunks * strips);
  bands = min(bands, max(p.height / (4 * max(p.radius_y, kLanes)), 1));
  const int64_t rows = ceil_div(ceil_div(p.height, bands), kLanes) * kLanes;
  bands = ceil_div(p.height, rows);
  const int64_t tasks = p.planes * chunks * strips * bands;
  int64_t next = 0;
  parallel_for(threads, threads, [&](int64_t) {
    Work memory(p, pixels, channels);
    for (int64_t task; (task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < tasks;) {
      Strip s;
      s.pixel = task % strips * pixels;
      s.pixels = min(pixels, p.width - s.pixel);
      task /= strips;
      s.row = task % bands * rows;
      s.rows = min(rows, p.height - s.row);
      task /= bands;
      s.channel = task % chunks * channels;
      s.channels = min(channels, p.inner - s.channel);
      s.plane = task / chunks;
      StripBlur<T>(p, y, x, s, &memory).run();
    }
    finish_stores();
  });
}

}  // namespace

void gaussian_blur(const GaussianBlurParams& p) {
  if (p.planes * p.height * p.width * p.inner == 0) return;
  switch (p.type) {
    case ImageType::float32:
      return blur<float>(p);
    case ImageType::float16:
      return blur<float16>(p);
    case ImageType::bfloat16:
      return blur<bfloat16>(p);
    case ImageType::uint8:
      return blur<uint8_t>(p);
  }
}

}  // namespace MSVQ_ISA
}  // namespace msvq
