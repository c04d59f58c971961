"""The functional API: one function per op, each with its contract in its docstring."""

from msvq_fast.ops.checks import InputError
from msvq_fast.ops.gaussian_blur import (
    default_kernel_size,
    default_sigma,
    gaussian_blur,
    gaussian_pyramid,
)
from msvq_fast.ops.multiscale_loss import multiscale_loss
from msvq_fast.ops.local_attention import local_attention

__all__ = [
    "InputError",
    "default_kernel_size",
    "default_sigma",
    "gaussian_blur",
    "gaussian_pyramid",
    "multiscale_loss",
    "local_attention",
]
