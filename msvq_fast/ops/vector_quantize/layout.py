"""Where the rows of a tensor of latents lie, without moving them in memory; what comes out."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LATENT_TYPES", "codes_like", "outputs_like", "row_strides"]

LATENT_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # LatentType in C++


def row_strides(dim: int, *tensors: Tensor) -> tuple[list[int], list[tuple[int, int, int]]] | None:
    """Number the rows of same-shaped tensors outer-major.

    Returns:
        ``[outer, inner]`` sizes and per tensor the strides ``(outer, inner, d)``; None where the
        dimensions beside ``dim`` do not merge into two.
    """
    shape = tensors[0].shape
    groups: list[tuple[int, list[int]]] = []
    for i, size in enumerate(shape):
        if i == dim or size == 1:
            continue
        strides = [t.stride(i) for t in tensors]
        if groups and all(a == b * size for a, b in zip(groups[-1][1], strides, strict=True)):
            groups[-1] = (groups[-1][0] * size, strides)
        else:
            groups.append((size, strides))
    if len(groups) > 2:
        return None
    # A single group is `inner` if its rows are neighbours, and also if there is nothing else.
    while len(groups) < 2:
        groups.insert(0, (1, [0] * len(tensors)))
    out = []
    for i, t in enumerate(tensors):
        d_stride = 1 if shape[dim] == 1 else t.stride(dim)
        out.append((groups[0][1][i], groups[1][1][i], d_stride))
    return [groups[0][0], groups[1][0]], out


def codes_like(z: Tensor, codebook: Tensor, dim: int) -> Tensor:
    """Room for the codes of a search: int64, the shape of ``z`` without ``dim``."""
    return z.new_empty(z.shape[:dim] + z.shape[dim + 1 :], dtype=torch.int64)


def outputs_like(
    z: Tensor, codebook: Tensor, dim: int, commitment_weight: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Room for all that the quantizer returns."""
    return (
        torch.empty_like(z),
        codes_like(z, codebook, dim),
        z.new_empty((), dtype=torch.float32),
        z.new_empty(codebook.shape[0], dtype=torch.int64),
        codebook.new_empty(codebook.shape),
    )
