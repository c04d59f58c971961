"""The codebook as the Triton filter reads it; all on the device, for K x D values."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["PackedCodes", "pack_codes"]

_FAR = 1e30  # score of no code


class PackedCodes(NamedTuple):
    """The codebook as the filter reads it."""

    mean: Tensor  # (BD,)
    half: Tensor  # (slots, BD) float16, centred and scaled by a power of two
    seeds: Tensor  # (slots,) half the squared norms
    bounds: Tensor  # (4,) scale, largest norm, largest rounded norm, largest rounding error


def pack_codes(codebook: Tensor, tile: int, block_width: int) -> PackedCodes:
    """Centre, scale and round the codebook for tiles of ``tile`` codes of ``block_width``."""
    num_codes, width = codebook.shape
    slots = (num_codes + tile - 1) // tile * tile
    finite = codebook.isfinite().all(dim=1, keepdim=True)  # (K, 1)
    exact = codebook.double().where(finite, 0)
    mean = (exact.sum(dim=0) / finite.sum().clamp_min(1)).float()
    centred = (exact - mean.double()).where(finite, 0)  # (K, D)
    # The power of two at or below the largest value: its exponent bits alone.
    largest = centred.abs().amax()
    largest = largest.where(largest > 0, 1).clamp(2.0**-126, 2.0**126)
    scale = 1 / (largest.view(torch.int64) & 0x7FF0000000000000).view(torch.float64)
    centred = centred * scale
    rounded = centred.half()
    square = centred.square().sum(dim=1)
    half_square = rounded.double().square().sum(dim=1)
    error_square = (centred - rounded.double()).square().sum(dim=1)
    norms = torch.stack([square, half_square, error_square]).amax(dim=1).sqrt()
    bounds = torch.cat([scale[None], norms * (1 + 1e-6) + 1e-30]).float()
    half = rounded.new_zeros(slots, block_width)
    half[:num_codes, :width] = rounded
    seeds = mean.new_full((slots,), _FAR)
    seeds[:num_codes] = (0.5 * square).float().where(finite[:, 0], _FAR)
    padded_mean = mean.new_zeros(block_width)
    padded_mean[:width] = mean
    return PackedCodes(padded_mean, half, seeds, bounds)
