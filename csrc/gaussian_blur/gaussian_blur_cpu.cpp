// The Gaussian blur on the CPU.
//
// A task is one plane's strip of columns. Its rows stream through a ring of 2 * radius_y + kRows
// horizontally blurred rows that stays in the second-level cache; every kRows new rows let the
// vertical pass finish kRows rows of output. Each output is one sum in the fixed order of the taps,
// so neither the split into tasks nor the register tile it falls in changes a bit of it.
#include "elements.h"
#include "gaussian_blur/correlate.h"
#include "gaussian_blur/gaussian_blur.h"
#include "gaussian_blur/lines.h"
#include "parallel.h"
#include "simd.h"

namespace msvq {
namespace MSVQ_ISA {
namespace {

constexpr int64_t kStrip = 1024;     // elements of a strip: the ring of k = 31 takes 154 KiB
constexpr int64_t kChannels = 64;    // channels of a strip of a channels_last tensor
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

template <class T>
struct StripBlur {
  StripBlur(const GaussianBlurParams& p, const AxisTaps& y, const AxisTaps& x, const Strip& s)
      : p(p),
        y(y),
        x(x),
        s(s),
        border(p.adjoint && p.border == Border::replicate ? Border::constant : p.border),
        scaled(p.adjoint && p.border == Border::reflect),
        collected(p.adjoint && p.border == Border::replicate),
        padded(s.pixels + 2 * x.radius),
        vectors(ceil_div(s.pixels * s.channels, kLanes)),
        ring_rows(2 * y.radius + kRows),
        ring_stride((vectors | 1) * kLanes),
        line_size(ceil_div(padded * s.channels, kLanes) * kLanes + 2 * kLanes),
        source(padded),
        line(kRows * line_size),
        ring(ring_rows * ring_stride),
        zeros(vectors * kLanes),
        staged(kRows * vectors * kLanes),
        lines(ring_rows) {
    for (int64_t i = 0; i < padded; ++i)
      source[i] = border_source(border, s.pixel - x.radius + i, p.width);
  }

  void run() {
    int64_t head = 0;  // the slot of row - radius
    for (int64_t row = s.row; row < s.row + s.rows; row += kRows) {
      const int64_t top = row - y.radius;
      for (int64_t k = row == s.row ? 0 : ring_rows - kRows; k < ring_rows; k += kRows)
        fill_ring(top + k, head + k, min(kRows, ring_rows - k));
      for (int64_t k = 0; k < ring_rows; ++k) lines[k] = blurred_row(top, k, head);
      blur_rows(row);
      head = wrap(head + kRows);
    }
  }

  int64_t wrap(int64_t i) const { return i >= ring_rows ? i - ring_rows : i; }
  float* slot(int64_t i) const { return ring.data + wrap(i) * ring_stride; }
  bool is_inside(int64_t row) const { return row >= 0 && row < p.height; }
  bool is_needed(int64_t row) const { return row < p.height + y.radius; }

  // Blurs `count` rows horizontally. All are read before the first is blurred: a load that spans
  // two stores still on their way to the cache would wait for both.
  void fill_ring(int64_t row, int64_t at, int64_t count) {
    float* out[kRows];
    for (int64_t t = 0; t < kRows; ++t) {
      const int64_t from = t < count ? ring_source(row + t) : -1;
      if (from >= 0) read_line(from, line.data + t * line_size);
      out[t] = from >= 0 ? slot(at + t) : nullptr;
    }
    bool blurred = false;
#if defined(__AVX512F__)
    if (s.channels == 1) blurred = blur_lines(x.taps, x.size, line.data, line_size, vectors, out);
#endif
    for (int64_t t = 0; t < kRows; ++t) {
      if (!out[t]) continue;
      const float* from = line.data + t * line_size;
      if (!blurred) blur_line(x.taps, x.size, from, s.channels, vectors, out[t]);
      if (!collected) continue;
      if (s.pixel == 0) collect(x.first.data, from, 0, out[t]);
      const int64_t last = p.width - 1 - s.pixel;
      if (last < s.pixels) collect(x.last.data, from, last, out[t]);
    }
  }

  // The image row whose blur the ring holds at position `row`, or -1: outside the image only the
  // circular border needs one of its own, the other borders' sources are in the ring already.
  int64_t ring_source(int64_t row) const {
    if (is_inside(row)) return row;
    if (border != Border::circular || !is_needed(row)) return -1;
    return border_source(border, row, p.height);
  }

  const float* blurred_row(int64_t top, int64_t k, int64_t head) const {
    const int64_t row = top + k;
    if (is_inside(row) || (border == Border::circular && is_needed(row))) return slot(head + k);
    const int64_t from = is_needed(row) ? border_source(border, row, p.height) : -1;
    return from < 0 ? zeros.data : slot(head + from - top);
  }

  const T* input(int64_t row) const {
    return static_cast<const T*>(p.x) + (s.plane * p.height + row) * p.width * p.inner + s.channel;
  }
  T* output(int64_t row) const {
    return static_cast<T*>(p.out) + ((s.plane * p.height + row) * p.width + s.pixel) * p.inner +
           s.channel;
  }

  // Reads a row and its borders into `line`.
  void read_line(int64_t row, float* line) {
    const T* from = input(row);
    const int64_t c = s.channels;
    const int64_t low = min(max(x.radius - s.pixel, 0), padded);
    const int64_t high = max(min(p.width - s.pixel + x.radius, padded), low);
    const int64_t first = s.pixel - x.radius + low;
    if (c == p.inner) {
      widen_row(from + first * c, line + low * c, (high - low) * c);
    } else {
      for (int64_t i = low; i < high; ++i) widen_row(from + source[i] * p.inner, line + i * c, c);
    }
    for (int64_t i = 0; i < low; ++i) read_pixel(from, i, line);
    for (int64_t i = high; i < padded; ++i) read_pixel(from, i, line);
    if (!scaled) return;
    if (p.width > 1) {
      for (int64_t i = 0; i < padded; ++i) {
        if (source[i] != 0 && source[i] != p.width - 1) continue;
        for (int64_t k = 0; k < c; ++k) line[i * c + k] *= 2;
      }
    }
    if (is_edge_row(row))
      for (int64_t i = 0; i < padded * c; ++i) line[i] *= 2;
  }

  void read_pixel(const T* from, int64_t i, float* line) {
    if (source[i] < 0) return;  // stays zero
    for (int64_t k = 0; k < s.channels; ++k)
      line[i * s.channels + k] = widen(from[source[i] * p.inner + k]);
  }

  bool is_edge_row(int64_t row) const { return p.height > 1 && (row == 0 || row == p.height - 1); }

  void collect(const float* taps, const float* line, int64_t pixel, float* out) {
    for (int64_t k = 0; k < s.channels; ++k) {
      const int64_t at = pixel * s.channels + k;
      float sum = 0;
      for (int64_t j = 0; j < x.size; ++j) sum += taps[j] * line[at + j * s.channels];
      out[at] = sum;
    }
  }

  // Blurs kRows rows of the ring vertically and writes those inside the strip.
  void blur_rows(int64_t row) {
    const int64_t count = min(kRows, s.row + s.rows - row);
    float* out[kRows];
    bool direct = false;  // sums go straight to the output where nothing is left to do to them
    if constexpr (sizeof(T) == sizeof(float))
      direct = !scaled && s.channels == p.inner && s.pixels * s.channels == vectors * kLanes;
    for (int t = 0; t < kRows; ++t) {
      out[t] = staged.data + t * vectors * kLanes;
      if constexpr (sizeof(T) == sizeof(float))
        if (direct && t < count) out[t] = output(row + t);
    }
    const char* ahead[kRows];
    for (int t = 0; t < kRows; ++t)
      ahead[t] = reinterpret_cast<const char*>(
          input(min(row + y.radius + kRows + t, p.height - 1)) + s.pixel * p.inner);
    blur_across(y.taps, y.radius, lines.data, vectors, out,
                {ahead, s.channels == p.inner ? kRows : 0, sizeof(T)});
    if (collected) {
      const int64_t last = p.height - 1 - row;
      if (row == 0) blur_across_once(y.first.data, y.size, lines.data, vectors, out[0]);
      if (last < count)
        blur_across_once(y.last.data, y.size, lines.data + last, vectors, out[last]);
    }
    if (direct) return;
    for (int t = 0; t < count; ++t) write_row(row + t, out[t]);
  }

  void write_row(int64_t row, float* sums) {
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
    if (c == p.inner) return narrow_row(sums, to, s.pixels * c);
    for (int64_t i = 0; i < s.pixels; ++i) narrow_row(sums + i * c, to + i * p.inner, c);
  }

  const GaussianBlurParams& p;
  const AxisTaps &y, &x;
  const Strip s;
  const Border border;
  const bool scaled;     // reflect: G^T = D G D^-1 with 1/2 at both ends of D's diagonal
  const bool collected;  // replicate: the edges collect what falls outside
  const int64_t padded, vectors, ring_rows;
  const int64_t
      ring_stride;  // an odd number of vectors: rows do not compete for the same lines of cache
  const int64_t line_size;  // with room to load whole vectors past the end
  Array<int64_t> source;    // the pixel that every position of `line` reads
  Array<float> line;        // kRows rows of the strip with their borders
  Array<float> ring;        // horizontally blurred rows
  Array<float> zeros;
  Array<float> staged;        // kRows rows of results
  Array<const float*> lines;  // the rows that the vertical pass reads
};

template <class T>
void blur(const GaussianBlurParams& p) {
  const AxisTaps y(p.taps_y, p.radius_y, p.height), x(p.taps_x, p.radius_x, p.width);
  const int64_t channels = min(p.inner, kChannels);
  const int64_t chunks = ceil_div(p.inner, channels);
  const int64_t work = p.planes * p.height * p.width * p.inner * (y.size + x.size);
  const int threads = static_cast<int>(max(min(p.threads, work / kGrain), 1));
  // Enough tasks for every thread: narrower strips cost little, shorter ones blur rows twice.
  const int64_t wanted = threads > 1 ? 2 * threads : 1;
  int64_t pixels = max(kStrip / channels / 16 * 16, channels == 1 ? 16 : 32);
  while (pixels > 64 && p.planes * chunks * ceil_div(p.width, pixels) < wanted) pixels /= 2;
  const int64_t strips = ceil_div(p.width, pixels);
  int64_t bands = ceil_div(wanted, p.planes * chunks * strips);
  bands = min(bands, max(p.height / (8 * max(p.radius_y, kRows)), 1));
  const int64_t rows = ceil_div(ceil_div(p.height, bands), kRows) * kRows;
  bands = ceil_div(p.height, rows);
  parallel_for(p.planes * chunks * strips * bands, threads, [&](int64_t task) {
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
    StripBlur<T>(p, y, x, s).run();
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
