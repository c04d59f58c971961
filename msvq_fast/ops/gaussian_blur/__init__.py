"""Gaussian blur and the blur pyramid of Eq. 7-8."""

from msvq_fast.ops.gaussian_blur.op import (
    default_kernel_size,
    default_sigma,
    gaussian_blur,
    gaussian_pyramid,
)

__all__ = ["default_kernel_size", "default_sigma", "gaussian_blur", "gaussian_pyramid"]
