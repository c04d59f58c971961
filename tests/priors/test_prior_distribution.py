"""Distributions of draws by enumeration, and likelihoods in float64."""

from __future__ import annotations

import pytest
import torch
from priors.test_priors import GRIDS, chi_square, prior, random_codes
from torch import Tensor

from msvq_fast.priors import AutoregressivePrior, MaskGITPrior, maskgit, sample
from msvq_fast.priors.transformer import ScaleTransformer

COUNT = 30000


@pytest.mark.parametrize("kernels", [None, (1, 3)])
@pytest.mark.parametrize("options", [{"temperature": 0.6}, {"top_k": 2}, {"top_p": 0.8}])
def test_both_scales_together_follow_the_chain_rule(
    kernels: tuple[int, int] | None, options: dict[str, float]
) -> None:
    """All 3^6 pairs of grids, each conditional heated or cut by hand."""
    model = prior(AutoregressivePrior, ((1, 2), (2, 2)), kernels, num_codes=3)
    cells = torch.cartesian_prod(*[torch.arange(3)] * 6)
    codes = [cells[:, :2].unflatten(1, (1, 2)), cells[:, 2:].unflatten(1, (2, 2))]
    expected = torch.ones(3**6, dtype=torch.float64)
    with torch.no_grad():
        for logits, grid in zip(model.logits(codes), codes, strict=True):
            p = conditional(logits.double(), **options)
            expected *= p.gather(-1, grid.flatten(1)[..., None])[..., 0].prod(1)
    assert float(expected.sum()) == pytest.approx(1, rel=1e-6)
    drawn = torch.cat([c.flatten(1) for c in sample(model, COUNT, settings=options)], 1)
    observed = torch.bincount((drawn * 3 ** torch.arange(5, -1, -1)).sum(1), minlength=3**6)
    assert not observed[expected == 0].any()
    chi_square(observed, expected * COUNT)


def conditional(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Probabilities ``(..., 3)`` with all codes but the likeliest left out, by counting."""
    p = (logits / temperature).softmax(-1)
    likelier = p[..., None, :] > p[..., None]
    if top_k is not None:
        p = p * (likelier.sum(-1) < top_k)
    if top_p is not None:
        p = p * ((likelier * p[..., None, :]).sum(-1) < top_p)
    return p / p.sum(-1, keepdim=True)


@pytest.mark.parametrize("choice_temperature", [0.0, 0.7, 4.5])
def test_maskgit_keeps_the_more_confident_of_two_cells(choice_temperature: float) -> None:
    """Of two noisy log-probabilities one is larger with a logistic probability (Gumbel-max)."""
    model = prior(MaskGITPrior, ((1, 2),), num_codes=3)
    scale = model.scale_model(0)
    states = torch.tensor([[3, 3], *([a, 3] for a in range(3)), *([3, b] for b in range(3))])
    with torch.no_grad():
        p = scale(scale.embed(states), scale.context([])).double().softmax(-1)
    log_p, expected = p[0].log(), torch.zeros(3, 3, dtype=torch.float64)
    noise = max(choice_temperature / 2, 1e-9)  # after the first of two passes
    for a in range(3):
        for b in range(3):
            both = p[0, 0, a] * p[0, 1, b]
            first = ((log_p[0, a] - log_p[1, b]) / noise).sigmoid()
            expected[a] += both * first * p[1 + a, 1]
            expected[:, b] += both * (1 - first) * p[4 + b, 0]
    settings = {"steps": 2, "choice_temperature": choice_temperature}
    drawn = sample(model, COUNT, seed=4, settings=settings)[0].flatten(1)
    chi_square(torch.bincount(drawn @ torch.tensor([3, 1]), minlength=9), expected.view(9) * COUNT)


def test_guidance_grows_from_pass_to_pass() -> None:
    """Two passes in a fixed order: half of it for the first cell, all for the second."""
    model = prior(MaskGITPrior, ((1, 2),), num_codes=3, num_classes=2)
    first, second = maskgit.halton_rank((1, 2)).argsort().tolist()
    scale, label = model.scale_model(0), torch.ones(4, dtype=torch.int64)
    states = torch.full((4, 2), 3)
    states[1:, first] = torch.arange(3)
    with torch.no_grad():
        labelled = scale(scale.embed(states, label), scale.context([], label)).double()
        plain = scale(scale.embed(states), scale.context([])).double()
    half, whole = ((1 + w) * labelled - w * plain for w in (1.0, 2.0))
    expected = half[0, first].softmax(-1)[:, None] * whole[1:, second].softmax(-1)
    settings = {"steps": 2, "order": "halton", "guidance": 2.0}
    labels = torch.ones(COUNT, dtype=torch.int64)
    drawn = sample(model, COUNT, seed=2, labels=labels, settings=settings)[0].flatten(1)
    observed = torch.bincount(drawn[:, first] * 3 + drawn[:, second], minlength=9)
    chi_square(observed, expected.flatten() * COUNT)


@pytest.mark.parametrize("order", ["confidence", "halton"])
@pytest.mark.parametrize(
    ("grid", "masked"),
    [((8, 8), [64, 62, 59, 53, 45, 35, 24, 12]), ((1, 3), [3, 2, 1, 0, 0, 0, 0, 0])],
)
def test_the_cosine_of_the_pass_is_still_masked(
    monkeypatch: pytest.MonkeyPatch, order: str, grid: tuple[int, int], masked: list[int]
) -> None:
    """⌊64 cos(π t / 16)⌋ before pass t + 1, and at least one cell fewer than before."""
    seen, embed = [], ScaleTransformer.embed

    def counted(model: ScaleTransformer, codes: Tensor, *rest: object) -> Tensor:
        seen.append((codes == model.num_codes).sum(1).unique().tolist())
        return embed(model, codes, *rest)

    monkeypatch.setattr(ScaleTransformer, "embed", counted)
    sample(prior(MaskGITPrior, (grid,)), 3, settings={"order": order})
    assert seen == [[count] for count in masked]


@pytest.mark.parametrize("kind", [AutoregressivePrior, MaskGITPrior])
def test_losses_of_float64_are_float64(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maskgit, "_random_mask", lambda codes, *rest: codes < 4)
    model, codes = prior(kind, kernels=(3, 5)).double(), random_codes(GRIDS)
    out = model(codes)
    assert out.loss.dtype == out.nll.dtype == torch.float64
    torch.testing.assert_close(out.loss.detach(), out.nll.sum(), rtol=1e-12, atol=0)
    for m, grid in enumerate(codes):
        own = grid.flatten(1)
        if kind is AutoregressivePrior:
            logits, counted = model.logits(codes)[m], torch.ones_like(own, dtype=torch.bool)
        else:
            counted = own < 4
            logits = model._logits(m, codes[:m], own.masked_fill(counted, 11), None)
        log_p = logits.log_softmax(-1).gather(-1, own[..., None])[..., 0]
        assert float(out.nll[m]) == pytest.approx(-log_p[counted].mean().item(), rel=1e-12)


def test_confidence_does_not_wait_for_the_halton_order(monkeypatch: pytest.MonkeyPatch) -> None:
    walked = []
    real = maskgit.halton_rank
    monkeypatch.setattr(maskgit, "halton_rank", lambda grid: walked.append(grid) or real(grid))
    model = prior(MaskGITPrior, kernels=(3, 5))
    sample(model, 2)
    assert not walked
    sample(model, 2, settings={"order": "halton"})
    assert walked == list(GRIDS)


@pytest.mark.parametrize(("schedule", "share"), [("cosine", 0.2724), ("arccos", 0.1409)])
def test_how_many_cells_are_masked(schedule: str, share: float) -> None:
    """More than 0.91 of them for u below 2 arccos(0.91) / π, and below cos(0.91 π / 2)."""
    masked = maskgit._random_mask(torch.zeros(6000, 50), schedule, None).sum(1)
    assert float((masked > 45).double().mean()) == pytest.approx(share, abs=0.02)
    assert int(masked.min()) == 1
    assert maskgit._random_mask(torch.zeros(9, 1), schedule, None).all()


def test_label_smoothing_is_of_the_loss_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maskgit, "_random_mask", lambda codes, *rest: codes < 4)
    model, codes = prior(MaskGITPrior, ((4, 4),)), random_codes(((4, 4),))
    plain, smooth = model(codes), model(codes, label_smoothing=0.3)
    assert torch.equal(plain.nll, smooth.nll) and torch.equal(plain.loss, plain.nll.sum())
    own = codes[0].flatten(1)
    hidden = own < 4
    log_p = model._logits(0, [], own.masked_fill(hidden, 11), None).log_softmax(-1)
    even = -log_p[hidden].mean()
    torch.testing.assert_close(smooth.loss, 0.7 * plain.loss + 0.3 * even)


def test_dropout_acts_after_attention_and_after_the_perceptron() -> None:
    block = prior(MaskGITPrior, dropout=0.9).scale_model(0).blocks[0]
    x, attended = torch.randn(1, 16, 16), torch.randn(1, 2, 16, 8)
    with torch.no_grad():
        whole = block.finish(x, attended)
        assert torch.equal(whole, block.finish(x, attended))
        block.train()
        block.to_out.weight.zero_()
        block.to_out.bias.fill_(1.0)
        block.perceptron[2].weight.zero_()
        block.perceptron[2].bias.fill_(100.0)
        added = block.finish(x, attended) - x  # of 0, 10, 1000 and 1010
    assert added.round().unique().tolist() == [0, 10, 1000, 1010]
