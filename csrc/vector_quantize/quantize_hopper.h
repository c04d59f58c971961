// The quantizer for Hopper (sm_90a): what its parts share.
//
// A block stays on its multiprocessor with the codes in half precision in its shared memory, and
// the sums of up to 320 codes beside them. Each of its five warpgroups takes a tile of 64 rows,
// searches it (quantize_hopper_search.h), settles what the search leaves open
// (quantize_hopper_exact.h), writes the outputs (quantize_hopper_outputs.h) and takes the next,
// which by then is on its way into shared memory. ARCHITECTURE.md has the bound that certifies a
// code.
#pragma once
#include "cuda/hopper.h"
#include "vector_quantize/quantize_hopper_params.h"

namespace msvq {

namespace cuda {

constexpr int kWidth = 64;        // D
constexpr int kMostCodes = 1024;  // K that fits
constexpr int kTile = 64;         // rows
constexpr int kWarpgroups = 5;
constexpr int kWarps = 4 * kWarpgroups;
constexpr int kThreads = 32 * kWarps;
constexpr int kRows = kTile / 4;     // of a tile that are one warp's
constexpr int kLot = 4;              // open rows that a warp settles at once
constexpr int kNotFinite = 1 << 30;  // the code of a row with NaN or Inf: 0, marked
constexpr int kNone = -1;            // no row, or one whose code the search does not say

// The codes in shared memory: blocks of 8 codes by 8 values, 16 bytes a code.
constexpr int kAlong = 128;
constexpr int kAcross = 8 * kAlong;

// K rounded up to whole products.
MSVQ_WARPS_HOST int columns_of(int num_codes) {
  return (num_codes + kProductColumns - 1) / kProductColumns * kProductColumns;
}

// What a product adds to the others so that they become scores: of every code 16 values, in blocks
// as above. Values 2 i and 2 i + 1 are the seed, half the squared norm, of the code in chunk i of
// four, in two parts; value 8 + 2 i is what the row's offset is multiplied by, which keeps all
// scores positive: then they are in order as integers, of which one instruction finds the least of
// three.
constexpr int kSeedChunks = 4;
constexpr int kSeedAcross = 2 * kAlong;
constexpr int kSeedBytes = kProductColumns / 8 * kSeedAcross;  // of four chunks
constexpr int kAllSeedBytes = kMostCodes / kProductColumns / kSeedChunks * kSeedBytes;
MSVQ_WARPS uint32_t seed_place(int code) {
  const auto of = static_cast<uint32_t>(code), chunk = of / kProductColumns;
  return chunk / kSeedChunks * kSeedBytes + of % kProductColumns / 8 * kSeedAcross + of % 8 * 16 +
         chunk % kSeedChunks * 4;
}
constexpr uint32_t kOffsetFactor = 0x5C00, kOnes = 0x3C003C00;  // 256; 1 and 1
constexpr float kOffsetPart = 1.0f / 256;
constexpr uint32_t kNoCode = 0x7BFF;  // the largest number, in both parts: no code to be chosen

// Four codes share a score until they are told apart: a pair of neighbours and the pair eight
// further. The scores of a row's groups are kept in 8 lanes. Group `number` of lane 4 p + q is what
// thread q of a quad holds of 16 columns of product number / 2.
constexpr int kGroupsOfChunk = 2;
constexpr int kNumberMask = kMostCodes / kProductColumns * kGroupsOfChunk - 1;  // 31
MSVQ_WARPS int group_column(int lane, int number) {
  return number * (kProductColumns / kGroupsOfChunk) + lane / 4 * 16 + lane % 4 * 2;
}
MSVQ_WARPS int code_of_group(int i) { return i / 2 * 8 + i % 2; }

constexpr int kTable = 2048;  // entries of the one that finds repeated codes
constexpr int kTries = 4;     // of other bits of a hash

// A row whose code the search does not say.
struct alignas(16) OpenRow {
  int row;
  uint32_t near_any;    // bits of the lanes whose best group may hold the nearest code; 8 further,
                        // of those of which any group may
  uint32_t numbers[2];  // of every lane's best group, a byte each
};

// What has one size whatever K is comes first, at addresses that the compiler knows.
struct alignas(128) QuantizeShared {
  uint64_t loaded[kWarps];                 // a warp's rows of the next tile are there
  uint64_t turns[kWarps];                  // the warp before has added its rows to the sums
  OpenRow open[kWarps][kRows + kLot - 1];  // settled once there are kLot of them
  float norms[4];       // largest norm, rounded norm and rounding error of the codes; scale
  float shift[kWidth];  // mean of the codes, scaled
  alignas(128) char seeds[kAllSeedBytes];
  float errors[kThreads];  // parts of the sum of (z - e)^2
  int counts[kMostSums];
  int queued[kWarps];  // open rows
  int rounds;          // tiles of the block for every warpgroup

  MSVQ_WARPS uint32_t* seed(int code) {
    return reinterpret_cast<uint32_t*>(seeds + seed_place(code));
  }
  // All that a product reads must be finite, used or not.
  MSVQ_WARPS void clear_seeds() {
    for (int i = static_cast<int>(threadIdx.x); i < kAllSeedBytes / 4; i += kThreads)
      reinterpret_cast<uint32_t*>(seeds)[i] = 0;
  }
  // Within 2^-22 of itself and 2^-25. A code that must not be chosen is further than any other by
  // nearly 255 times the row's offset besides: further than any margin.
  MSVQ_WARPS void set_seed(int code, bool there, float x) {
    const float high = unpack_halves(pack_halves(x, 0)).x;
    *seed(code) = there ? pack_halves(x, x - high) : kNoCode << 16 | kNoCode;
    seed(code)[kAlong / 4] = there ? kOffsetFactor : kNoCode;
  }
  // Of a code and the next, the first being even.
  MSVQ_WARPS float2 two_seeds(int code) {
    const uint32_t* of = seed(code);
    const float2 own = unpack_halves(of[0]), next = unpack_halves(of[4]);
    return make_float2(own.x < 65504.0f ? own.x + own.y : 1e30f,
                       next.x < 65504.0f ? next.x + next.y : 1e30f);
  }

  MSVQ_WARPS char* codes() { return reinterpret_cast<char*>(this + 1); }
  MSVQ_WARPS char* rows(int num_codes) { return codes() + columns_of(num_codes) / 8 * kAcross; }
  template <class T>
  MSVQ_WARPS T* rows_of_warp(int num_codes, int warp) {  // (16, 64)
    return reinterpret_cast<T*>(rows(num_codes)) + warp * kRows * kWidth;
  }
  template <class T>
  MSVQ_WARPS float* sums(int num_codes) {  // (K + 1, 64); the last takes what no code does
    return reinterpret_cast<float*>(rows_of_warp<T>(num_codes, kWarps));
  }
};

template <class T>
int quantize_shared_bytes(int num_codes, bool with_sums) {
  constexpr int kRowsBytes = kWarps * kRows * kWidth * static_cast<int>(sizeof(T));
  static_assert(kRowsBytes >= 4 * (kMostCodes + kTable + kTries),
                "the tables of repeated codes fit there");
  return static_cast<int>(sizeof(QuantizeShared)) + columns_of(num_codes) / 8 * kAcross +
         kRowsBytes + (with_sums ? (num_codes + 1) * kWidth * 4 : 0);
}

// Elements of rows, four at a time.
struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};
MSVQ_WARPS float4 four_of(const float4& x, const float*) { return x; }
MSVQ_WARPS float4 four_of(const uint2& bits, const Half*) {
  const float2 low = unpack_halves(bits.x), high = unpack_halves(bits.y);
  return make_float4(low.x, low.y, high.x, high.y);
}
MSVQ_WARPS float4 four_of(const uint2& bits, const Bfloat*) {
  const float2 low = unpack_bfloats(bits.x), high = unpack_bfloats(bits.y);
  return make_float4(low.x, low.y, high.x, high.y);
}
template <class T>
struct Four {
  using Bits = uint2;
};
template <>
struct Four<float> {
  using Bits = float4;
};
// From shared memory, and from memory that does not change.
template <class T>
MSVQ_WARPS float4 read_four(const T* from) {
  return four_of(*reinterpret_cast<const typename Four<T>::Bits*>(from), from);
}
template <class T>
MSVQ_WARPS float4 load_four(const T* from) {
  return four_of(__ldg(reinterpret_cast<const typename Four<T>::Bits*>(from)), from);
}
template <class T>
MSVQ_WARPS void copy_four(T* to, const T* from) {
  using Bits = typename Four<T>::Bits;
  *reinterpret_cast<Bits*>(to) = __ldg(reinterpret_cast<const Bits*>(from));
}
MSVQ_WARPS void store_four(int sign, float* to, const float4& x) {
  store_where(sign, reinterpret_cast<float4*>(to), x);
}
MSVQ_WARPS void store_four(int sign, Half* to, const float4& x) {
  const uint2 bits = make_uint2(pack_halves(x.x, x.y), pack_halves(x.z, x.w));
  store_where(sign, reinterpret_cast<uint2*>(to), bits);
}
MSVQ_WARPS void store_four(int sign, Bfloat* to, const float4& x) {
  const uint2 bits = make_uint2(pack_bfloats(x.x, x.y), pack_bfloats(x.z, x.w));
  store_where(sign, reinterpret_cast<uint2*>(to), bits);
}

MSVQ_WARPS bool is_finite(float x) { return fabsf(x) <= 3.4028234663852886e38f; }
MSVQ_WARPS bool is_finite(const float4& x) {
  return is_finite(x.x) && is_finite(x.y) && is_finite(x.z) && is_finite(x.w);
}

}  // namespace cuda
}  // namespace msvq
