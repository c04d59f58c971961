"""Local attention of a few queries: rows of the whole, rings of keys, bad input."""

from __future__ import annotations

import pytest
import torch
from attention_cases import CASES, bias_sizes
from index_lists import make_inputs
from parity import assert_close

from msvq_fast.ops import InputError, local_attention, local_attention_at


@pytest.mark.parametrize(("grids", "kernels", "options"), CASES)
def test_is_rows_of_the_whole(grids, kernels, options):
    q, keys, values, bias = make_inputs(
        grids, heads=4, kv_heads=2, bias_sizes=bias_sizes(kernels, options, True)
    )
    options = {"order": "bidirectional", "grids": grids, "kernels": kernels, **options}
    want = local_attention(q, keys, values, bias=bias, backend="reference", **options)
    positions = torch.randperm(q.shape[2])[:7]
    got = local_attention_at(q[:, :, positions], keys, values, positions, bias=bias, **options)
    assert_close("value", got, want[:, :, positions].detach(), ulps=64)


def test_a_ring_holds_what_is_read():
    q, keys, values, _ = make_inputs([(6, 4)], dtype=torch.float32)
    options = {"grids": [(6, 4)], "kernels": [3]}
    whole = local_attention(q, keys, values, order="raster", **options)
    positions = torch.tensor([14, 13])  # row 3, which reads row 2
    ring = [torch.full((1, 2, 8, 8), 1e4) for _ in range(2)]
    for store, items in zip(ring, (keys, values), strict=True):
        store[:, :, 4:7] = items[0][:, :, 12:15]
        store[:, :, :4] = items[0][:, :, 8:12]
    got = local_attention_at(q[:, :, positions], ring[:1], ring[1:], positions, **options)
    torch.testing.assert_close(got, whole[:, :, positions])
    for rows in (1, 7):
        small = [torch.zeros(1, 2, rows * 4, 8)]
        with pytest.raises(InputError, match=rf"keys\[0\] holds {rows} rows; expected 2 to 6"):
            local_attention_at(q[:, :, :1], small, small, torch.tensor([0]), **options)
    with pytest.raises(InputError, match=r"positions has dtype torch.int32 and shape \(2,\)"):
        local_attention_at(q[:, :, :2], keys, values, torch.arange(2).int(), **options)
