"""Arguments and outputs of the kernels: what their custom ops take, and the layout they return."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msvq_fast.ops.checks import accumulation_dtype
from msvq_fast.ops.local_attention.windows import Windows


def flatten(windows: Windows) -> tuple[list[int], list[bool]]:
    """``windows`` as lists: (h, w) of the queries, then (h, w, kernel) of every scale."""
    sizes = list(windows.query_grid)
    for grid, kernel in zip(windows.grids, windows.kernels, strict=True):
        sizes += [*grid, kernel]
    return sizes, [windows.own, windows.raster, windows.include_self, windows.shift]


def empty_lse(q: Tensor) -> Tensor:
    """Room for one number per query."""
    return torch.empty(q.shape[:3], dtype=accumulation_dtype(q.dtype), device=q.device)


def empty_tokens(like: Tensor) -> Tensor:
    """Room for ``(B, heads, N, d)``, heads or tokens first as in ``like``, d innermost."""
    batch, heads, tokens, width = like.shape
    if heads > 1 and like.stride(1) < like.stride(2):
        return torch.empty(
            (batch, tokens, heads, width), dtype=like.dtype, device=like.device
        ).transpose(1, 2)
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def empty_grads(
    q: Tensor, keys: list[Tensor], values: list[Tensor], bias: list[Tensor | None]
) -> list[Tensor]:
    """Room for the gradients of q, the keys, the values and the biases that are there."""
    tables = [torch.empty(b.shape, dtype=b.dtype, device=b.device) for b in bias if b is not None]
    return [*map(empty_tokens, [q, *keys, *values]), *tables]


def split_grads(
    grads: list[Tensor], bias: Sequence[Tensor | None]
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor | None]]:
    """What `empty_grads` made room for: q's, the keys', the values', and one entry per bias."""
    n = len(bias)
    rest = iter(grads[1 + 2 * n :])
    grad_bias = [None if b is None else next(rest) for b in bias]
    return grads[0], grads[1 : 1 + n], grads[1 + n : 1 + 2 * n], grad_bias


def rows(tensor: Tensor) -> Tensor:
    """``tensor`` with the channels of a token next to each other."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
