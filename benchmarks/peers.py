"""Every rival once, as a function of the same arguments; one that is not installed is skipped."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

Measure = Callable[..., None]  # the fixture of benchmarks/conftest.py
Blur = Callable[[], Tensor]


def torch_separable_blur(x: Tensor, size: int, sigma: float) -> Blur:
    """Two depthwise convolutions over reflect padding: what kornia runs."""
    taps, channels = _taps(size, sigma), x.shape[1]
    rows = taps.view(1, 1, 1, size).expand(channels, 1, 1, size)
    columns = taps.view(1, 1, size, 1).expand(channels, 1, size, 1)

    def blur() -> Tensor:
        h = F.conv2d(F.pad(x, [size // 2, size // 2, 0, 0], mode="reflect"), rows, groups=channels)
        h = F.pad(h, [0, 0, size // 2, size // 2], mode="reflect")
        return F.conv2d(h, columns, groups=channels)

    return blur


def torch_dense_blur(x: Tensor, size: int, sigma: float) -> Blur:
    """One depthwise convolution with size² taps: what torchvision runs."""
    taps, channels = _taps(size, sigma), x.shape[1]
    kernel = torch.outer(taps, taps).expand(channels, 1, size, size)
    return lambda: F.conv2d(F.pad(x, [size // 2] * 4, mode="reflect"), kernel, groups=channels)


def kornia_blur(x: Tensor, size: int, sigma: float) -> Blur:
    filters = pytest.importorskip("kornia.filters")
    return lambda: filters.gaussian_blur2d(x, (size, size), (sigma, sigma), "reflect")


def opencv_blur(x: Tensor, size: int, sigma: float) -> Blur:
    """OpenCV on one float32 image of HWC layout, with as many threads as torch."""
    cv2 = pytest.importorskip("cv2")
    cv2.setNumThreads(torch.get_num_threads())
    image = np.ascontiguousarray(x.squeeze(0).permute(1, 2, 0).numpy())

    def blur() -> Tensor:
        out = cv2.GaussianBlur(image, (size, size), sigma, borderType=cv2.BORDER_REFLECT_101)
        return torch.from_numpy(out).permute(2, 0, 1)[None]  # a view: no copy is timed

    return blur


def _taps(size: int, sigma: float) -> Tensor:
    j = torch.arange(size, dtype=torch.float64) - size // 2
    taps = torch.exp(-0.5 * (j / sigma) ** 2)
    return (taps / taps.sum()).float()
