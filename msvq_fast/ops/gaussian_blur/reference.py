"""The definition of the Gaussian blur and its pyramid (Eq. 7-8) in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def border_index(size: int, radius: int, border: str) -> list[int]:
    """Source index of every padded position ``-radius .. size + radius - 1``; -1 reads zero.

    ``reflect`` mirrors without repeating the edge (period 2 (N - 1)), ``symmetric`` repeats it
    (period 2 N). Folding by the period makes any size >= 1 legal, also smaller than the kernel.
    """
    source = []
    for i in range(-radius, size + radius):
        if border == "constant":
            j = i if 0 <= i < size else -1
        elif border == "replicate":
            j = min(max(i, 0), size - 1)
        elif border == "circular":
            j = i % size
        elif border == "symmetric":
            j = i % (2 * size)
            j = min(j, 2 * size - 1 - j)
        else:  # reflect
            period = max(2 * (size - 1), 1)
            j = i % period
            j = min(j, period - j) if size > 1 else 0
        source.append(j)
    return source


def _blur_axis(x: Tensor, taps: Sequence[float], border: str, dim: int) -> Tensor:
    """Correlate ``x`` with the symmetric ``taps`` along ``dim``."""
    size, radius = x.shape[dim], len(taps) // 2
    if radius == 0:
        return x * taps[0]
    if border == "constant":
        pad = [0, 0, radius, radius] if dim == -2 else [radius, radius]
        padded = F.pad(x, pad)
    else:
        index = torch.tensor(border_index(size, radius, border), device=x.device)
        padded = x.index_select(dim, index)
    out = taps[0] * padded.narrow(dim, 0, size)
    for j in range(1, len(taps)):
        out = out + taps[j] * padded.narrow(dim, j, size)
    return out


def gaussian_blur(
    x: Tensor, taps_y: Sequence[float], taps_x: Sequence[float], border: str
) -> Tensor:
    """Blur ``x (B, C, H, W)`` with separable taps: ``y = Σ_ij h_i h_j x[r + i, c + j]`` (Eq. 7).

    The sums run in float32 (float64 for float64 images) and are rounded once to the image's dtype;
    uint8 rounds half to even. Autograd differentiates it.
    """
    work = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    out = _blur_axis(_blur_axis(work, taps_x, border, -1), taps_y, border, -2)
    if x.dtype == torch.uint8:
        out = out.round().clamp(0, 255)
    out = out.to(x.dtype)
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return out
    return out.contiguous(memory_format=torch.channels_last)
