"""Where in frequency the power of images lies: the radially averaged power spectrum."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from msvq_fast.ops.checks import check_image


def radial_power(images: Tensor) -> Tensor:
    """Mean power of each image per ring of equal distance from frequency 0.

    Ring k holds the frequencies of k - ½ to k + ½ cycles per image (of its shorter side); the
    last is half the shorter side, the highest frequency along a row. The mean colour of every
    channel is removed and a Hann window applied, so that borders add no frequencies of their own.

    Args:
        images: ``(B, C, H, W)`` float.

    Returns:
        ``(B, min(H, W) // 2)`` float64, for k = 1, 2, ...: power per frequency, averaged over
        the ring and the channels.

    Raises:
        InputError: If ``images`` is not a float batch.
    """
    check_image("images", images)
    height, width = images.shape[-2:]
    shorter = min(height, width)
    x = images.double()
    x = (x - x.mean(dim=(2, 3), keepdim=True)) * _hann(height, x).unsqueeze(1) * _hann(width, x)
    power = torch.fft.fft2(x, norm="ortho").abs().square().mean(dim=1)  # (B, H, W)
    rows = torch.fft.fftfreq(height, 1 / shorter, device=x.device).unsqueeze(1)
    columns = torch.fft.fftfreq(width, 1 / shorter, device=x.device)
    ring = torch.hypot(rows, columns).round().long().flatten()  # (H W,)
    count = torch.bincount(ring)
    total = torch.zeros(len(x), len(count), dtype=torch.float64, device=x.device)
    total.index_add_(1, ring, power.flatten(1))
    return (total / count)[:, 1 : shorter // 2 + 1]


def _hann(size: int, like: Tensor) -> Tensor:
    place = torch.arange(size, dtype=torch.float64, device=like.device)
    return 0.5 - 0.5 * torch.cos(2 * math.pi * (place + 0.5) / size)
