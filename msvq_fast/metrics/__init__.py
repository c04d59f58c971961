"""What a reconstruction and its codes are worth: image quality and codebook health."""

from msvq_fast.metrics.codebook import CodeUsage, perplexity, usage
from msvq_fast.metrics.image import mse, psnr, psnr_from_mse, ssim, to_unit_range

__all__ = [
    "CodeUsage",
    "mse",
    "perplexity",
    "psnr",
    "psnr_from_mse",
    "ssim",
    "to_unit_range",
    "usage",
]
