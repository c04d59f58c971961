// Vector quantization (Eq. 1-4): nearest code, code vectors, loss and statistics; their backward.
//
// The contract is msvq_fast/ops/vector_quantize/reference.py: codes are the argmin of the float64
// distance summed in order of d, lowest index on ties. N rows are numbered outer-major:
// row n is (n / inner, n % inner).
#pragma once
#include <cstdint>

#include "simd.h"

namespace msvq {

// What the search multiplies before it measures what that leaves open: float32; integers of 16 bits
// (AVX-512-VNNI); or numbers split in two bfloat16 (AMX).
enum class Filter { float32, int16, split };

enum class LatentType { float32, float16, bfloat16 };

// Where element (outer, inner, d) of a tensor lies, in elements. Either `d` or `inner` is 1.
struct RowStrides {
  int64_t outer, inner, d;
};

struct VectorQuantizeParams {
  const void* z;
  LatentType type;
  int64_t outer, inner, width;  // N = outer * inner, D = width
  RowStrides z_strides;
  const float* codebook;  // (K, D)
  int64_t num_codes;
  int64_t* codes;  // (N,)
  // The rest is null for the search alone, which `sums` tells: empty tensors are null too.
  void* z_q;
  RowStrides z_q_strides;
  double* squared_error;  // sum of (z - e)^2
  int64_t* counts;        // (K,)
  float* sums;            // (K, D), with room for K rounded up to a multiple of 32
  Filter filter;          // the last of them that may be used; the processor may know less
  int threads;
};

struct VectorQuantizeBackwardParams {
  const void* z;
  const void* grad_z_q;  // null: zero
  void* grad_z;          // all three of this type and these strides
  LatentType type;
  int64_t outer, inner, width;
  RowStrides strides;
  const float* codebook;
  const int64_t* codes;
  float scale;  // grad_loss * 2 * weight / numel
  int threads;
};

MSVQ_CPU_KERNEL(vector_quantize, VectorQuantizeParams)
MSVQ_CPU_KERNEL(vector_quantize_backward, VectorQuantizeBackwardParams)

}  // namespace msvq
