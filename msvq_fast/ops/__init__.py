"""The functional API: one function per op, each with its contract in its docstring."""

from msvq_fast.ops.checks import InputError
from msvq_fast.ops.conv_bias_relu import ConvBiasReluOutput, conv_bias_relu
from msvq_fast.ops.gaussian_blur import (
    default_kernel_size,
    default_sigma,
    gaussian_blur,
    gaussian_pyramid,
)
from msvq_fast.ops.local_attention import local_attention, local_attention_at
from msvq_fast.ops.multiscale_loss import multiscale_loss
from msvq_fast.ops.upsample_image import upsample_image
from msvq_fast.ops.vector_quantize import (
    VectorQuantizeOutput,
    ema_update_,
    nearest_code,
    vector_quantize,
)

__all__ = [
    "ConvBiasReluOutput",
    "InputError",
    "VectorQuantizeOutput",
    "conv_bias_relu",
    "default_kernel_size",
    "default_sigma",
    "ema_update_",
    "gaussian_blur",
    "gaussian_pyramid",
    "local_attention",
    "local_attention_at",
    "multiscale_loss",
    "nearest_code",
    "upsample_image",
    "vector_quantize",
]
