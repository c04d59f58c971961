// The quantizer for Hopper (sm_90a): what its parts share.
//
// A block stays on its multiprocessor with the codes in half precision in its shared memory, and
// takes one tile of 64 rows after another. Four warpgroups search (quantize_hopper_search.h) and
// hand their tiles on; the warps of the other two settle what the search leaves open and write the
// outputs (quantize_hopper_outputs.h). ARCHITECTURE.md has the bound that certifies a code.
#pragma once
#include "cuda/hopper.h"
#include "vector_quantize/quantize_hopper_params.h"

namespace msvq {

namespace cuda {

constexpr int kWidth = 64;        // D
constexpr int kMostCodes = 1024;  // K that fits
constexpr int kTile = 64;         // rows
constexpr int kSearchers = 4;     // warpgroups
constexpr int kAssistants = 8;    // warps
constexpr int kThreads = 128 * kSearchers + 32 * kAssistants;
constexpr int kSlots = 16;           // tiles on their way from the searchers to the assistants
constexpr int kLanes = 8;            // in which the scores of a row's pairs of codes are kept
constexpr int kNotFinite = 1 << 30;  // the code of a row with NaN or Inf: 0, marked
constexpr int kNoRow = -1;
constexpr int kOpen = -2;  // the search does not say

// The codes in shared memory: blocks of 8 codes by 8 values, 16 bytes a code.
constexpr int kAlong = 128;
constexpr int kAcross = 8 * kAlong;

// K rounded up to whole products.
MSVQ_WARPS_HOST int columns_of(int num_codes) {
  return (num_codes + kProductColumns - 1) / kProductColumns * kProductColumns;
}

// Two neighbouring codes share a score until they are told apart. Pair `number` of lane 4 p + q is
// what thread q of a quad holds of columns 32 p to 32 p + 31 of product number / 4.
constexpr int kPairsOfChunk = 4;
constexpr int kNumberMask = kMostCodes / kProductColumns * kPairsOfChunk - 1;  // 63
MSVQ_WARPS int pair_column(int lane, int number) {
  return number / kPairsOfChunk * kProductColumns + lane / 4 * 32 + number % kPairsOfChunk * 8 +
         lane % 4 * 2;
}

// A tile between its searcher and the assistants.
struct TileCodes {
  int codes[kTile];
  // Of an open row: every lane's best pair, and one bit per lane that says that this pair may hold
  // the nearest code, or that any pair of the lane may.
  uint8_t numbers[kTile][kLanes];
  uint8_t near[kTile], any[kTile];
};

// What has one size whatever K is comes first, at addresses that the compiler knows.
struct alignas(128) QuantizeShared {
  TileCodes ring[kSlots];
  uint64_t full[kSlots];   // the searcher has written
  uint64_t empty[kSlots];  // the assistants have read
  double errors[kAssistants];
  float norms[4];           // largest norm, rounded norm and rounding error of the codes; scale
  float shift[kWidth];      // mean of the codes, scaled
  float seeds[kMostCodes];  // half the squared norms, 1e30 where there is no code to be chosen

  MSVQ_WARPS char* codes() { return reinterpret_cast<char*>(this + 1); }
};

inline int quantize_shared_bytes(int num_codes) {
  return static_cast<int>(sizeof(QuantizeShared)) + columns_of(num_codes) / 8 * kAcross;
}

// Elements of rows, four at a time.
struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};
MSVQ_WARPS float4 load_four(const float* from) {
  return __ldg(reinterpret_cast<const float4*>(from));
}
MSVQ_WARPS float4 load_four(const Half* from) {
  const uint2 bits = __ldg(reinterpret_cast<const uint2*>(from));
  const float2 low = unpack_halves(bits.x), high = unpack_halves(bits.y);
  return make_float4(low.x, low.y, high.x, high.y);
}
MSVQ_WARPS float4 load_four(const Bfloat* from) {
  const uint2 bits = __ldg(reinterpret_cast<const uint2*>(from));
  const float2 low = unpack_bfloats(bits.x), high = unpack_bfloats(bits.y);
  return make_float4(low.x, low.y, high.x, high.y);
}
MSVQ_WARPS void store_four(float* to, const float4& x) { __stcs(reinterpret_cast<float4*>(to), x); }
MSVQ_WARPS void store_four(Half* to, const float4& x) {
  __stcs(reinterpret_cast<uint2*>(to), make_uint2(pack_halves(x.x, x.y), pack_halves(x.z, x.w)));
}
MSVQ_WARPS void store_four(Bfloat* to, const float4& x) {
  __stcs(reinterpret_cast<uint2*>(to), make_uint2(pack_bfloats(x.x, x.y), pack_bfloats(x.z, x.w)));
}

MSVQ_WARPS bool is_finite(float x) { return fabsf(x) <= 3.4028234663852886e38f; }
MSVQ_WARPS bool is_finite(const float4& x) {
  return is_finite(x.x) && is_finite(x.y) && is_finite(x.z) && is_finite(x.w);
}

}  // namespace cuda
}  // namespace msvq
