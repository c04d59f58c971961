"""Local attention of a few queries, for sampling token by token: contract and definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msvq_fast.ops.checks import accumulation_dtype
from msvq_fast.ops.local_attention.op import OP, Kernel, check_bias, check_scale, check_windows
from msvq_fast.ops.local_attention.windows import Windows, bias_size


def local_attention_at(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    positions: Tensor,
    *,
    grids: Sequence[tuple[int, int]],
    kernels: Sequence[Kernel],
    order: str = "raster",
    include_self: bool = False,
    border: str = "clip",
    bias: Sequence[Tensor | None] | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """`local_attention` of the queries at ``positions`` alone; its cost is that of their windows.

    Args:
        q: ``(B, heads, F, d)``, the queries at ``positions``.
        keys: As in `local_attention`. In raster order the last may be a ring of R rows,
            ``(B, kv_heads, R * w_m, d)``: row y of the grid at row ``y % R``. A query reads its
            own row and the r rows above it.
        values: As ``keys``.
        positions: ``(F,)`` int64, raster positions on the last grid, inside it (not checked: they
            stay on the device).
        grids: As in `local_attention`, of the whole last grid.
        kernels: As in `local_attention`.
        order: As in `local_attention`.
        include_self: As in `local_attention`.
        border: As in `local_attention`.
        bias: As in `local_attention`.
        scale: As in `local_attention`.
        backend: ``None`` picks; ``"reference"`` or ``"triton"`` runs or raises.

    Returns:
        ``(B, heads, F, d)``; a query that sees no key gets 0.

    Gradient:
        To all tensors but ``positions``, by the reference: the kernel takes no call that needs one.

    Raises:
        InputError: For shapes, grids, kernels, dtypes or devices that do not fit together.

    Numerics:
        Scores, softmax and sums in float32 (float64 for float64), one rounding at the end. Keys and
        values that no query sees must be finite. Nothing waits for the device.
    """
    windows = check_windows(
        q, keys, values, grids, kernels, order, include_self, border, positions=positions
    )
    relative = check_bias(bias, q, kernels, windows.shift)
    used = [n for n, kernel in enumerate(kernels) if kernel != 0]
    scale = check_scale(scale, q)
    args = (
        q, [keys[n] for n in used], [values[n] for n in used], [relative[n] for n in used], windows,
    )  # fmt: skip
    chosen = OP.pick(*args, positions, backend=backend)
    if chosen == "reference":
        return _local_attention_at(*args, scale, positions)
    return OP.kernels[chosen].local_attention_at(*args, scale, positions)


def _local_attention_at(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    windows: Windows,
    scale: float,
    positions: Tensor,
) -> Tensor:
    """The definition: the rows of `reference.local_attention` from gathered keys and values."""
    work = accumulation_dtype(q.dtype)
    group = q.shape[1] // keys[0].shape[1]
    query = q.to(work) * scale
    scores, gathered, masks = [], [], []
    for n, table in enumerate(bias):
        index, seen, offset = _window_at(windows, n, positions, keys[n].shape[2])
        key = keys[n][:, :, index].to(work).repeat_interleave(group, dim=1)  # (B, h, F, k², d)
        score = (query.unsqueeze(-2) * key).sum(-1)  # (B, heads, F, k²)
        if table is not None:
            score = score + table.to(work).flatten(1)[:, offset]
        scores.append(score)
        masks.append(seen)
        value = values[n][:, :, index].to(work)
        gathered.append(value.repeat_interleave(group, dim=1))
    logits = torch.cat(scores, dim=-1)
    mask = torch.cat(masks, dim=-1) & (logits != -torch.inf)
    empty = ~mask.any(dim=-1, keepdim=True)
    logits = logits.masked_fill(~mask, -torch.inf).masked_fill(empty, 0.0)
    weights = logits.softmax(dim=-1).masked_fill(~mask, 0.0)
    return (weights.unsqueeze(-1) * torch.cat(gathered, dim=-2)).sum(-2).to(q.dtype)


def _window_at(
    windows: Windows, n: int, positions: Tensor, stored: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys of scale n that a query may see: ``(index, seen, bias offset)``, each ``(F, k²)``.

    ``stored`` is the number of keys kept, which is less than the grid's if they are a ring.
    """
    (h, w), kernel = windows.grids[n], windows.kernels[n]
    height, width = windows.query_grid
    own = windows.own and n == len(windows.grids) - 1
    y, x = positions // width, positions % width
    rows, see_row, dy = _axis_at(y, height, h, kernel, windows.shift, own and windows.raster)
    columns, see_column, dx = _axis_at(x, width, w, kernel, windows.shift, False)
    seen = see_row[:, :, None] & see_column[:, None, :]
    if own:
        key, query = rows[:, :, None] * w + columns[:, None, :], positions[:, None, None]
        if windows.raster:
            seen = seen & (key <= query)
        if not windows.include_self:
            seen = seen & (key != query)
    index = (rows % (stored // w))[:, :, None] * w + columns[:, None, :]
    size = bias_size(kernel, windows.shift)
    offset = dy[:, :, None] * size + dx[:, None, :]
    return index.flatten(1), seen.flatten(1), offset.flatten(1)


def _axis_at(
    position: Tensor, size: int, cells: int, kernel: int, shift: bool, above: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Cells near a query along one axis, all inside the grid: ``(cell, seen, bias index)``."""
    radius = kernel // 2
    centre = ((2 * position + 1) * cells) // (2 * size)
    count = min(radius + 1 if above else kernel, cells)
    start = (centre - radius).clamp(0, max(0, cells - count))
    cell = start[:, None] + torch.arange(count, device=position.device)
    distance = cell - centre[:, None]
    middle = bias_size(kernel, shift) // 2
    seen = torch.ones_like(cell, dtype=torch.bool) if shift else distance.abs() <= radius
    return cell, seen, (distance + middle).clamp(0, 2 * middle)
