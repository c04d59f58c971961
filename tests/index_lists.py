"""Index lists of local attention, from the definition: an oracle that shares no code."""

from __future__ import annotations

import torch
from torch import Tensor


def pairs(
    query_grid,
    grid,
    kernel,
    *,
    own=False,
    raster=False,
    include_self=False,
    border="clip",
):
    """Per query, in raster order, its list of ``(key, dy, dx)``: offsets from the centre cell."""
    (height, width), (h, w) = query_grid, grid
    result = []
    for y in range(height):
        for x in range(width):
            rows = _window(y, height, h, kernel, border)
            columns = _window(x, width, w, kernel, border)
            seen = []
            for row, dy in rows:
                for column, dx in columns:
                    key, query = row * w + column, y * width + x
                    if own and raster and key > query:
                        continue
                    if own and not include_self and key == query:
                        continue
                    seen.append((key, dy, dx))
            result.append(seen)
    return result


def _window(p, size, size_n, kernel, border):
    centre = int((p + 0.5) * size_n / size + 1e-9)
    if kernel == "full":
        return [(c, c - centre) for c in range(size_n)]
    radius = kernel // 2
    if border == "clip":
        return [(c, c - centre) for c in range(size_n) if abs(c - centre) <= radius]
    length = min(kernel, size_n)
    start = min(max(centre - radius, 0), size_n - length)
    return [(c, c - centre) for c in range(start, start + length)]


def index_list_attention(
    q: Tensor,
    keys,
    values,
    *,
    grids,
    kernels,
    order="bidirectional",
    include_self=False,
    border="clip",
    bias=None,
    scale=None,
) -> Tensor:
    """Attention query by query over its index list, float64."""
    tokens, width = q.shape[2:]
    group = q.shape[1] // keys[0].shape[1]
    keys = [k.repeat_interleave(group, dim=1) for k in keys]
    values = [v.repeat_interleave(group, dim=1) for v in values]
    scale = width**-0.5 if scale is None else scale
    rule = {"raster": order == "raster", "include_self": include_self, "border": border}
    lists = [
        [[]] * tokens
        if kernels[n] == 0
        else pairs(grids[-1], grid, kernels[n], own=n == len(grids) - 1, **rule)
        for n, grid in enumerate(grids)
    ]
    rows = []
    for i in range(tokens):
        scores, gathered = [], []
        for n, scale_lists in enumerate(lists):
            if not scale_lists[i]:
                continue
            index, dy, dx = map(torch.tensor, zip(*scale_lists[i], strict=True))
            score = scale * (keys[n][:, :, index] @ q[:, :, i, :, None])[..., 0]
            if bias is not None and bias[n] is not None:
                middle = bias[n].shape[-1] // 2
                score = score + bias[n][:, middle + dy, middle + dx]
            scores.append(score)
            gathered.append(values[n][:, :, index])
        if scores:
            weights = torch.cat(scores, dim=-1).softmax(dim=-1)
            rows.append((weights[..., None] * torch.cat(gathered, dim=2)).sum(2))
        else:
            rows.append(torch.zeros_like(q[:, :, i]))
    return torch.stack(rows, dim=2)


def make_inputs(
    grids, *, batch=1, heads=2, kv_heads=None, width=8, dtype=torch.float64, bias_sizes=None
):
    """Random q, keys, values and biases; leaves that require gradients."""
    kv_heads = heads if kv_heads is None else kv_heads

    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()

    sizes = [h * w for h, w in grids]
    q = leaf(batch, heads, sizes[-1], width)
    keys = [leaf(batch, kv_heads, size, width) for size in sizes]
    values = [leaf(batch, kv_heads, size, width) for size in sizes]
    if bias_sizes is None:
        return q, keys, values, None
    bias = [None if size is None else leaf(heads, size, size) for size in bias_sizes]
    return q, keys, values, bias
