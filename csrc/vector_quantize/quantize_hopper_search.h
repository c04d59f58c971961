// The search of a warpgroup: a half-precision filter with a certified bound.
#pragma once
#include "vector_quantize/quantize_hopper.h"

namespace msvq {
namespace cuda {

// Begin to bring this warp's rows of a tile, if it is one, to where a copy finds them sooner.
template <class T>
MSVQ_WARPS void prefetch_rows(const QuantizeHopperParams& p, int tile) {
  const int first = tile * kTile + thread_again() / 32 % 4 * kRows;
  if (thread_again() % 32 != 0 || p.z_stride != kWidth || first + kRows > p.count) return;
  prefetch_bytes(static_cast<const T*>(p.z) + int64_t{first} * kWidth,
                 kRows * kWidth * static_cast<int>(sizeof(T)));
}

// Begin to copy this warp's rows of a tile.
template <class T>
MSVQ_WARPS void begin_rows(const QuantizeHopperParams& p, QuantizeShared& shared, int tile) {
  constexpr int kBytes = kWidth * static_cast<int>(sizeof(T));
  const int warp = thread_again() / 32, lane = thread_again() % 32;
  uint64_t* loaded = &shared.loaded[warp];
  const int first = tile * kTile + warp % 4 * kRows;
  const bool whole = p.z_stride == kWidth && first + kRows <= p.count;  // one piece of memory
  if (lane == 0) arrive_with_bytes(loaded, kRows * kBytes);
  __syncwarp();
  if (lane >= (whole ? 1 : kRows)) return;
  // Past the last row the last one again.
  const T* from = static_cast<const T*>(p.z) + int64_t{min(first + lane, p.count - 1)} * p.z_stride;
  copy_to_shared(shared.rows_of_warp<T>(p.num_codes, warp) + lane * kWidth, from,
                 whole ? kRows * kBytes : kBytes, loaded);
}

MSVQ_WARPS float least_of_quad(float x) {
  x = fminf(x, __shfl_xor_sync(~0u, x, 1));
  return fminf(x, __shfl_xor_sync(~0u, x, 2));
}

// The squared norms of a thread's two rows, `a` being a warp's 16 rows: the diagonals of two
// products of them with themselves. Those of row g and of row g + 8 come out in lane 4 g + g / 2.
// What an infinity or a NaN makes of the other products stays beside the diagonal.
MSVQ_WARPS void squared_norms(const uint32_t (&a)[4][4], float (&squares)[2]) {
  const int lane = thread_again() % 32, g = lane / 4, from = lane / 4 * 4 + g / 2;
  float upper[4] = {0, 0, 0, 0}, lower[4] = {0, 0, 0, 0};
  MSVQ_UNROLL
  for (int i = 0; i < 16; i += 2) {  // a right side of 16 values would not lie side by side
    const uint32_t (&of)[4] = a[i / 4];
    multiply_eight(upper, of[i % 4], of[i % 4 + 1], of[i % 4]);
    multiply_eight(lower, of[i % 4], of[i % 4 + 1], of[i % 4 + 1]);
  }
  squares[0] = __shfl_sync(~0u, g % 2 ? upper[1] : upper[0], from);
  squares[1] = __shfl_sync(~0u, g % 2 ? lower[3] : lower[2], from);
}

// A tile, negated, as the product's left side, the offset of a thread's two rows, and what
// separates their scores from exact values. Thread 32 w + 4 g + q has, of rows 16 w + g and 8
// further, of every 16 values 4 q ... 4 q + 3.
template <class T>
MSVQ_WARPS void load_tile(const QuantizeShared& shared, const T* rows, uint32_t (&a)[4][4],
                          uint32_t& offset, float (&margin)[2]) {
  const int lane = thread_again() % 32, q = lane % 4;
  const float scale = -shared.norms[3], code_norm = shared.norms[0], half_norm = shared.norms[1];
  const float code_error = shared.norms[2];
  MSVQ_UNROLL
  for (int s = 0; s < 4; ++s) {
    const float4 shift = *reinterpret_cast<const float4*>(shared.shift + 16 * s + 4 * q);
    MSVQ_UNROLL
    for (int h = 0; h < 2; ++h) {
      const float4 x = read_four(rows + (lane / 4 + 8 * h) * kWidth + 4 * q + 16 * s);
      // Exact but for the one rounding of a difference, the scale being a power of two. Where the
      // shift underflows it is off by less than the margin's last term; where it overflows, none
      // holds.
      a[s][h] = pack_halves(fmaf(x.x, scale, shift.x), fmaf(x.y, scale, shift.y));
      a[s][2 + h] = pack_halves(fmaf(x.z, scale, shift.z), fmaf(x.w, scale, shift.w));
    }
  }
  // A value whose half-precision form has the exponent's power p is off by 2^-11 p at most, p being
  // that form's exponent bits alone, and by 2^-25 where it is subnormal and those bits are 0. Thus
  // the error of a row is at most 2^-11 |p| + 8 2^-25, 1.7 times what it is on average, for half a
  // mask a value. Products and squares are exact; sums of 64 that are not negative are within
  // 64 2^-22 of themselves, however the tensor cores cut them off.
  float squares[2], powers[2];
  squared_norms(a, squares);
  uint32_t exponents[4][4];
  MSVQ_UNROLL
  for (int i = 0; i < 16; ++i) exponents[i / 4][i % 4] = a[i / 4][i % 4] & 0x7C007C00u;
  squared_norms(exponents, powers);
  const float norms[2] = {quick_root(squares[0]) * 1.001f + 1e-15f,
                          quick_root(squares[1]) * 1.001f + 1e-15f};
  // Both rows have one offset, of the larger; a NaN is not it.
  const float norm = fmaxf(norms[0], norms[1]);
  // No product x.c is below minus this, even after the roundings of its sum (norms are below 64).
  offset = pack_halves((norm * half_norm * 1.01f + 0.0625f) * kOffsetPart, 0);
  MSVQ_UNROLL
  for (int h = 0; h < 2; ++h) {
    // That of the one rounding to float32 is within the 1.002 too.
    const float error = quick_root(powers[h]) * (1.002f / 2048) + 2.5e-7f;
    const float both = norm + error + code_norm;
    float m = error * code_norm + norms[h] * code_error;
    // A sum's terms and itself are below 2 norm half_norm + code_norm^2, each of 80 is cut off.
    // What the number in the lowest bits takes is 2^-18 of a score, and a score is below twice
    // code_norm both; and the seed's parts 2^-22 of it. 1e-6 is for the offset's constant in both
    // and for subnormal parts.
    m += (kWidth + 48) * 1.2e-7f * (2.03f * norm * half_norm + code_norm * code_norm);
    m += (2 * kNumberMask + 12) * 1.2e-7f * code_norm * both + 1e-6f;
    // Beyond float16 the error is infinite, of NaN too: no bound then.
    margin[h] = 2.02f * m + (kWidth + 8) * 2.3e-16f * both * both + 1e-30f;
  }
}

// The lowest two scores of each lane of two rows, with the number of the group in the lowest bits.
// Scores are positive, or in order as integers wherever a margin holds.
struct LowestScores {
  int first[2][2], second[2][2];  // row, even or odd 16 of the columns

  MSVQ_WARPS LowestScores() {
    MSVQ_UNROLL
    for (int i = 0; i < 4; ++i) first[i / 2][i % 2] = second[i / 2][i % 2] = 0x7F000000;  // group 0
  }
  MSVQ_WARPS float best(int h, int part) const { return __int_as_float(first[h][part]); }
  MSVQ_WARPS float next(int h, int part) const { return __int_as_float(second[h][part]); }

  // The scores of a chunk of columns, |c|^2 / 2 - x.c and the row's offset.
  MSVQ_WARPS void add(const Accumulators& scores, int chunk) {
    MSVQ_UNROLL
    for (int part = 0; part < 2; ++part) MSVQ_UNROLL
    for (int h = 0; h < 2; ++h) {
      int of[kGroupsOfChunk];
      MSVQ_UNROLL
      for (int i = 0; i < kGroupsOfChunk; ++i) {
        const float* four = scores + 8 * (2 * i + part) + 2 * h;
        const int three = least_of_three(__float_as_int(four[0]), __float_as_int(four[1]),
                                         __float_as_int(four[4]));
        const int least = min(three, __float_as_int(four[5]));
        of[i] = (least & ~kNumberMask) | (chunk * kGroupsOfChunk + i);
      }
      const int low = min(of[0], of[1]), high = max(of[0], of[1]);
      second[h][part] = least_of_three(second[h][part], high, max(first[h][part], low));
      first[h][part] = min(first[h][part], low);
    }
  }
};

// A warpgroup waits for its products; meanwhile the others read the scores of theirs. What is added
// to products comes from a product too: values of accumulators that are set by anything else make
// each wait for the one before.
MSVQ_WARPS void score_groups(const uint32_t (&a)[4][4], uint32_t offset, QuantizeShared& shared,
                             int num_codes, LowestScores& lowest) {
  MatrixDescriptor codes(shared_address(shared.codes()), kAlong, kAcross);
  MatrixDescriptor seeds(again(shared_address(shared.seeds)), kAlong, kSeedAcross);
  for (int chunk = 0; chunk * kProductColumns < num_codes; ++chunk) {
    const bool own = thread_again() % 4 == chunk % kSeedChunks;
    const uint32_t ones = own ? kOnes : 0, of = own ? offset : 0;
    const uint32_t left[4] = {ones, ones, of, of};
    Accumulators products;
    begin_products();
    multiply(products, left, seeds, false);
    MSVQ_UNROLL
    for (int s = 0; s < 4; ++s) multiply(products, a[s], codes + 2 * s * kAlong, true);
    end_products();
    wait_products(products);
    lowest.add(products, chunk);
    codes = codes + kProductColumns / 8 * kAcross;
    seeds = seeds + (chunk % kSeedChunks == kSeedChunks - 1 ? kSeedBytes : 0);
  }
}

// From here on a lane has one row of its quad's two, the upper one in half of them; lanes 2 i and
// 2 i + 1 the same.
MSVQ_WARPS bool has_upper(int lane) { return lane / 4 % 2 == lane % 4 / 2; }

// Tells the codes of a group apart, its first column in `column`, which all lanes of a row know.
// Returns for this lane's row the nearest if the next is further than the margin, or else kNone.
// One product of a warp tells two rows: row i % 2 of a pair in columns 4 (i % 2) to 4 (i % 2) + 3,
// of the lower rows the other way round, so that they come out in the lanes which have them.
MSVQ_WARPS int tell_codes(const uint32_t (&a)[4][4], QuantizeShared& shared, const int (&column)[2],
                          const float (&margin)[2]) {
  const int lane = thread_again() % 32;
  const uint32_t from = shared_address(shared.codes()) + static_cast<uint32_t>(lane / 8 * kAlong);
  float2 score = make_float2(0, 0);
  MSVQ_NO_UNROLL
  for (int h = 0; h < 2; ++h) {
    // Lane q of a quad works out where code q of its row's group lies; lane l then needs code l % 4
    // of row 2 part + l / 4 % 2, or of its neighbour.
    const auto code = static_cast<uint32_t>((h ? column[1] : column[0]) + code_of_group(lane % 4));
    const uint32_t own = code / 8 * kAcross + code % 8 * 16;
    MSVQ_UNROLL
    for (int parts = 0; parts < 4; parts += 2) {  // two at once, since each waits for itself
      uint32_t values[2][2][4];
      float product[2][4] = {};
      MSVQ_UNROLL
      for (int i = 0; i < 2; ++i) {
        const uint32_t at = from + __shfl_sync(~0u, own, 8 * (parts + i) + (lane % 8 ^ 4 * h));
        load_blocks(at, values[i][0]);
        load_blocks(at + 4 * kAlong, values[i][1]);
      }
      MSVQ_UNROLL
      for (int s = 0; s < 8; ++s) {
        const uint32_t (&b)[4] = values[s % 2][s / 4];
        multiply(product[s % 2], a[s / 2], b[s / 2 % 2 * 2], b[s / 2 % 2 * 2 + 1]);
      }
      MSVQ_UNROLL
      for (int i = 0; i < 2; ++i) {
        const float (&of)[4] = product[i];
        if (lane / 8 == parts + i && has_upper(lane) == (h == 0))
          score = h ? make_float2(of[2], of[3]) : make_float2(of[0], of[1]);
      }
    }
  }
  const bool upper = has_upper(lane);
  const int pair = (upper ? column[0] : column[1]) + code_of_group(lane % 2 * 2);
  const float2 seeds = shared.two_seeds(pair);
  score.x += seeds.x, score.y += seeds.y;
  const float low = fminf(score.x, score.y), high = fmaxf(score.x, score.y);
  const float other_low = __shfl_xor_sync(~0u, low, 1);
  const float other_high = __shfl_xor_sync(~0u, high, 1);
  const int lowest = pair + (score.y < score.x ? 1 : 0), other = __shfl_xor_sync(~0u, lowest, 1);
  const float next = fminf(fmaxf(low, other_low), fminf(high, other_high));
  const bool clear = next - fminf(low, other_low) > (upper ? margin[0] : margin[1]);
  return clear ? (other_low < low ? other : lowest) : kNone;
}

// What an open row's lanes have left open.
MSVQ_WARPS OpenRow open_row(const LowestScores& lowest, int h, float limit) {
  const int lane = thread_again() % 32, q = lane % 4, first_of_quad = lane & ~3;
  OpenRow open{};
  uint32_t near = 0, any = 0;
  MSVQ_UNROLL
  for (int part = 0; part < 2; ++part) {
    const float best = lowest.best(h, part), second = lowest.next(h, part);
    near |= (__ballot_sync(~0u, best <= limit) >> first_of_quad & 15) << (4 * part);
    any |= (__ballot_sync(~0u, second <= limit) >> first_of_quad & 15) << (4 * part);
    uint32_t numbers = static_cast<uint32_t>(__float_as_int(best) & kNumberMask) << (8 * q);
    numbers |= __shfl_xor_sync(~0u, numbers, 1);
    open.numbers[part] = numbers | __shfl_xor_sync(~0u, numbers, 2);
  }
  open.near_any = limit < 1e29f ? near | any << 8 : 0xFFFF;
  return open;
}

// The code of row lane % 16 of a warp's, the first of which is number `first`; kNone if there is no
// such row or the search does not say. Those it adds to this warp's open rows.
MSVQ_WARPS int search_rows(const QuantizeHopperParams& p, QuantizeShared& shared,
                           const uint32_t (&a)[4][4], uint32_t offset, const float (&margin)[2],
                           int first) {
  LowestScores lowest;
  score_groups(a, offset, shared, p.num_codes, lowest);
  const int lane = thread_again() % 32;
  int column[2];
  bool certain[2];
  float limit[2];
  MSVQ_UNROLL
  for (int h = 0; h < 2; ++h) {
    const float best[2] = {lowest.best(h, 0), lowest.best(h, 1)};
    limit[h] = least_of_quad(fminf(best[0], best[1])) + margin[h];
    const bool near[2] = {best[0] <= limit[h], best[1] <= limit[h]};
    // Summed over the quad: how many groups are near the best, with a second one those lanes too,
    // and 256 times the column of the group if it is one.
    int found =
        near[0] + near[1] + (lowest.next(h, 0) <= limit[h]) + (lowest.next(h, 1) <= limit[h]);
    const int number = __float_as_int(near[1] ? best[1] : best[0]) & kNumberMask;
    const int own = group_column(lane % 4, number) << 8 | (near[1] ? group_column(4, 0) << 8 : 0);
    found += near[0] || near[1] ? own : 0;
    found += __shfl_xor_sync(~0u, found, 1);
    found += __shfl_xor_sync(~0u, found, 2);
    certain[h] = (found & 255) == 1 && limit[h] < 1e29f;
    column[h] = certain[h] ? found >> 8 : 0;
  }
  int code = tell_codes(a, shared, column, margin);
  const bool upper = has_upper(lane);
  const int row = first + lane / 4 + (upper ? 0 : 8);
  const bool there = row < p.count;
  if (!(upper ? certain[0] : certain[1]) || !there) code = kNone;
  const bool open = lane % 2 == 0 && there && code == kNone;
  const uint32_t opens = __ballot_sync(~0u, open);
  if (opens) {
    int* const queued = &shared.queued[thread_again() / 32];
    OpenRow* queue = shared.open[thread_again() / 32] + *queued;
    const OpenRow of[2] = {open_row(lowest, 0, again(limit[0])),
                           open_row(lowest, 1, again(limit[1]))};
    if (open) {
      OpenRow own = upper ? of[0] : of[1];
      own.row = row;
      queue[__popc(opens & ((1u << lane) - 1))] = own;
    }
    __syncwarp();
    if (lane == 0) *queued += __popc(opens);
  }
  // The lane that has row lane % 16: the first of its quad that does.
  const int quad = lane % 8, odd = quad % 2;
  return __shfl_sync(~0u, code, 4 * quad + 2 * (lane % 16 < 8 ? odd : 1 - odd));
}

}  // namespace cuda
}  // namespace msvq
