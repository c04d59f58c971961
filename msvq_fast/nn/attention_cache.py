"""What a layer of local attention keeps while tokens are sampled in raster order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class AttentionCache(NamedTuple):
    """Keys and values of one layer: every coarse grid, and a ring of rows of the own one.

    Row y of the own grid lies at row ``y % R`` of the ring; the step that computes a token writes
    it in place.
    """

    grids: tuple[tuple[int, int], ...]
    keys: tuple[Tensor, ...]
    """``(B, kv_heads, N_n, d)`` per scale; the last ``(B, kv_heads, R * w, d)``."""
    values: tuple[Tensor, ...]
    angles: Tensor | None
    """Rotary angles ``(N_m, d / 2)`` of the own grid, or None."""


def ring_rows(grid: tuple[int, int], radius: int, skew: int | None) -> int:
    """Rows of the own grid that are still read while others are written.

    Token by token those are the ``radius`` rows above and the row itself; the tokens of one front
    (`fronts`) lie in up to ``(w - 1) // skew + 1`` rows.
    """
    in_flight = 1 if skew is None else (grid[1] - 1) // skew + 1
    return min(grid[0], radius + in_flight)


def fronts(grid: tuple[int, int], skew: int, device: torch.device | str = "cpu") -> list[Tensor]:
    """The raster positions ``(F,)`` that may be sampled together, front after front.

    Front t holds the tokens ``(y, x)`` with ``x + skew * y = t``. With windows of radius r and
    ``skew >= r + 1`` all that a token may see lies in earlier fronts: ``w + (h - 1) * skew`` steps
    in place of ``h * w``, and the same distribution.
    """
    height, width = grid
    result = []
    for t in range(width + (height - 1) * skew):
        first = max(0, -((width - 1 - t) // skew))
        rows = torch.arange(first, min(height - 1, t // skew) + 1, device=device)
        result.append(rows * width + t - skew * rows)
    return [front for front in result if front.numel() > 0]


def write_ring(ring: Sequence[Tensor], items: Sequence[Tensor], place: Tensor) -> None:
    """Write ``items`` ``(B, kv_heads, F, d)`` at the places ``(F,)`` of their rings."""
    for store, item in zip(ring, items, strict=True):
        store.index_copy_(2, place, item)
