"""The targets of the multi-scale loss (Eq. 7): images as float, blurred again and again."""

from __future__ import annotations

import torch
from torch import Tensor

from msvq_fast.ops.gaussian_blur import gaussian_pyramid

Blur = tuple[int | None, float | None, str, str, str | None]


def blurred_targets(x: Tensor, num_scales: int, dtype: torch.dtype, blur: Blur) -> list[Tensor]:
    """M targets ``(B, C, H, W)`` in ``dtype``, coarsest first.

    Args:
        x: Images in [-1, 1], or uint8 in [0, 255].
        num_scales: M.
        dtype: Of the result.
        blur: ``kernel_size, sigma, sigma_rule, border, backend`` of `gaussian_pyramid`.
    """
    image = x.to(dtype)
    if x.dtype == torch.uint8:
        image = image / 127.5 - 1
    kernel_size, sigma, sigma_rule, border, backend = blur
    return gaussian_pyramid(
        image,
        num_scales,
        kernel_size=kernel_size,
        sigma=sigma,
        sigma_rule=sigma_rule,
        border=border,
        backend=backend,
    )
