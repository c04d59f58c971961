"""Vector quantization: nearest code, straight-through output, statistics, EMA (Eq. 1-4)."""

from msvq_fast.ops.vector_quantize.op import (
    VectorQuantizeOutput,
    ema_update_,
    nearest_code,
    vector_quantize,
)

__all__ = ["VectorQuantizeOutput", "ema_update_", "nearest_code", "vector_quantize"]
