"""nearest_code over the whole grid of sizes, dtypes and data, against float64 brute force."""

from __future__ import annotations

import pytest
import torch
from ops.test_nearest_code import HALF, KINDS, assert_codes_exact, brute_force, make_data

from msvq_fast.ops import nearest_code

CODES = (1, 2, 7, 255, 256, 257, 1000, 1024, 8192, 16384)
WIDTHS = (1, 8, 63, 64, 65, 128)
# What the filters allow for in x.c, relative to |x| |c| at D = 64: float32 sums, two bfloat16 per
# value, 16-bit integers, float16. What integers really lose, a sixteenth, is near the second.
FILTER_ERRORS = (2.0**-18, 2.0**-14, 2.0**-12, 2.0**-11)


def uncertain(n, k, d, dtype):
    """Rows whose two to five nearest codes lie about as far apart as a filter can tell.

    The codes of a row are one vector mirrored about it, each moved out by a quarter of to four
    times what separates two scores under one of ``FILTER_ERRORS``. They lie anywhere in the
    codebook.
    """
    z = torch.randn(n, d).to(dtype)
    codebook, used = torch.randn(k, d), 0
    for i, row in enumerate(z.double()):
        size = min(2 + i % 4, k - used)
        offset = 0.3 * torch.randn(d, dtype=torch.float64)
        signs = torch.randint(2, (size, d)) * 2 - 1
        gap = 2 * FILTER_ERRORS[i % 4] * row.square().sum() / offset.square().sum()
        spread = 4 ** (2 * torch.rand(size, 1, dtype=torch.float64) - 1)
        codebook[used : used + size] = row + signs * offset * (1 + gap * spread)
        used += size
    return z, codebook[torch.randperm(k)]


def data_sets(n, k, d, dtype):
    for kind in KINDS:
        yield kind, *make_data(kind, n, k, d, dtype)
    yield "uncertain", *uncertain(n, k, d, dtype)


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("k", CODES)
def test_every_data_set_in_every_dtype(k, d, monkeypatch):
    n = 67 if k <= 1024 else 24
    for dtype in (torch.float32, *HALF):
        for kind, z, codebook in data_sets(n, k, d, dtype):
            want = brute_force(z, codebook)
            got = nearest_code(z, codebook, backend="reference")
            assert torch.equal(got, want), f"reference, {kind}, {dtype}"
            assert_codes_exact(z, codebook, monkeypatch, want)
