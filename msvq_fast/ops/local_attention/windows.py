"""Which keys a query sees: the geometry every implementation shares, in plain integers."""

from __future__ import annotations

from typing import NamedTuple


class Windows(NamedTuple):
    """The windows of one call, over the scales in use (coarse to fine).

    Scale n has a grid ``grids[n] = (h, w)`` and an odd kernel ``kernels[n]`` with radius
    ``r = kernels[n] // 2``. A query in row y of ``query_grid``'s h_m rows is centred on the cell in
    row ``((2y + 1) h) // (2 h_m)``, the one that holds its centre (``y // ratio`` when the ratio is
    an integer); columns likewise. ``clip`` keeps the cells within r of the centre that exist;
    ``shift`` moves the window inside the grid: ``min(k, size)`` cells along an axis.
    """

    query_grid: tuple[int, int]
    grids: tuple[tuple[int, int], ...]
    kernels: tuple[int, ...]
    own: bool
    """Whether the last scale is the query's own, which ``raster`` and ``include_self`` act on."""
    raster: bool
    include_self: bool
    shift: bool


def bias_size(kernel: int, shift: bool) -> int:
    """Offsets of a relative bias along one axis: a shifted window reaches k - 1 to either side."""
    return 2 * kernel - 1 if shift else kernel
