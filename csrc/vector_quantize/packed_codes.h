// The codebook as the search reads it: distinct finite codes, centred, scaled, in panels.
//
// Panel p holds codes p * kPanel ... of the packed order, d by d: panel[d * kPanel + lane]. Packed
// order is the codebook's order without repeated and non-finite codes, so the lowest packed slot
// is also the lowest index.
#pragma once
#include <math.h>

#include <cstdint>
#include <cstring>

#include "parallel.h"
#include "vector_quantize/rows.h"
#include "vector_quantize/split.h"

namespace msvq {
namespace MSVQ_ISA {

// The error of a score is at most `seed_error |c|^2 / 2 + dot_error |x| |c|`: rounding of D
// multiply-adds, of x, c and the seed, with a margin for terms of second order and for other
// orders of summation. Splitting x and c in two bfloat16 leaves out lo.lo and what is below lo, at
// most 2^-16 of the product each.
inline double rounding_error(int64_t width) {
  return 1.05 * static_cast<double>(width + 40) * 0x1p-24;
}
constexpr double kSplitError = 3.05 * 0x1p-16;

inline int64_t pairs(int64_t width) { return (width + 1) / 2; }

struct PackedCodes {
  float* panels;  // float32 columns, pairs of int16 (int16_filter.h) or tiles of bfloat16 (split.h)
  Filter filter;
  double seed_error, dot_error;
  double half;       // of int16: at most so long is what rounding takes from a vector
  int tag_bits;      // of a score, taken by the number of its slot, or of a vector of slots
  double tag_error;  // what they take away, relative to the score
  int64_t count, panel_count, width;
  Scratch<float> seeds, norms;  // (slots,), see pack()
  Scratch<int32_t> int_seeds;   // (slots,), of int16
  Scratch<float> mean;          // (D,)
  Scratch<int32_t> index;       // slot -> code
  float scale;                  // power of two: every |c_d| < 1, or |c| < 2^15 of int16
  double max_norm;

  // With `integers`, there is room to become int16 later.
  PackedCodes(int64_t num_codes, int64_t width, float* panels, Filter filter, bool integers)
      : panels(panels),
        filter(filter),
        seed_error(rounding_error(width)),
        dot_error(rounding_error(width) + (filter == Filter::split ? kSplitError : 0)),
        half(0),
        tag_bits(0),
        tag_error(0),
        count(0),
        panel_count(0),
        width(width),
        seeds(slots(num_codes)),
        norms(slots(num_codes)),
        int_seeds(integers ? slots(num_codes) : 0),
        mean(width),
        index(slots(num_codes)),
        scale(1),
        max_norm(0) {}

  static int64_t slots(int64_t num_codes) { return (num_codes + kPanel - 1) / kPanel * kPanel; }
};

// -0 and 0 are the same distance away, so they hash alike.
inline uint32_t hash_code(const float* e, int64_t width, bool* finite) {
  uint32_t hash = 0, bad = 0;
  for (int64_t d = 0; d < width; ++d) {
    const uint32_t bits = bits_of(e[d] + 0.0f);
    const uint32_t mixed = (bits ^ (bits >> 15)) * 0x9E3779B1u;
    hash += (mixed ^ (mixed >> 13)) * static_cast<uint32_t>(2 * d + 1);
    bad |= static_cast<uint32_t>((bits & 0x7f800000u) == 0x7f800000u);
  }
  *finite = bad == 0;
  return hash ^ (hash >> 16);
}

inline bool same_code(const float* a, const float* b, int64_t width) {
  for (int64_t d = 0; d < width; ++d)
    if (a[d] != b[d]) return false;
  return true;
}

// Fills `index` with the finite codes that differ from every code before them.
inline void find_distinct(const float* codebook, int64_t num_codes, int threads, PackedCodes* out) {
  const int64_t width = out->width;
  Scratch<uint32_t> hashes(num_codes);
  Scratch<uint8_t> finite(num_codes);
  constexpr int64_t kChunk = 256;
  parallel_for((num_codes + kChunk - 1) / kChunk, threads, [&](int64_t chunk) {
    for (int64_t k = chunk * kChunk; k < num_codes && k < (chunk + 1) * kChunk; ++k) {
      bool ok;
      hashes[k] = hash_code(codebook + k * width, width, &ok);
      finite[k] = ok;
    }
  });
  int64_t size = 4;
  while (size < 2 * num_codes) size *= 2;
  Scratch<int32_t> table(size);
  for (int64_t i = 0; i < size; ++i) table[i] = -1;
  for (int64_t k = 0; k < num_codes; ++k) {
    if (!finite[k]) continue;
    int64_t slot = hashes[k] & (size - 1);
    for (; table[slot] >= 0; slot = (slot + 1) & (size - 1))
      if (hashes[table[slot]] == hashes[k] &&
          same_code(codebook + table[slot] * width, codebook + k * width, width))
        break;
    if (table[slot] >= 0) continue;
    table[slot] = static_cast<int32_t>(k);
    out->index[out->count++] = static_cast<int32_t>(k);
  }
}

// Subtracts the mean and scales by a power of two; neither changes which code is nearest, the
// first removes a common offset from the rounding errors, the second under- and overflow.
inline void centre(const float* codebook, PackedCodes* out) {
  const int64_t width = out->width;
  Scratch<double> total(width);
  for (int64_t d = 0; d < width; ++d) total[d] = 0;
  for (int64_t i = 0; i < out->count; ++i) {
    const float* e = codebook + out->index[i] * width;
    for (int64_t d = 0; d < width; ++d) total[d] += e[d];
  }
  for (int64_t d = 0; d < width; ++d)
    out->mean[d] = static_cast<float>(total[d] / static_cast<double>(out->count));
  uint32_t bits = 0;  // of the largest: positive numbers and their bits have one order
  for (int64_t i = 0; i < out->count; ++i) {
    const float* e = codebook + out->index[i] * width;
    for (int64_t d = 0; d < width; ++d) {
      const uint32_t far = bits_of(__builtin_fabsf(e[d] * 0.25f - out->mean[d] * 0.25f));
      bits = far > bits ? far : bits;
    }
  }
  const float largest = float_of(bits);
  int exponent = 0;
  if (largest > 0) frexp(largest, &exponent);
  exponent = -(exponent + 2);
  exponent = exponent > 126 ? 126 : exponent < -126 ? -126 : exponent;
  out->scale = static_cast<float>(ldexp(1.0, exponent));
}

// A slot's score for a row x is `seed - x.c - error |x| |c|`: a lower bound of |c|^2/2 - x.c, half
// the squared distance up to a term of the row alone. Slots beyond the last code score more than
// any.
inline void pack_panels(const float* codebook, int threads, PackedCodes* out) {
  const int64_t width = out->width;
  out->panel_count = (out->count + kPanel - 1) / kPanel;
  while (int64_t{1} << out->tag_bits < out->panel_count * kPanel / kLanes) ++out->tag_bits;
  out->tag_error = ldexp(1.02, out->tag_bits - 23);
  Scratch<double> largest(out->panel_count);
  parallel_for(out->panel_count, threads, [&](int64_t p) {
    float* panel = out->panels + p * kPanel * width;
    const bool in_place = out->filter == Filter::float32;
    Scratch<float> exact(in_place ? 0 : kPanel * width);
    float* columns = in_place ? panel : exact.data;
    largest[p] = 0;
    for (int64_t lane = 0; lane < kPanel; ++lane) {
      const int64_t slot = p * kPanel + lane;
      if (slot >= out->count) {
        out->seeds[slot] = 3e38f;
        out->norms[slot] = 0;
        out->index[slot] = 0;
        for (int64_t d = 0; d < width; ++d) columns[d * kPanel + lane] = 0;
        continue;
      }
      const float* e = codebook + out->index[slot] * width;
      double square = 0;
      for (int64_t d = 0; d < width; ++d) {
        const double c = (static_cast<double>(e[d]) - out->mean[d]) * out->scale;
        square += c * c;
        columns[d * kPanel + lane] = static_cast<float>(c);
      }
      const double norm = __builtin_sqrt(square) * (1 + 1e-6);
      out->seeds[slot] = static_cast<float>(0.5 * square * (1 - out->seed_error));
      out->norms[slot] = static_cast<float>(norm);
      largest[p] = norm > largest[p] ? norm : largest[p];
    }
#ifdef MSVQ_AMX
    if (out->filter == Filter::split) split_panel(columns, width, panel);
#endif
  });
  for (int64_t p = 0; p < out->panel_count; ++p)
    out->max_norm = largest[p] > out->max_norm ? largest[p] : out->max_norm;
}

inline void pack(const float* codebook, int64_t num_codes, int threads, PackedCodes* out) {
  find_distinct(codebook, num_codes, threads, out);
  if (out->count == 0) return;
  centre(codebook, out);
  pack_panels(codebook, threads, out);
}

}  // namespace MSVQ_ISA
}  // namespace msvq
