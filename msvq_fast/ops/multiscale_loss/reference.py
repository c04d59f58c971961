"""The definition of the multi-scale reconstruction loss (Eq. 5-7) in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msvq_fast.ops.gaussian_blur import gaussian_pyramid

Blur = tuple[int, float, str, str | None]  # kernel_size, sigma, border, backend


def blurred_targets(x: Tensor, num_scales: int, dtype: torch.dtype, blur: Blur) -> list[Tensor]:
    """M targets ``(B, C, H, W)`` in ``dtype``, coarsest first (Eq. 7).

    Args:
        x: Images in [-1, 1], or uint8 in [0, 255].
        num_scales: M.
        dtype: Of the result.
        blur: Of `gaussian_pyramid`.
    """
    image = x.to(dtype)
    if x.dtype == torch.uint8:
        image = image / 127.5 - 1
    size, sigma, border, backend = blur
    return gaussian_pyramid(
        image, num_scales, kernel_size=size, sigma=sigma, border=border, backend=backend
    )


def multiscale_loss(
    contributions: Sequence[Tensor],
    targets: Sequence[Tensor],
    weights: Sequence[float],
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """``Σ_m w_m |x_m - Σ_{i<=m} C_i|²`` for M contributions and targets ``(B, C, H, W)``.

    Sums run in the targets' dtype (float32, or float64 for float64 contributions). Returns the
    loss ``()`` and the unweighted term of every scale ``(M,)``. Autograd differentiates it.
    """
    partial = torch.zeros_like(targets[0])
    terms = []
    for contribution, target in zip(contributions, targets, strict=True):
        partial = partial + contribution.to(target.dtype)
        squares = (partial - target).square()
        terms.append(squares.mean() if reduction == "mean" else squares.sum())
    per_scale = torch.stack(terms)  # (M,)
    return (per_scale * per_scale.new_tensor(weights)).sum(), per_scale.detach()
