from __future__ import annotations

import pytest
import torch

from msvq_fast.priors import draw_codes, gumbels, uniforms
from msvq_fast.priors.sampling import _mix


def test_uniforms_are_uniform_and_independent_of_shape() -> None:
    u = uniforms(3, torch.arange(400)[:, None], torch.arange(500))
    assert u.dtype == torch.float64 and u.min() > 0 and u.max() < 1
    counts = torch.histc(u.float(), 64, 0, 1)
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 63 + 4 * 126**0.5
    assert u.flatten().unique().numel() == u.numel()
    pairs = torch.corrcoef(torch.stack([u[:, :-1].flatten(), u[:, 1:].flatten()]))
    assert abs(float(pairs[0, 1])) < 0.01
    assert torch.equal(u[7:8, 9:10], uniforms(3, torch.tensor([[7]]), torch.tensor([[9]])))
    assert torch.equal(u[7, 9], uniforms(3, 7, torch.tensor(9)))
    assert not torch.equal(u, uniforms(4, torch.arange(400)[:, None], torch.arange(500)))


def test_the_last_uniform_is_below_one() -> None:
    # SplitMix64 backwards from 64 ones, the largest state.
    x, low = 2**64 - 1, 2**64 - 1
    x ^= x >> 31 ^ x >> 62
    x = x * pow(0x94D049BB133111EB, -1, 2**64) & low
    x ^= x >> 27 ^ x >> 54
    x = x * pow(0xBF58476D1CE4E5B9, -1, 2**64) & low
    x ^= x >> 30 ^ x >> 60
    counter = (x - 0x9E3779B97F4A7C15 - _mix(0)) % 2**64
    last = torch.tensor([counter - 2**64 if counter >= 2**63 else counter])
    assert uniforms(0, last).item() == 1 - 2.0**-53
    assert gumbels(0, last).isfinite()
    assert draw_codes(torch.tensor([[0.0, -torch.inf]]), uniforms(0, last)).item() == 0


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([0.0, 1.0, -torch.inf, 2.0])
    u = uniforms(0, torch.arange(40000))
    drawn = draw_codes(logits.expand(40000, 4), u, temperature=0.5)
    p = (logits.double() / 0.5).softmax(-1)
    share = torch.bincount(drawn, minlength=4) / 40000
    assert share[2] == 0
    assert ((share - p).abs() < 4 * (p * (1 - p) / 40000).sqrt() + 1e-12).all()


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"top_k": 2}, {1, 3}),
        ({"top_p": 0.6}, {3}),
        ({"top_p": 0.7}, {1, 3}),
        ({"top_k": 9}, {0, 1, 2, 3}),
    ],
)
def test_truncation(options: dict, allowed: set[int]) -> None:
    logits = torch.tensor([0.0, 1.0, 0.5, 2.2]).expand(5000, 4)  # p 0.07 0.18 0.11 0.64
    drawn = draw_codes(logits, uniforms(0, torch.arange(5000)), **options)
    assert set(drawn.tolist()) == allowed


@pytest.mark.parametrize("options", [{"top_k": 2}, {"top_p": 0.7}])
def test_what_is_left_is_drawn_in_its_own_proportions(options: dict[str, float]) -> None:
    logits = torch.tensor([1.0, 2.2, 0.5, 0.0])  # the last code is none of those left
    drawn = draw_codes(logits.expand(40000, 4), uniforms(0, torch.arange(40000)), **options)
    p = logits[:2].double().softmax(-1)
    share = torch.bincount(drawn, minlength=4) / 40000
    assert ((share[:2] - p).abs() < 4 * (p * (1 - p) / 40000).sqrt()).all()
    assert share[2:].tolist() == [0, 0]


def test_a_code_that_has_the_share_is_enough() -> None:
    drawn = draw_codes(torch.zeros(100, 2), uniforms(0, torch.arange(100)), top_p=0.5)
    assert not drawn.any()


def test_zero_temperature_and_the_ends_of_the_interval() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [-torch.inf, 0.0, -torch.inf]])
    ends = torch.tensor([2.0**-54, 1 - 2.0**-53], dtype=torch.float64)
    for temperature in (0, 5e-324, 1e-100):
        assert draw_codes(logits, ends, temperature=temperature).tolist() == [1, 1]
    for u in ends:
        assert draw_codes(logits[1], u).item() == 1
