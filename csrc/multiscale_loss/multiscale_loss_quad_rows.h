// What the multi-scale loss's kernel of quads keeps in shared memory, what its threads do, and how
// they read x. See multiscale_loss_quads.h.
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

// T is the type of contributions and gradients, bfloat16 for both of 16 bits: kernels of their own
// would differ in a few conversions.
template <int kRadius, int kScales, class T>
struct QuadRows {
  using State = QuadState<kRadius, kScales>;
  static constexpr int kLevels = kScales - 1;
  static constexpr int kThreads = quad_threads(kRadius, kScales);
  static constexpr int kStaged = kStagedQuads, kCompared = kComparedQuads;

  const QuadParams<kRadius>& p;
  const QuadStrips& s;
  const QuadShared shared;
  int64_t origin;  // of the plane in the tensors
  int pixel, row, rows, top;
  int at[kScales];  // where every level's rows of this step begin in its ring

  MSVQ_DEVICE QuadRows(const QuadParams<kRadius>& params, char* memory)
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

  // Of its warp's 8 x 32 values a thread blurs eight of a row along it, and then its own column.
  MSVQ_DEVICE int along_row(int thread) const { return thread / 4 % 2 + thread / 8 % 4 * 2; }

  // What a thread does is a strip's, but for this.
  MSVQ_DEVICE void settle_once(int thread) const {
    task(kAlongTo, thread) =
        (thread / kWarp * kRows + along_row(thread)) * kWarpRow + thread % 4 * kRows;
  }

  // Columns that no pixel of the image is blurred from are nobody's.
  MSVQ_DEVICE void settle(int thread, State& state) const {
    const int along = thread / kWarp * kWarp + thread % 4 * kRows;
    task(kAlong, thread) = task(kAcross, thread) = kNoLevel << 16;
    MSVQ_NO_UNROLL
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
      const int from = border_source(s.border, pixel + x - s.lead[0], s.width);
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
    const int from = needed ? border_source(s.border, y, s.height) : -1;
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
};

}  // namespace cuda
}  // namespace msvq
