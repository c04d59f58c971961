// Cross-scale local attention, forward and backward: windows of several grids, one softmax.
//
// The windows are those of msvq_fast/ops/local_attention/windows.py. Nothing of size queries x keys
// is stored: the forward keeps the log-sum-exp of each query, the backward recomputes the weights,
// and each gradient is gathered by its owner over the inverse windows.
#pragma once
#include <cstdint>

#include "simd.h"

namespace msvq {

enum class FloatType { float32, float64, bfloat16, float16 };

// A (batch, heads, tokens, channels) tensor: strides in elements, channels next to each other.
struct TokenTensor {
  void* data;
  int64_t batch, head, token;
};

struct AttentionScale {
  TokenTensor key, value;            // kv_heads heads
  TokenTensor grad_key, grad_value;  // of the backward
  const void* bias;                  // (heads, b, b) or null; b = kernel, or 2 kernel - 1 if shift
  void* grad_bias;
  int64_t height, width, kernel;
};

struct LocalAttentionParams {
  FloatType type;
  int64_t batch, heads, kv_heads, channels;
  int64_t height, width;  // of the queries' grid
  TokenTensor q, out, grad_out, grad_q;
  void* lse;  // (batch, heads, height * width), float32, or float64 for float64 tensors
  const AttentionScale* scales;
  int64_t num_scales;
  bool own;  // the last scale is the queries' grid: raster and include_self act on it
  bool raster, include_self, shift;
  double scale;
  int threads;
};

MSVQ_CPU_KERNEL(local_attention, LocalAttentionParams)
MSVQ_CPU_KERNEL(local_attention_backward, LocalAttentionParams)

}  // namespace msvq
