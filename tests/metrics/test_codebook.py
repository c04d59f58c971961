from __future__ import annotations

import math

import pytest
import torch

from msvq_fast.metrics import CodeUsage, perplexity, usage
from msvq_fast.ops import InputError


@pytest.mark.parametrize(
    ("counts", "percent", "effective"),
    [
        ([5, 0, 0, 0], 25.0, 1.0),
        ([3, 3, 3, 3], 100.0, 4.0),
        ([2, 1, 1, 0], 75.0, 2**1.5),  # entropy 1.5 bits
        ([0, 0, 0, 0], 0.0, 0.0),
    ],
)
def test_golden_values(counts, percent, effective):
    counts = torch.tensor(counts)
    assert float(usage(counts)) == percent
    assert float(perplexity(counts)) == pytest.approx(effective, rel=1e-14)


def test_huge_counts_stay_exact():
    counts = torch.tensor([2**52, 2**52])
    assert float(perplexity(counts)) == pytest.approx(2.0, rel=1e-14)
    assert float(usage(counts)) == 100.0


def test_leading_indices_are_histograms_of_their_own():
    counts = torch.tensor([[4, 4], [8, 0], [0, 0]])
    assert usage(counts).tolist() == [100.0, 50.0, 0.0]
    assert perplexity(counts).tolist() == pytest.approx([2.0, 1.0, 0.0])


def test_the_split_into_batches_does_not_matter():
    codes = torch.randint(0, 50, (7, 4, 6)).square() % 64
    whole, parts = CodeUsage(64), CodeUsage(64)
    whole.update(codes)
    for part in codes.split([1, 4, 2]):
        parts.update(part)
    parts.update(codes[:0])
    assert torch.equal(whole.counts, parts.counts)
    assert int(whole.counts.sum()) == codes.numel()
    assert (whole.usage, whole.perplexity) == (parts.usage, parts.perplexity)
    p = torch.bincount(codes.flatten(), minlength=64) / codes.numel()
    entropy = -sum(q * math.log(q) for q in p.tolist() if q)
    assert whole.perplexity == pytest.approx(math.exp(entropy), rel=1e-6)
    assert whole.usage == 100 * len(codes.unique()) / 64


def test_errors_name_the_argument():
    with pytest.raises(InputError, match="num_codes=0"):
        CodeUsage(0)
    counter = CodeUsage(8)
    with pytest.raises(InputError, match=r"codes range over \[0, 8\]; expected \[0, 7\]"):
        counter.update(torch.tensor([0, 8]))
    with pytest.raises(InputError, match=r"codes range over \[-1, 0\]"):
        counter.update(torch.tensor([0, -1]))
    with pytest.raises(InputError, match=r"codes has dtype torch\.int32"):
        counter.update(torch.zeros(3, dtype=torch.int32))
    assert int(counter.counts.sum()) == 0
    with pytest.raises(InputError, match=r"counts has dtype torch\.float32"):
        usage(torch.ones(3))
    with pytest.raises(InputError, match=r"counts has shape \(\)"):
        perplexity(torch.tensor(3))
