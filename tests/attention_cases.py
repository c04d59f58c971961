"""The settings of local attention that every implementation must get right."""

from __future__ import annotations

import torch

# grids, kernels, options: every border, order, ratio and kernel kind at awkward sizes
CASES = [
    ([(4, 4), (8, 8)], [3, 5], {}),
    ([(4, 4), (8, 8)], [3, 5], {"include_self": True}),
    ([(4, 4), (8, 8)], [3, 5], {"order": "raster"}),
    ([(4, 4), (8, 8)], [3, 5], {"order": "raster", "include_self": True}),
    ([(4, 4), (8, 8)], [3, 5], {"border": "shift"}),
    ([(4, 4), (8, 8)], [3, 5], {"border": "shift", "include_self": True}),
    ([(5, 7)], [3], {}),
    ([(5, 7)], [7], {"order": "raster"}),
    ([(5, 7)], [1], {"include_self": True}),
    ([(5, 7)], [9], {"border": "shift"}),
    ([(5, 7)], ["full"], {"order": "raster"}),
    ([(3, 2), (6, 7)], [1, 3], {}),
    ([(3, 2), (6, 7)], [3, 3], {"border": "shift"}),
    ([(10, 4), (13, 5)], [3, 5], {"order": "raster"}),
    ([(2, 3), (4, 3), (8, 9)], ["full", 3, 5], {}),
    ([(2, 3), (4, 3), (8, 9)], ["full", 0, 5], {"order": "raster"}),
    ([(1, 1), (8, 3)], [1, 0], {}),
    ([(2, 5), (1, 13)], [3, 13], {}),
    ([(4, 5), (3, 3)], [3, 3], {}),
    ([(2, 1), (16, 8)], [3, 3], {"border": "shift"}),
    ([(3, 5), (5, 37)], [3, 5], {}),
    ([(3, 5), (9, 19)], [3, 9], {"order": "raster"}),
]


def run(function, inputs, grids, kernels, options, **kwargs):
    """Value and all gradients, for a fixed upstream gradient."""
    q, keys, values, bias = inputs
    leaves = [q, *keys, *values, *(b for b in bias or () if b is not None)]
    for leaf in leaves:
        leaf.grad = None
    out = function(q, keys, values, grids=grids, kernels=kernels, bias=bias, **options, **kwargs)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    out.backward(upstream)
    return out.detach(), [torch.zeros_like(x) if x.grad is None else x.grad.clone() for x in leaves]


def bias_sizes(kernels, options, with_bias):
    if not with_bias:
        return None
    double = options.get("border") == "shift"
    return [None if k in (0, "full") else 2 * k - 1 if double else k for k in kernels]
