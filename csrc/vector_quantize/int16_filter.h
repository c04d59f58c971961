// The filter's scores from products of 16-bit integers (AVX-512-VNNI).
//
// The longest code is scaled to a length between 2^14 and 2^15, a row to less than 2^15, both by
// powers of two, and their values are rounded to integers: at D = 64 some four bits more of a value
// than a bfloat16 keeps, at the same rate. A score, |c|^2 / 2 - x.c in these units, fits 32 bits,
// so its sum is exact: it differs from the truth by what rounding values took, at most `half` in
// length for each vector.
#pragma once
#include "vector_quantize/packed_codes.h"
#include "vector_quantize/scores.h"

#if defined(__AVX512F__)
#include <immintrin.h>

namespace msvq {
namespace MSVQ_ISA {

#define MSVQ_INT16_TARGET __attribute__((target("avx512vnni")))
#define MSVQ_INT16_INLINE MSVQ_INT16_TARGET __attribute__((always_inline)) inline

typedef LaneBest<vint> Int16Best;

// No code scores so much: the start of a running best, and the seed of slots without a code.
constexpr int32_t kNoScore = 0x68000000;

inline bool int16_products_available() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512vnni");
}

inline void clear(Int16Best* state) { state->best = state->second = vint{} + kNoScore; }

// Two neighbouring d of every lane in a word.
inline __m512i pair_of(__m512 even, __m512 odd) {
  const __m512i high = _mm512_slli_epi32(_mm512_cvtps_epi32(odd), 16);
  return _mm512_mask_blend_epi16(0xAAAAAAAAu, _mm512_cvtps_epi32(even), high);
}

// Rounds the codes of float32 panels to pairs of integers in place, where that can leave few of a
// row's codes open: where codes are of similar length, and numbers far from float32's ends. Seeds
// and norms keep float32's units.
inline void narrow_panels(int threads, PackedCodes* out) {
  constexpr double kLongest = 4;  // of the codes, in mean lengths; twice as long, half are open
  double squares = 0;
  for (int64_t slot = 0; slot < out->count; ++slot) {
    const double norm = out->norms[slot];
    squares += norm * norm;
  }
  const double mean_square = squares / static_cast<double>(out->count);
  int exponent = 0;
  frexp(out->max_norm * 1.0015, &exponent);
  const float grow = static_cast<float>(ldexp(1.0, 15 - exponent)), scale = out->scale * grow;
  const bool similar = out->max_norm * out->max_norm <= kLongest * kLongest * mean_square;
  if (!similar || !(scale > 0x1p-100f && scale < 0x1p100f) || out->count > 1 << 17) return;
  out->filter = Filter::int16;
  out->scale = scale;
  out->max_norm *= grow;
  out->half = 0.5 * __builtin_sqrt(static_cast<double>(out->width)) * (1 + 1e-6) + 0.01;
  out->tag_bits = 5;
  while (int64_t{1} << out->tag_bits < out->panel_count * kPanel) ++out->tag_bits;
  const double unit = static_cast<double>(grow) * grow / (1 - out->seed_error);
  parallel_for(out->panel_count, threads, [&](int64_t p) {
    float* panel = out->panels + p * kPanel * out->width;
    const __m512 factor = _mm512_set1_ps(grow);
    for (int64_t d = 0; d < out->width; d += 2)
      for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
        const float* c = panel + d * kPanel + lane;
        const bool last = d + 1 == out->width;
        const __m512 odd = last ? _mm512_setzero_ps() : _mm512_loadu_ps(c + kPanel);
        const __m512i words =
            pair_of(_mm512_mul_ps(_mm512_loadu_ps(c), factor), _mm512_mul_ps(odd, factor));
        _mm512_storeu_si512(panel + d / 2 * kPanel + lane, words);
      }
    for (int64_t slot = p * kPanel; slot < (p + 1) * kPanel; ++slot)
      out->int_seeds[slot] = slot < out->count
                                 ? static_cast<int32_t>(__builtin_rint(out->seeds[slot] * unit))
                                 : kNoScore;
  });
}

// Rows of a block as integers.
struct Int16Rows {
  Scratch<uint32_t> pair;  // pair q of row r: r * pairs + q, or q * kBlockRows + r
  Scratch<Int16Best> state;
  float factor[kBlockRows];     // scales a row once more
  int32_t shift[kBlockRows];    // log2 of 1 / factor, which a code's seed is shifted by
  uint32_t window[kBlockRows];  // codes that score no more above the best may be the nearest

  explicit Int16Rows(const PackedCodes& codes)
      : pair(codes.filter == Filter::int16 ? kBlockRows * pairs(codes.width) : 0),
        state(codes.filter == Filter::int16 ? kBlockRows : 0) {}
};

// Chooses the scales of rows from upper bounds of their norms, which are set to infinity where the
// filter cannot be used.
inline void bound_rows(const PackedCodes& codes, float* norm, Int16Rows* rows) {
  constexpr int32_t kMostShift = 24;
  const float half = static_cast<float>(codes.half), most = static_cast<float>(codes.max_norm);
  // Seeds, below 2^29, are rounded to float32, to integers and by the shift; then the bits that a
  // slot's number takes.
  const float fixed = 32 + 3 + static_cast<float>(1 << codes.tag_bits);
  const float doubles = static_cast<float>(codes.width + 9) * 0x1p-52f;
  for (int64_t i = 0; i < kBlockRows; ++i) {
    int32_t shift = static_cast<int32_t>(bits_of(norm[i]) >> 23) - 127 - 14;
    shift = shift < 0 ? 0 : shift;
    const bool usable = shift <= kMostShift;
    shift = usable ? shift : 0;
    const float factor = float_of(static_cast<uint32_t>(127 - shift) << 23);
    const float both = norm[i] + most;
    const float error = half * (most + half + norm[i] * factor) + fixed;
    const float window = 2.002f * error + doubles * both * both * factor + 2;
    rows->shift[i] = shift;
    rows->factor[i] = usable ? factor : 0;
    rows->window[i] = usable ? static_cast<uint32_t>(window) : ~0u;
    norm[i] = usable ? norm[i] : __builtin_inff();
  }
}

// Rounds a row that is centred and scaled.
inline void narrow_row_to_pairs(const float* x, float factor, int64_t width, uint32_t* out) {
  const auto rounded = [&](__m512 values) {
    const __m512 scaled = _mm512_mul_ps(values, _mm512_set1_ps(factor));
    return _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(scaled));
  };
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + d / 2), rounded(_mm512_loadu_ps(x + d)));
  if (d == width) return;
  const __mmask16 some = static_cast<__mmask16>((1u << (width - d)) - 1);
  const __mmask8 words = static_cast<__mmask8>((1u << pairs(width - d)) - 1);
  _mm256_mask_storeu_epi32(out + d / 2, words, rounded(_mm512_maskz_loadu_ps(some, x + d)));
}

// The same for the rows of a block that lie d by d.
inline void narrow_columns_to_pairs(const float* x, int64_t width, Int16Rows* rows) {
  for (int64_t row = 0; row < kBlockRows; row += kLanes) {
    const __m512 f = _mm512_loadu_ps(&rows->factor[row]);
    for (int64_t d = 0; d < width; d += 2) {
      const float* p = x + d * kBlockRows + row;
      const __m512 odd = d + 1 < width ? _mm512_loadu_ps(p + kBlockRows) : _mm512_setzero_ps();
      const __m512i words = pair_of(_mm512_mul_ps(_mm512_loadu_ps(p), f), _mm512_mul_ps(odd, f));
      _mm512_storeu_si512(&rows->pair[d / 2 * kBlockRows + row], words);
    }
  }
}

// sum += the products of both numbers of every lane's words. Written out because GCC 12 copies
// every sum around its intrinsic (7.3 products a nanosecond in the scan where this makes 8).
MSVQ_INT16_INLINE void add_products(__m512i a, __m512i b, __m512i* sum) {
  asm("vpdpwssd %2, %1, %0" : "+v"(*sum) : "v"(a), "v"(b));
}

// Scores of a panel for kRows rows, whose pair q is x[r * ld + q] or x[q * ld + r].
template <int kRows, bool kByRow>
MSVQ_INT16_INLINE void score_pairs(const uint32_t* x, int64_t ld, const int32_t* shift,
                                   const PackedCodes& codes, int64_t p,
                                   __m512i (&score)[kRows][2]) {
  const int64_t count = pairs(codes.width), left = codes.count - p * kPanel;
  const uint32_t lanes = left < kPanel ? (1u << left) - 1 : ~0u;  // those that hold a code
  const __mmask16 some0 = static_cast<__mmask16>(lanes);
  const __mmask16 some1 = static_cast<__mmask16>(lanes >> kLanes);
  const float* panel = codes.panels + p * kPanel * codes.width;
  const __m512i seed0 = _mm512_loadu_si512(&codes.int_seeds[p * kPanel]);
  const __m512i seed1 = _mm512_loadu_si512(&codes.int_seeds[p * kPanel + kLanes]);
  __m512i sum[kRows][2];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    const __m512i by = _mm512_set1_epi32(shift[r]);
    sum[r][0] = _mm512_mask_srav_epi32(seed0, some0, seed0, by);
    sum[r][1] = _mm512_mask_srav_epi32(seed1, some1, seed1, by);
  }
#pragma GCC unroll 2
  for (int64_t q = 0; q < count; ++q) {
    const __m512i c0 = _mm512_loadu_si512(panel + q * kPanel);
    const __m512i c1 = _mm512_loadu_si512(panel + q * kPanel + kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const uint32_t word = kByRow ? x[r * ld + q] : x[q * ld + r];
      const __m512i b = _mm512_set1_epi32(static_cast<int>(word));
      add_products(b, c0, &sum[r][0]);
      add_products(b, c1, &sum[r][1]);
    }
  }
  // A slot's number makes every score of a row another one.
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i slot0 = _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int>(p * kPanel)));
  const __m512i slot1 = _mm512_add_epi32(slot0, _mm512_set1_epi32(kLanes));
  const __m512i rest = _mm512_set1_epi32(-(1 << codes.tag_bits));
  constexpr int kAndOr = 0xEA;  // score & rest | slot
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    score[r][0] = _mm512_ternarylogic_epi32(sum[r][0], rest, slot0, kAndOr);
    score[r][1] = _mm512_ternarylogic_epi32(sum[r][1], rest, slot1, kAndOr);
  }
}

inline void keep_best(__m512i score, Int16Best* state) {
  const __m512i best = (__m512i)state->best, second = (__m512i)state->second;
  state->second = (vint)_mm512_min_epi32(second, _mm512_max_epi32(best, score));
  state->best = (vint)_mm512_min_epi32(best, score);
}

// Keeps the best of panel p for rows [*first, count), kRows at a time.
template <int kRows, bool kByRow>
MSVQ_INT16_INLINE void scan_panel(int64_t* first, int64_t count, const PackedCodes& codes,
                                  int64_t p, Int16Rows* rows) {
  const int64_t ld = kByRow ? pairs(codes.width) : kBlockRows;
  for (; *first + kRows <= count; *first += kRows) {
    __m512i score[kRows][2];
    score_pairs<kRows, kByRow>(&rows->pair[kByRow ? *first * ld : *first], ld, rows->shift + *first,
                               codes, p, score);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      Int16Best row = rows->state[*first + r];
      keep_best(score[r][0], &row);
      keep_best(score[r][1], &row);
      rows->state[*first + r] = row;
    }
  }
}

// Scores every code for `count` rows.
template <bool kByRow>
MSVQ_INT16_TARGET inline void scan_pairs(int64_t count, const PackedCodes& codes,
                                         const Ahead& ahead, Int16Rows* rows) {
  for (int64_t i = 0; i < kBlockRows; ++i) clear(&rows->state[i]);
  for (int64_t p = 0; p < codes.panel_count; ++p) {
    prefetch(ahead, p, codes.panel_count);
    int64_t first = 0;
    scan_panel<8, kByRow>(&first, count, codes, p, rows);
    scan_panel<1, kByRow>(&first, count, codes, p, rows);
  }
}

// The slots of panel p that score up to `limit` for row `i`, as bits.
template <bool kByRow>
MSVQ_INT16_TARGET inline uint64_t slots_up_to(double limit, const Int16Rows& rows, int64_t i,
                                              const PackedCodes& codes, int64_t p) {
  const int64_t ld = kByRow ? pairs(codes.width) : kBlockRows;
  __m512i score[1][2];
  score_pairs<1, kByRow>(&rows.pair[kByRow ? i * ld : i], ld, rows.shift + i, codes, p, score);
  return lanes_up_to((vint)score[0][0], limit) |
         static_cast<uint64_t>(lanes_up_to((vint)score[0][1], limit)) << kLanes;
}

// Best and second best of pairs of lanes, in the order of `low` and `high`.
inline Int16Best merge(__m512i best_low, __m512i best_high, __m512i second_low,
                       __m512i second_high) {
  const __m512i second = _mm512_min_epi32(second_low, second_high);
  return {(vint)_mm512_min_epi32(best_low, best_high),
          (vint)_mm512_min_epi32(second, _mm512_max_epi32(best_low, best_high))};
}

// The lowest and second lowest score of sixteen rows: halves of two rows' lanes are compared, then
// of four's, until a vector holds one lane of each.
inline Int16Best reduce_lanes(const Int16Best* rows) {
  const auto merge_all = [](int count, Int16Best* v, auto low, auto high)
                             __attribute__((always_inline)) {
                               for (int i = 0; i < count; i += 2) {
                                 const __m512i a = (__m512i)v[i].best, b = (__m512i)v[i + 1].best;
                                 const __m512i c = (__m512i)v[i].second;
                                 const __m512i d = (__m512i)v[i + 1].second;
                                 v[i / 2] = merge(low(a, b), high(a, b), low(c, d), high(c, d));
                               }
                             };
  Int16Best v[16];
  for (int i = 0; i < 16; ++i) v[i] = rows[i];
  merge_all(
      16, v, [](__m512i a, __m512i b) { return _mm512_unpacklo_epi32(a, b); },
      [](__m512i a, __m512i b) { return _mm512_unpackhi_epi32(a, b); });
  merge_all(
      8, v, [](__m512i a, __m512i b) { return _mm512_unpacklo_epi64(a, b); },
      [](__m512i a, __m512i b) { return _mm512_unpackhi_epi64(a, b); });
  const auto even = [](__m512i a, __m512i b) { return _mm512_shuffle_i32x4(a, b, 0x88); };
  const auto odd = [](__m512i a, __m512i b) { return _mm512_shuffle_i32x4(a, b, 0xdd); };
  merge_all(4, v, even, odd);
  merge_all(2, v, even, odd);
  return v[0];
}

}  // namespace MSVQ_ISA
}  // namespace msvq
#endif
