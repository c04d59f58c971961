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

// The squared norms of a thread's two rows, `a` being a warp's 16 rows: the diagonals of two products
// of them with themselves. Those of row g and of row g + 8 come out in lane 4 g + g / 2. What an
// infinity or a NaN makes of the other products stays beside the diagonal.
MSVQ_WARPS void squared_norms(const uint32_t (&a)[4][4], float (&squares)[2]) {
  const int lane = thread_again() % 32, g = lane / 4, from = lane / 4 * 4 + g / 2;
  float upper[4] = {0, 0, 0, 0}, lower[4] = {0, 0, 0, 0};
  MSVQ_UNROLL
  for (int i = 0; i < 16; i += 2) {  // a right side of 16 values would not lie side by side
    const uint32_t(&of)[4] = a[i / 4];
    multiply_eight(upper, of[i % 4], of[i % 4 + 1], of[i % 4]);
    multiply_eight(lower, of[i % 4], of[i % 4 + 1], of[i % 4 + 1]);
  }
  squares[0] = __shfl_sync(~0u, g % 2 ? upper[1] : upper[0], from);
  squares[1] = __shfl_sync(~0u, g % 2 ? lower[3] : lower[2], from);
}

// A tile as the product's left side, and what separates the scores of a thread's two rows from
// their exact values. Thread 32 w + 4 g + q has, of rows 16 w + g and 8 further, of every 16 values
// 4 q ... 4 q + 3.
template <class T>
MSVQ_WARPS void load_tile(const QuantizeShared& shared, const T* rows, uint32_t (&a)[4][4],
                          float (&margin)[2]) {
  const int lane = thread_again() % 32, q = lane % 4;
  const float scale = shared.norms[3], code_norm = shared.norms[0], half_norm = shared.norms[1];
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
      a[s][h] = pack_halves(fmaf(x.x, scale, -shift.x), fmaf(x.y, scale, -shift.y));
      a[s][2 + h] = pack_halves(fmaf(x.z, scale, -shift.z), fmaf(x.w, scale, -shift.w));
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
  MSVQ_UNROLL
  for (int h = 0; h < 2; ++h) {
    // Of the rounded row and of its error, that of the one rounding to float32 within its 1.002.
    const float row_norm = quick_root(squares[h]) * 1.001f + 1e-15f;
    const float row_error = quick_root(powers[h]) * (1.002f / 2048) + 2.5e-7f;
    const float both = row_norm + row_error + code_norm;
    float m = row_error * code_norm + row_norm * code_error;
    m += (kWidth + 32) * 1.2e-7f * row_norm * half_norm;
    m += (2 * kNumberMask + 8) * 1.2e-7f * code_norm * both;
    // Beyond float16 the error is infinite, of NaN it is NaN: no bound then.
    margin[h] = 2.02f * m + (kWidth + 8) * 2.3e-16f * both * both + 1e-30f;
  }
}

// The lowest two scores of each lane of two rows, with the number of the group in the lowest bits.
struct LowestScores {
  float first[2][2], second[2][2];  // row, half of the 64 columns

  MSVQ_WARPS LowestScores() {
    MSVQ_UNROLL
    for (int i = 0; i < 4; ++i) first[i / 2][i % 2] = second[i / 2][i % 2] = 0x1p127f;  // group 0
  }

  // Scores |c|^2 / 2 - x.c of a chunk of columns; `seeds` are those of this thread's columns.
  MSVQ_WARPS void add(const Accumulators& products, const float* seeds, int chunk) {
    MSVQ_UNROLL
    for (int i = 0; i < 2 * kGroupsOfChunk; ++i) {
      const int part = i / kGroupsOfChunk, number = chunk * kGroupsOfChunk + i % kGroupsOfChunk;
      const float2 low = *reinterpret_cast<const float2*>(seeds + 16 * i);
      const float2 high = *reinterpret_cast<const float2*>(seeds + 16 * i + 8);
      MSVQ_UNROLL
      for (int h = 0; h < 2; ++h) {
        const float* of = products + 8 * i + 2 * h;
        float score =
            fminf(fminf(low.x - of[0], low.y - of[1]), fminf(high.x - of[4], high.y - of[5]));
        score = __int_as_float((__float_as_int(score) & ~kNumberMask) | number);
        second[h][part] = fminf(second[h][part], fmaxf(first[h][part], score));
        first[h][part] = fminf(first[h][part], score);
      }
    }
  }
};

// A warpgroup waits for its products; meanwhile the others read the scores of theirs.
MSVQ_WARPS void score_groups(const uint32_t (&a)[4][4], QuantizeShared& shared, int num_codes,
                             LowestScores& lowest) {
  const float* seeds = shared.seeds + 2 * (thread_again() % 4);
  MatrixDescriptor codes(shared_address(shared.codes()), kAlong, kAcross);
  for (int chunk = 0; chunk * kProductColumns < num_codes; ++chunk) {
    Accumulators products;
    begin_products();
    MSVQ_UNROLL
    for (int s = 0; s < 4; ++s) multiply(products, a[s], codes + 2 * s * kAlong, s > 0);
    end_products();
    wait_products(products);
    lowest.add(products, seeds + chunk * kProductColumns, chunk);
    codes = codes + kProductColumns / 8 * kAcross;
  }
}

// Tells the codes of a group apart for every row: its first column in `column`, which all lanes of
// the row know. `code` becomes the nearest if the next is further than the margin, or else kNone.
// One product of a warp tells two rows; theirs are in quad g's lanes 2 (g % 2) and one further.
MSVQ_WARPS void tell_codes(const uint32_t (&a)[4][4], QuantizeShared& shared,
                           const int (&column)[2], const float (&margin)[2], int (&code)[2]) {
  code[1] = kNone;
  const int lane = thread_again() % 32, quad = lane / 4;
  const uint32_t from = shared_address(shared.codes()) + static_cast<uint32_t>(lane / 8 * kAlong);
  MSVQ_NO_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int of = h ? column[1] : column[0];
    float2 score = make_float2(0, 0);
    MSVQ_UNROLL
    for (int part = 0; part < 4; ++part) {
      // Lane l gives the address of code l % 4 of the group of row 2 part + l / 4 % 2.
      const int at = __shfl_sync(~0u, of, 8 * part + (lane & 4)) + code_of_group(lane % 4);
      const uint32_t address = from + static_cast<uint32_t>(at / 8 * kAcross + at % 8 * 16);
      uint32_t low[4], high[4];
      load_blocks(address, low);
      load_blocks(address + 4 * kAlong, high);
      float product[4] = {0, 0, 0, 0};
      multiply(product, a[0], low[0], low[1]);
      multiply(product, a[1], low[2], low[3]);
      multiply(product, a[2], high[0], high[1]);
      multiply(product, a[3], high[2], high[3]);
      if (quad / 2 == part)
        score = h ? make_float2(product[2], product[3]) : make_float2(product[0], product[1]);
    }
    const int pair = of + code_of_group(lane % 2 * 2);
    const float2 seed = *reinterpret_cast<const float2*>(shared.seeds + pair);
    score.x = seed.x - score.x, score.y = seed.y - score.y;
    const float low = fminf(score.x, score.y), high = fmaxf(score.x, score.y);
    const float other_low = __shfl_xor_sync(~0u, low, 1);
    const float other_high = __shfl_xor_sync(~0u, high, 1);
    int lowest = pair + (score.y < score.x ? 1 : 0);
    const int other = __shfl_xor_sync(~0u, lowest, 1);
    lowest = other_low < low ? other : lowest;
    const float next = fminf(fmaxf(low, other_low), fminf(high, other_high));
    const bool clear = next - fminf(low, other_low) > (h ? margin[1] : margin[0]);
    code[0] = code[1];
    code[1] = __shfl_sync(~0u, clear ? lowest : kNone, (lane & ~3) + quad % 2 * 2);
  }
}

// The code of row lane % 16 of a warp's, the first of which is number `first`; kNone if there is no
// such row or the search does not say. Those it adds to this warp's open rows.
MSVQ_WARPS int search_rows(const QuantizeHopperParams& p, QuantizeShared& shared,
                           const uint32_t (&a)[4][4], const float (&margin)[2], int first) {
  LowestScores lowest;
  score_groups(a, shared, p.num_codes, lowest);
  const int lane = thread_again() % 32, q = lane % 4, first_of_quad = lane & ~3;
  int column[2], code[2];
  uint32_t near_any[2], numbers[2];
  MSVQ_UNROLL
  for (int h = 0; h < 2; ++h) {
    const float limit = least_of_quad(fminf(lowest.first[h][0], lowest.first[h][1])) + margin[h];
    uint32_t near = 0, any = 0, number[2];
    MSVQ_UNROLL
    for (int part = 0; part < 2; ++part) {
      const float best = lowest.first[h][part], second = lowest.second[h][part];
      near |= (__ballot_sync(~0u, best <= limit) >> first_of_quad & 15) << (4 * part);
      any |= (__ballot_sync(~0u, second <= limit) >> first_of_quad & 15) << (4 * part);
      number[part] = static_cast<uint32_t>(__float_as_int(best) & kNumberMask);
    }
    if (!(limit < 1e29f)) near = any = 255;
    numbers[h] = number[0] | number[1] << 8;
    const int nearest = max(__ffs(static_cast<int>(near)) - 1, 0);
    const uint32_t of = __shfl_sync(~0u, numbers[h], first_of_quad + nearest % 4);
    column[h] = group_column(nearest, static_cast<int>(of >> (nearest / 4 * 8) & 255));
    near_any[h] = near | any << 8;
  }
  tell_codes(a, shared, column, margin, code);
  bool open[2];
  MSVQ_UNROLL
  for (int h = 0; h < 2; ++h) {
    const bool there = first + lane / 4 + 8 * h < p.count;
    if (__popc(near_any[h]) != 1 || near_any[h] > 255 || !there) code[h] = kNone;
    open[h] = there && code[h] == kNone;
  }
  const uint32_t opens[2] = {__ballot_sync(~0u, open[0]), __ballot_sync(~0u, open[1])};
  if (opens[0] | opens[1]) {
    int* const queued = &shared.queued[thread_again() / 32];
    OpenRow* queue = shared.open[thread_again() / 32] + *queued;
    const int more = __popc(opens[0] & 0x11111111) + __popc(opens[1] & 0x11111111);
    MSVQ_UNROLL
    for (int h = 0; h < 2; ++h) {
      uint32_t low = (numbers[h] & 255) << (8 * q), high = numbers[h] >> 8 << (8 * q);
      low |= __shfl_xor_sync(~0u, low, 1), high |= __shfl_xor_sync(~0u, high, 1);
      low |= __shfl_xor_sync(~0u, low, 2), high |= __shfl_xor_sync(~0u, high, 2);
      const uint32_t before = opens[h] & 0x11111111 & ((1u << first_of_quad) - 1);
      if (open[h] && q == 0)
        queue[__popc(before)] = {first + lane / 4 + 8 * h, near_any[h], {low, high}};
      queue += __popc(opens[h] & 0x11111111);
    }
    __syncwarp();
    if (lane == 0) *queued += more;
  }
  const int upper = __shfl_sync(~0u, code[0], lane % 8 * 4);
  const int lower = __shfl_sync(~0u, code[1], lane % 8 * 4);
  return lane % 16 < 8 ? upper : lower;
}

}  // namespace cuda
}  // namespace msvq
