// The multi-scale loss on the CPU.
//
// A task is one plane's strip of columns and band of rows. Level l is x blurred l times; the last
// is the coarsest target. Rows stream through all levels at once, kLanes at a time: every level
// keeps its rows in a ring until the level above has blurred them and the coarsest has reached
// them. Then they are compared with the contributions and the gradients are written. All of it
// stays in the second-level cache. Squares are summed in float32 along a row and in float64 beyond
// it, one sum for every kLanes rows of a strip; strips do not depend on the number of threads, and
// neither does the order in which the sums are added.
#include "elements.h"
#include "gaussian_blur/correlate.h"
#include "gaussian_blur/lines.h"
#include "multiscale_loss/compare.h"
#include "multiscale_loss/multiscale_loss.h"
#include "parallel.h"
#include "simd.h"

namespace msvq {
namespace MSVQ_ISA {
namespace {

constexpr int64_t kCache = 768 << 10;  // bytes of rows of a strip
constexpr int64_t kChannels = 16;      // channels of a strip of a channels_last tensor
constexpr int64_t kGrain = 1 << 20;    // multiply-adds worth a thread

// How the images are cut. Only the rows of a band depend on the number of threads.
struct Cut {
  explicit Cut(const MultiscaleLossParams& p)
      : levels(p.num_scales - 1), radius(levels > 0 ? p.radius : 0) {
    channels = min(p.inner, kChannels);
    chunks = ceil_div(p.inner, channels);
    int64_t kept = kLanes;  // rows of a strip
    for (int64_t l = 0; l <= levels; ++l) kept += kept_rows(l);
    const int64_t least = max(4 * radius * levels, 64);  // or what lies around takes more time
    const int64_t fits = max(kCache / static_cast<int64_t>(sizeof(float)) / kept / channels, least);
    strips = ceil_div(p.width, fits);
    pixels = ceil_div(ceil_div(p.width, strips), kLanes) * kLanes;
    strips = ceil_div(p.width, pixels);
    groups = ceil_div(p.height, kLanes);
    const int64_t pieces = p.planes * chunks * strips;
    const int64_t work = p.planes * p.height * p.width * p.inner * (4 + levels * 4 * radius);
    threads = static_cast<int>(max(min(p.threads, work / kGrain), 1));
    int64_t wanted = ceil_div(threads > 1 ? 2 * threads : 1, pieces);
    wanted = min(wanted, max(p.height / max(2 * radius * levels, 16), 1));
    rows = ceil_div(groups, wanted) * kLanes;
    bands = ceil_div(p.height, rows);
    tasks = pieces * bands;
  }

  // Rows of a level that the level above still blurs, kLanes - 1 more where it is ahead of that
  // need; x is read again where it is compared. With three levels above x, these are also the rows
  // that wait for the coarsest: of level 1 at most 2 * radius, rounded up, and 2 * kLanes.
  int64_t kept_rows(int64_t l) const {
    static_assert(kMaxScales <= 4, "more levels wait longer");
    return l < levels ? ceil_div(2 * radius + 2 * kLanes, kLanes) * kLanes : kLanes;
  }

  const int64_t levels, radius;
  int64_t channels, chunks, pixels, strips, rows, bands, groups, tasks;
  int threads;
};

// Positions first to end - 1 of an axis; outside the image for the circular border alone.
struct Range {
  int64_t first, end;
  int64_t size() const { return end - first; }
};

struct Level {
  Range rows, columns;
  int64_t done;  // the first row that is not computed
  float* lines;  // `kept` of its rows
  int64_t kept, stride;
};

inline void widen_any(const void* from, ImageType type, int64_t at, float* to, int64_t n) {
  switch (type) {
    case ImageType::float32:
      return widen_row(static_cast<const float*>(from) + at, to, n);
    case ImageType::float16:
      return widen_row(static_cast<const float16*>(from) + at, to, n);
    case ImageType::bfloat16:
      return widen_row(static_cast<const bfloat16*>(from) + at, to, n);
    case ImageType::uint8:
      widen_row(static_cast<const uint8_t*>(from) + at, to, n);
      for (int64_t i = 0; i < n; ++i) to[i] = to[i] / 127.5f - 1.0f;
  }
}

inline void narrow_any(const float* from, void* to, ImageType type, int64_t at, int64_t n) {
  if (type == ImageType::float32) return narrow_row(from, static_cast<float*>(to) + at, n);
  if (type == ImageType::float16) return narrow_row(from, static_cast<float16*>(to) + at, n);
  narrow_row(from, static_cast<bfloat16*>(to) + at, n);
}

struct Strip {
  int64_t plane, pixel, pixels, channel, channels, row, rows;
};

struct StripLoss {
  StripLoss(const MultiscaleLossParams& p, const Cut& cut, const Strip& s, double* sums)
      : p(p),
        s(s),
        last(static_cast<int>(cut.levels)),
        radius(cut.radius),
        whole(s.channels == p.inner),
        past_cache(is_past_cache()),
        sums(sums),
        staged_stride(ceil_div(s.pixels * s.channels, kLanes) * kLanes),
        memory(lay_out(cut, nullptr)),
        sources(2 * radius + kLanes) {
    lay_out(cut, memory.data);
    const float upstream = p.upstream ? *p.upstream : 1.0f;
    for (int64_t m = 0; m <= last; ++m)
      row_of.factors[m] = static_cast<float>(2 * p.weights[m] * p.grad_factor * upstream);
  }

  void run() {
    for (int64_t row = s.row; row < s.row + s.rows; row += kLanes) {
      if (last > 0) advance(last, row + kLanes);
      compare(row);
    }
  }

  // Places everything in `base` and returns how many floats it takes.
  int64_t lay_out(const Cut& cut, float* base) {
    int64_t used = 0;
    const auto take = [&](int64_t n) {
      float* const at = base ? base + used : nullptr;
      used += ceil_div(n, kLanes) * kLanes;
      return at;
    };
    for (int l = 0; l <= last; ++l) {
      Level& level = levels[l];
      const int64_t around = (last - l) * radius;
      level.rows = clip(s.row - around, s.row + s.rows + around, p.height);
      level.columns = clip(s.pixel - around, s.pixel + s.pixels + around, p.width);
      level.done = level.rows.first;
      level.kept = cut.kept_rows(l);
      // Odd numbers of vectors: rows do not compete for the same lines of cache.
      level.stride = (ceil_div(level.columns.size() * s.channels, kLanes) | 1) * kLanes;
      level.lines = take(level.kept * level.stride);
    }
    zeros = take(levels[0].stride);
    columns =
        take(last > 0 ? (levels[1].columns.size() + 2 * radius + kLanes) * s.channels * kLanes : 0);
    for (float*& row : staged) row = take(staged_stride);
    return used;
  }

  Range clip(int64_t first, int64_t end, int64_t length) const {
    if (p.border == Border::circular) return {first, end};
    return {max(first, 0), min(end, length)};
  }

  float* line(const Level& level, int64_t row) const {
    return level.lines + (row - level.rows.first) % level.kept * level.stride;
  }

  // Computes the rows of a level before `until`, kLanes at a time.
  void advance(int l, int64_t until) {
    Level& level = levels[l];
    while (level.done < min(until, level.rows.end)) {
      if (l > 0) advance(l - 1, level.done + kLanes + radius);
      if (l > 0) {
        blur(l);
      } else {
        read_rows();
      }
      level.done += kLanes;
    }
  }

  // Where a row of the plane begins in a tensor, at a pixel of the strip's channels.
  int64_t offset(int64_t row, int64_t pixel) const {
    return ((s.plane * p.height + row) * p.width + pixel) * p.inner + s.channel;
  }

  // Pixels of a row of the plane to `to`.
  void read(const void* from, ImageType type, int64_t row, int64_t pixel, int64_t pixels,
            float* to) const {
    if (whole) return widen_any(from, type, offset(row, pixel), to, pixels * s.channels);
    for (int64_t i = 0; i < pixels; ++i)
      widen_any(from, type, offset(row, pixel + i), to + i * s.channels, s.channels);
  }

  void read_rows() {
    const Level& level = levels[0];
    const int64_t end = min(level.done + kLanes, level.rows.end);
    for (int64_t row = level.done; row < end; ++row) {
      const int64_t from = border_source(p.border, row, p.height);
      float* const to = line(level, row) - level.columns.first * s.channels;
      int64_t i = level.columns.first;
      while (i < level.columns.end) {  // the circular border's columns pass the image's end
        const int64_t pixel = border_source(p.border, i, p.width);
        const int64_t pixels = min(level.columns.end - i, p.width - pixel);
        read(p.x, p.x_type, from, pixel, pixels, to + i * s.channels);
        i += pixels;
      }
    }
  }

  // Computes the next kLanes rows of a level from the rows of the level below.
  void blur(int l) {
    const Level &level = levels[l], &below = levels[l - 1];
    for (int64_t k = 0; k < 2 * radius + kLanes; ++k) {
      const int64_t row = level.done - radius + k;
      const bool real = p.border == Border::circular || (row >= 0 && row < p.height);
      const int64_t from = real ? row : border_source(p.border, row, p.height);
      // Rows past the end belong to outputs that nobody reads.
      const bool held = (real || from >= 0) && from >= below.rows.first && from < below.rows.end;
      sources[k] = held ? line(below, from) : zeros;
    }
    const int64_t origin = level.columns.first - radius, c = s.channels;
    const char* rows[(2 * kMaxScales + 1) * kLanes];
    blur_down(p.taps, radius, sources.data, below.columns.size() * c,
              column(below.columns.first - origin, 0), ahead(l, rows));
    fill(origin, below.columns.first, origin);
    fill(below.columns.end, level.columns.end + radius, origin);
    float* const to = line(level, level.done);
    const int64_t stride = level.stride;
    blur_along(p.taps, radius, columns, level.columns.size(), c,
               [=](int64_t at, const vfloat(&rows)[kLanes]) __attribute__((always_inline)) {
#pragma GCC unroll 16
                 for (int t = 0; t < kLanes; ++t) store(to + t * stride + at, rows[t]);
               });
  }

  float* column(int64_t pixel, int64_t channel) const {
    return columns + (pixel * s.channels + channel) * kLanes;
  }

  // Copies or clears columns outside the image.
  void fill(int64_t first, int64_t end, int64_t origin) const {
    if (p.border == Border::circular) return;
    for (int64_t i = first; i < end; ++i) {
      const int64_t from = border_source(p.border, i, p.width);
      for (int64_t k = 0; k < s.channels; ++k)
        store(column(i - origin, k), from < 0 ? vfloat{} : load(column(from - origin, k)));
    }
  }

  // What will be read or written next while level l is blurred vertically: x, or what the rows are
  // compared with.
  Ahead ahead(int l, const char** rows) const {
    int64_t count = 0;
    const int64_t bytes = p.type == ImageType::float32 ? sizeof(float) : 2;
    const auto add = [&](const void* tensor, int64_t row, int64_t pixel) {
      const int64_t at = offset(min(row, p.height - 1), pixel) * bytes;
      if (tensor && whole) rows[count++] = static_cast<const char*>(tensor) + at;
    };
    for (int t = 0; t < kLanes; ++t) {
      if (l == last)
        for (int m = 0; m <= last; ++m) {
          add(p.contributions[m], levels[l].done + t, s.pixel);
          if (!past_cache) add(p.grads[m], levels[l].done + t, s.pixel);
        }
      if (l == 1 && p.x_type == p.type && p.border != Border::circular)
        add(p.x, levels[0].done + t, levels[0].columns.first);
    }
    return {rows, count, bytes};
  }

  const float* row_to_read(const void* from, ImageType type, int64_t row, float* staged) const {
    if (whole && type == ImageType::float32)
      return static_cast<const float*>(from) + offset(row, s.pixel);
    read(from, type, row, s.pixel, s.pixels, staged);
    return staged;
  }

  void compare(int64_t row) {
    const bool direct = whole && p.type == ImageType::float32;
    double* const sum = sums ? sums + row / kLanes * kMaxScales : unused;
    for (int64_t end = min(row + kLanes, s.row + s.rows); row < end; ++row) {
      for (int m = 0; m <= last; ++m) {
        const Level& level = levels[last - m];
        row_of.targets[m] = m == last
                                ? row_to_read(p.x, p.x_type, row, staged[2 * kMaxScales])
                                : line(level, row) + (s.pixel - level.columns.first) * s.channels;
        row_of.contributions[m] = row_to_read(p.contributions[m], p.type, row, staged[m]);
        row_of.grads[m] = !p.grads[m] ? nullptr
                          : direct    ? static_cast<float*>(p.grads[m]) + offset(row, s.pixel)
                                      : staged[kMaxScales + m];
      }
      compare_row(sum);
      for (int m = 0; m <= last; ++m)
        if (p.grads[m] && !direct) write(row_of.grads[m], p.grads[m], row);
    }
  }

  void compare_row(double* sum) const {
    past_cache ? compare_row<true>(sum) : compare_row<false>(sum);
  }
  template <bool kPastCache>
  void compare_row(double* sum) const {
    const int64_t n = s.pixels * s.channels;
    if (last == 0) return MSVQ_ISA::compare_row<1, kPastCache>(row_of, n, sum);
    if (last == 1) return MSVQ_ISA::compare_row<2, kPastCache>(row_of, n, sum);
    if (last == 2) return MSVQ_ISA::compare_row<3, kPastCache>(row_of, n, sum);
    MSVQ_ISA::compare_row<4, kPastCache>(row_of, n, sum);
  }

  // Whether the gradients go to memory past the cache.
  bool is_past_cache() const {
    if (!whole || p.type != ImageType::float32) return false;
    const int64_t row = p.width * p.inner;
    for (int64_t m = 0; m <= last; ++m)
      if (p.grads[m] == p.contributions[m] ||
          (p.grads[m] && !goes_past_cache(p.grads[m], row, p.planes * p.height)))
        return false;
    return true;
  }

  void write(const float* from, void* to, int64_t row) const {
    if (whole) return narrow_any(from, to, p.type, offset(row, s.pixel), s.pixels * s.channels);
    for (int64_t i = 0; i < s.pixels; ++i)
      narrow_any(from + i * s.channels, to, p.type, offset(row, s.pixel + i), s.channels);
  }

  const MultiscaleLossParams& p;
  const Strip s;
  const int last;
  const int64_t radius;
  const bool whole;       // the strip holds all channels of its pixels
  const bool past_cache;  // the gradients are more than a cache keeps
  double* const sums;     // of every kLanes rows of the strip, kMaxScales each; null: none
  const int64_t staged_stride;
  Level levels[kMaxScales];
  float* zeros;
  float* columns;                     // of a tile, blurred down: its rows are the lanes
  float* staged[2 * kMaxScales + 1];  // contributions, gradients, x
  const Array<float> memory;
  const Array<const float*> sources;
  Rows row_of;
  double unused[kMaxScales];
};

// Adds the sums in their order and writes the loss.
void finish(const MultiscaleLossParams& p, const double* sums, int64_t count) {
  double weighted = 0;
  for (int64_t m = 0; m < p.num_scales; ++m) {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += sums[i * kMaxScales + m];
    weighted += p.weights[m] * (sum * p.loss_factor);
    p.per_scale[m] = static_cast<float>(sum * p.loss_factor);
  }
  *p.loss = static_cast<float>(weighted);
}

}  // namespace

void multiscale_loss(const MultiscaleLossParams& p) {
  if (p.planes * p.height * p.width * p.inner == 0) {
    if (p.loss) finish(p, nullptr, 0);
    return;
  }
  const Cut cut(p);
  const int64_t count = p.planes * cut.chunks * cut.strips * cut.groups;
  const Array<double> sums(p.loss ? count * kMaxScales : 1);
  parallel_for(cut.tasks, cut.threads, [&](int64_t task) {
    Strip s;
    s.row = task % cut.bands * cut.rows;
    s.rows = min(cut.rows, p.height - s.row);
    const int64_t piece = task / cut.bands;
    task = piece;
    s.pixel = task % cut.strips * cut.pixels;
    s.pixels = min(cut.pixels, p.width - s.pixel);
    task /= cut.strips;
    s.channel = task % cut.chunks * cut.channels;
    s.channels = min(cut.channels, p.inner - s.channel);
    s.plane = task / cut.chunks;
    double* const of_piece = p.loss ? sums.data + piece * cut.groups * kMaxScales : nullptr;
    StripLoss(p, cut, s, of_piece).run();
    finish_stores();
  });
  if (p.loss) finish(p, sums.data, count);
}

}  // namespace MSVQ_ISA
}  // namespace msvq
