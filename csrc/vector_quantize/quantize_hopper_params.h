// Vector quantization by a kernel for Hopper (sm_90a): D = 64, up to 1024 codes, rows whole in
// memory.
#pragma once
#include "vector_quantize/vector_quantize.h"

namespace msvq {

constexpr int kMostSums = 320;  // K whose sums fit in shared memory beside the codes

struct QuantizeHopperParams {
  const void* z;  // (N, 64); rows begin at multiples of 16 bytes
  LatentType type;
  int count, z_stride;    // N; elements from row to row
  const float* codebook;  // (K, 64), 16-byte aligned
  int num_codes;
  int64_t* codes;  // (N,)
  int16_t* keys;   // (N,): the codes to sum by, K for a row that is not finite; may be null
  void* z_q;       // like z; null for the search alone
  int z_q_stride;
  // Parts of every block: sum of (z - e)^2, rows of every code, and their sum. Counts and sums may
  // be null, and must be for more codes than kMostSums.
  double* errors;   // (blocks,)
  int32_t* counts;  // (blocks, K)
  float* sums;      // (blocks, K, 64)
};

// The sums where there are too many codes for them to fit beside the codes.
struct QuantizeHopperSums {
  const void* z;  // as above
  LatentType type;
  int count, z_stride;
  const int16_t* keys;
  int num_codes, parts;  // of the rows
  int32_t* counts;       // (parts, K)
  float* sums;           // (parts, K, 64)
};

// What the parts add up to.
struct QuantizeHopperTotals {
  int blocks, parts, num_codes;
  const double* errors;        // (blocks,)
  const int32_t* part_counts;  // (parts, K)
  const float* part_sums;      // (parts, K, 64)
  double factor;               // of the loss
  float* loss;                 // ()
  int64_t* counts;             // (K,)
  float* sums;                 // (K, 64)
};

// A CUDA error, or 0.
int vector_quantize_hopper(const QuantizeHopperParams& params, int blocks, int device,
                           void* stream);
int sum_rows_hopper(const QuantizeHopperSums& params, int device, void* stream);
int total_hopper(const QuantizeHopperTotals& totals, int device, void* stream);

// The same source on the host; `order` is that in which its threads take turns, 0 to 2.
void vector_quantize_hopper_on_host(const QuantizeHopperParams& params, int blocks, int order);
void sum_rows_hopper_on_host(const QuantizeHopperSums& params, int order);
void total_hopper_on_host(const QuantizeHopperTotals& totals);

}  // namespace msvq
