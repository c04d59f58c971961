"""The definition of local attention: masked dense attention in plain PyTorch (§3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msvq_fast.ops.checks import accumulation_dtype, without_autocast
from msvq_fast.ops.local_attention.windows import Windows, bias_size


def _axis(size: int, size_n: int, kernel: int, shift: bool) -> tuple[Tensor, Tensor]:
    """The window along one axis: ``(inside, bias_index)``, both ``(size, size_n)``, on the CPU."""
    radius = kernel // 2
    centre = ((2 * torch.arange(size, device="cpu")[:, None] + 1) * size_n) // (2 * size)
    key = torch.arange(size_n, device="cpu")[None, :]
    if shift:
        length = min(kernel, size_n)
        start = (centre - radius).clamp(0, size_n - length)
        inside = (key >= start) & (key < start + length)
    else:
        inside = (key - centre).abs() <= radius
    middle = bias_size(kernel, shift) // 2
    return inside, (key - centre + middle).clamp(0, 2 * middle)


def window_mask(windows: Windows) -> list[Tensor]:
    """Which keys each query sees: one bool ``(N_m, N_n)`` per scale."""
    height, width = windows.query_grid
    masks = []
    for (h, w), kernel in zip(windows.grids, windows.kernels, strict=True):
        rows, _ = _axis(height, h, kernel, windows.shift)
        columns, _ = _axis(width, w, kernel, windows.shift)
        pairs = rows[:, None, :, None] & columns[None, :, None, :]  # (h_m, w_m, h, w)
        masks.append(pairs.reshape(height * width, h * w))
    if windows.own:
        mask = masks[-1]
        if windows.raster:
            mask &= torch.ones_like(mask).tril()
        if not windows.include_self:
            mask &= ~torch.eye(mask.shape[0], dtype=torch.bool, device="cpu")
    return masks


def _dense_bias(bias: Tensor, windows: Windows, scale: int) -> Tensor:
    """Spread a relative bias ``(heads, b, b)`` over all pairs: ``(heads, N_m, N_n)``."""
    (height, width), (h, w) = windows.query_grid, windows.grids[scale]
    _, rows = _axis(height, h, windows.kernels[scale], windows.shift)
    _, columns = _axis(width, w, windows.kernels[scale], windows.shift)
    dense = bias[:, rows[:, None, :, None], columns[None, :, None, :]]  # (heads, h_m, w_m, h, w)
    return dense.reshape(bias.shape[0], height * width, h * w)


def local_attention(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    windows: Windows,
    scale: float,
) -> Tensor:
    """``O_i = Σ_j softmax_j(scale q_i·k_j + b_ij) v_j`` over the windows of all scales at once.

    Softmax and sums in float32 (float64 for float64 inputs). A key whose score is -inf, by its
    bias, is as one outside the window; a query without keys gives 0.
    """
    with without_autocast(q.device.type):
        work = accumulation_dtype(q.dtype)
        group = q.shape[1] // keys[0].shape[1]
        query = q.to(work) * scale
        scores = []
        for n, key in enumerate(keys):
            key = key.to(work).repeat_interleave(group, dim=1)
            score = query @ key.transpose(-1, -2)  # (B, heads, N_m, N_n)
            relative = bias[n]
            if relative is not None:
                score = score + _dense_bias(relative.to(work), windows, n)
            scores.append(score)
        logits = torch.cat(scores, dim=-1)
        mask = torch.cat(window_mask(windows), dim=-1).to(q.device) & (logits != -torch.inf)
        empty = ~mask.any(dim=-1, keepdim=True)
        # An empty row is given finite scores, so that neither its softmax nor its gradient is NaN.
        logits = logits.masked_fill(~mask, -torch.inf).masked_fill(empty, 0.0)
        weights = logits.softmax(dim=-1).masked_fill(~mask, 0.0)
        value = torch.cat([v.to(work).repeat_interleave(group, dim=1) for v in values], dim=2)
        return (weights @ value).to(q.dtype)
