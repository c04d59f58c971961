// Vector quantization by a kernel for Hopper (sm_90a): D = 64, up to 1024 codes, rows whole in
// memory.
#pragma once
#include "vector_quantize/vector_quantize.h"

namespace msvq {

constexpr int kMostSums = 320;  // K whose sums fit in shared memory beside the codes
constexpr int kPiece = 256;     // sorted rows that a warp sums

struct QuantizeHopperParams {
  const void* z;  // (N, 64); rows begin at multiples of 16 bytes
  LatentType type;
  int count, z_stride;    // N; elements from row to row
  const float* codebook;  // (K, 64), 16-byte aligned
  int num_codes;
  int64_t* codes;  // (N,)
  int16_t* keys;   // (N,): the codes to sort by, K for a row that is not finite; may be null
  void* z_q;       // like z; null for the search alone
  int z_q_stride;
  // Parts of every block: sum of (z - e)^2, rows of every code, and their sum. Counts and sums may
  // be null, and must be for more codes than kMostSums.
  double* errors;   // (blocks,)
  int32_t* counts;  // (blocks, K)
  float* sums;      // (blocks, K, 64)
};

// What the parts add up to. Where there are too many codes for sums of blocks, the sums are those
// of pieces of kPiece rows that are sorted by code.
struct QuantizeHopperTotals {
  int blocks, num_codes;
  const double* errors;
  const int32_t* part_counts;
  float* part_sums;
  double factor;    // of the loss
  float* loss;      // ()
  int64_t* counts;  // (K,)
  float* sums;      // (K, 64)

  // For sorted rows; part_counts is null then, and part_sums (pieces, 2, 64): the sum of a piece's
  // rows of the code that the piece before ends with, and of that which the next begins with. Of a
  // code that is in no other piece the sum is there already.
  const int16_t* keys;   // (N,), sorted
  const int64_t* order;  // (N,): the row of each
  const void* z;
  LatentType type;
  int count, z_stride;
};

// A CUDA error, or 0.
int vector_quantize_hopper(const QuantizeHopperParams& params, int blocks, int device,
                           void* stream);
// The sums of sorted rows too.
int total_hopper(const QuantizeHopperTotals& totals, int device, void* stream);

// The same source on the host; `order` is that in which its threads take turns, 0 to 2.
void vector_quantize_hopper_on_host(const QuantizeHopperParams& params, int blocks, int order);
void total_hopper_on_host(const QuantizeHopperTotals& totals);

}  // namespace msvq
