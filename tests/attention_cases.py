"""The settings of local attention that every implementation must get right."""

from __future__ import annotations

import torch

from msvq_fast.ops import local_attention

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


def check_scores_of_minus_infinity(backend, device="cpu"):
    """Keys whose bias is -inf do not count, as if they lay outside the window."""
    h, w = 3, 5
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, 3, h * w, 8, generator=generator).to(device).requires_grad_()
        for _ in range(3)
    )
    table = torch.full((3, 3, 3), -torch.inf)  # head 0 sees nothing
    table[1, 1, 1] = 0.5  # head 1 itself
    table[2, 2, 2] = 0.5  # head 2 the cell below to the right, the last row and column nothing
    table = table.to(device).requires_grad_()
    out = local_attention(
        q, [k], [v], grids=[(h, w)], kernels=[3], include_self=True, bias=[table], backend=backend
    )
    cells = v.detach().unflatten(2, (h, w))
    want = torch.zeros_like(cells)
    want[:, 1] = cells[:, 1]
    want[:, 2, :-1, :-1] = cells[:, 2, 1:, 1:]
    assert torch.equal(out.unflatten(2, (h, w)), want)
    upstream = torch.randn(cells.shape, generator=generator).to(device)
    out.backward(upstream.flatten(2, 3))
    want = torch.zeros_like(cells)
    want[:, 1] = upstream[:, 1]
    want[:, 2, 1:, 1:] = upstream[:, 2, :-1, :-1]
    # The weight 1 is an exponential of scores, known to some roundings.
    torch.testing.assert_close(v.grad.unflatten(2, (h, w)), want, rtol=1e-5, atol=0)
    for leaf in (q, k, table):  # one key's softmax is constant, up to dO.V - dO.O
        assert leaf.grad.abs().max() < 1e-5
