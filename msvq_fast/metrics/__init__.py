"""What a reconstruction and its codes are worth: image quality, sets of images, codebook health."""

from msvq_fast.metrics.codebook import CodeUsage, perplexity, usage
from msvq_fast.metrics.distribution import (
    fewest_images,
    frechet_distance,
    inception_score,
    kernel_distance,
)
from msvq_fast.metrics.efflite0 import load_efflite0
from msvq_fast.metrics.extractors import FeatureExtractor
from msvq_fast.metrics.image import mse, psnr, psnr_from_mse, ssim, to_unit_range
from msvq_fast.metrics.inception import load_inception
from msvq_fast.metrics.lpips import LPIPS, load_lpips
from msvq_fast.metrics.spectrum import radial_power

__all__ = [
    "LPIPS",
    "CodeUsage",
    "FeatureExtractor",
    "fewest_images",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "load_efflite0",
    "load_inception",
    "load_lpips",
    "mse",
    "perplexity",
    "psnr",
    "psnr_from_mse",
    "radial_power",
    "ssim",
    "to_unit_range",
    "usage",
]
