// The rows of an image around a tile on the CPU, and how the next tile's get there.
//
// Included by files compiled once per instruction set: everything lives in msvq::MSVQ_ISA.
#pragma once
#include <cstdint>

#include "elements.h"
#include "gaussian_blur/lines.h"
#include "simd.h"

namespace msvq {
namespace MSVQ_ISA {
namespace {

// `size` rows in float32; a tile's first is row 0, further down the image takes the places of the
// rows that no longer count.
struct Ring {
  // The stride is an odd number of vectors: rows do not compete for the same lines of cache.
  Ring(int64_t size, int64_t elements)
      : size(size), stride((ceil_div(elements, kLanes) | 1) * kLanes), memory(size * stride) {}

  float* row(int64_t k) const {
    const int64_t i = head + k;
    return memory.data + (i >= size ? i - size : i) * stride;
  }
  void advance(int64_t rows) { head = (head + rows) % size; }

  const int64_t size, stride;

 private:
  const Array<float> memory;
  int64_t head = 0;
};

// `rows` rows of `elements` values from `from` on, which lie `stride` values apart and become the
// last kLanes rows of the ring. With every vector of results a piece of them is asked for, and one
// that was asked for some vectors ago is read: all at once would wait for memory, and what was
// asked for long ago may have left the cache again. `reads` is false where they are only asked for.
template <class T>
struct NextRows {
  static constexpr int64_t kPiece = kLanes * kLanes;  // elements
  static constexpr int64_t kLater = 8;                // vectors

  NextRows(const Ring& ring, const T* from, int64_t stride, int64_t rows, int64_t elements,
           bool reads)
      : ring(ring), from(from), stride(stride), rows(rows), elements(elements), reads(reads) {}

  // Not to be a function of its own: a call of one that only asks would be dropped.
  __attribute__((always_inline)) void advance() {
    if (asked.row < rows) {
      const T* const piece = from + asked.row * stride + asked.at;
#pragma GCC unroll 16
      for (int64_t i = 0; i < kPiece; i += kLine / sizeof(T)) __builtin_prefetch(piece + i, 0, 3);
      asked.advance(elements);
    }
    if (++vectors > kLater && reads) read();
  }
  void finish() {
    while (reads && done.row < rows) read();
  }

 private:
  struct Place {
    void advance(int64_t elements) {
      at += kPiece;
      if (at < elements) return;
      at = 0;
      ++row;
    }
    int64_t row = 0, at = 0;
  };

  void read() {
    if (done.row >= rows) return;
    const T* const piece = from + done.row * stride + done.at;
    float* const to = ring.row(ring.size - kLanes + done.row) + done.at;
    if (elements - done.at < kPiece)
      widen_row(piece, to, elements - done.at);
    else
      widen_row(piece, to, kPiece);
    done.advance(elements);
  }

  const Ring& ring;
  const T* const from;
  const int64_t stride, rows, elements;
  const bool reads;
  Place asked, done;
  int64_t vectors = 0;
};

}  // namespace
}  // namespace MSVQ_ISA
}  // namespace msvq
