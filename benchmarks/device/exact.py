"""Nearest codes in float64, quick enough for a million latents."""

from __future__ import annotations

import torch
from torch import Tensor

from msvq_fast.ops import nearest_code

_CHUNK_DISTANCES = 2**26


def exact_codes(z: Tensor, codebook: Tensor) -> Tensor:
    """Codes ``(N,)`` of ``z (N, D)`` by the definition.

    Expanded distances in float64 decide where the two best codes differ by more than they can be
    wrong; the definition decides the other rows.
    """
    codes = torch.empty(len(z), dtype=torch.int64, device=z.device)
    columns = codebook.double().t().contiguous()
    half = columns.square().sum(0) / 2
    chunk = max(_CHUNK_DISTANCES // len(codebook), 1)
    unsure = []
    for start in range(0, len(z), chunk):
        part = z[start : start + chunk].double()
        scores = half - part @ columns
        best, index = scores.topk(min(2, len(codebook)), dim=1, largest=False)
        codes[start : start + chunk] = index[:, 0]
        limit = 1e-12 * (half.max() + part.square().sum(1) + 1e-300)
        unsure.append((best[:, -1] - best[:, 0] <= limit).nonzero()[:, 0] + start)
    rows = torch.cat(unsure)
    decided = nearest_code(z[rows].cpu(), codebook.cpu(), backend="reference")
    codes[rows] = decided.to(z.device)
    return codes
