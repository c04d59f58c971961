// Vector quantization by a kernel for Hopper (sm_90a): D = 64, up to 1024 codes, rows whole in
// memory.
#pragma once
#include "vector_quantize/vector_quantize.h"

namespace msvq {

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
  double* errors;  // sum of (z - e)^2 of every block
};

// A CUDA error, or 0.
int vector_quantize_hopper(const QuantizeHopperParams& params, int blocks, int device,
                           void* stream);

// The same source on the host; `order` is that in which its threads take turns, 0 to 2.
void vector_quantize_hopper_on_host(const QuantizeHopperParams& params, int blocks, int order);

}  // namespace msvq
