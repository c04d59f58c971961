from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from msvq_fast.ops import InputError
from msvq_fast.priors import (
    AutoregressivePrior,
    MaskGITPrior,
    PriorConfig,
    from_pretrained,
    sample,
)
from msvq_fast.priors.autoregressive import _Decoder, fronts
from msvq_fast.priors.maskgit import halton_rank
from msvq_fast.priors.transformer import ScaleTransformer

GRIDS = ((4, 4), (8, 8))
SMALL = {"num_codes": 11, "depth": 2, "heads": 2, "width": 16}


def prior(kind: type, grids=GRIDS, kernels=None, **options):
    settings = {**SMALL, **options}
    model = kind(PriorConfig(grids=grids, kernels=kernels, **settings)).eval()
    for parameter in model.parameters():  # far from the small start, so that every path shows
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def random_codes(grids, batch: int = 2) -> list[Tensor]:
    return [torch.randint(SMALL["num_codes"], (batch, *grid)) for grid in grids]


@torch.no_grad()
def cached_logits(model, codes: list[Tensor], labels=None, decoding="wavefront") -> list[Tensor]:
    """What `logits` returns, computed step by step as `draw_scale` does."""
    result = []
    for m, grid in enumerate(codes):
        scale = model.scale_model(m)
        decoder = _Decoder(scale, scale.context(codes[:m], labels), len(grid), labels)
        decoder.codes[:, :-1] = grid.flatten(1)
        logits = decoder.memory[0][0].new_zeros(len(grid), scale.tokens + 1, scale.num_codes)
        for cells in fronts(scale, decoding == "wavefront"):
            logits[:, cells] = decoder.step(cells)
        result.append(logits[:, :-1])
    return result


def influence(model, codes: list[Tensor], masked: bool) -> list[Tensor]:
    """Which position ``(N_n)`` of every scale each own logit depends on: ``(N_m, N_n)`` bool."""
    scale = model.scale_model(len(codes) - 1)
    own = codes[-1].flatten(1)
    own = torch.full_like(own, scale.num_codes) if masked else own
    logits = scale(scale.embed(own), scale.context(codes[:-1]))
    rows = []
    for i in range(scale.tokens):
        grads = torch.autograd.grad(logits[:, i].sum(), list(scale.positions), retain_graph=True)
        rows.append([grad.abs().sum(1) > 0 for grad in grads])
    return [torch.stack([row[n] for row in rows]) for n in range(len(codes))]


def test_dense_causal_mask_of_figure_3_by_gradient() -> None:
    grids = ((2, 2), (4, 4))
    model = prior(AutoregressivePrior, grids, depth=2)
    coarse, own = influence(model, random_codes(grids), masked=False)
    assert coarse.all()
    assert torch.equal(own, torch.ones(16, 16).tril().bool())


def test_local_mask_of_figure_3_by_gradient() -> None:
    grids = ((2, 2), (4, 4))
    model = prior(MaskGITPrior, grids, kernels=(1, 3), depth=1)
    coarse, own = influence(model, random_codes(grids), masked=True)
    y, x = torch.arange(16) // 4, torch.arange(16) % 4
    near = ((y[:, None] - y).abs() <= 1) & ((x[:, None] - x).abs() <= 1)
    assert torch.equal(own, near)  # the residual path brings a token to itself
    assert own[1].sum() == 6 and own[10].sum() == 9
    assert torch.equal(coarse, (y // 2 * 2 + x // 2)[:, None] == torch.arange(4))


def test_a_masked_token_leaves_itself_out_as_in_figure_3() -> None:
    scale = prior(MaskGITPrior, ((2, 2), (4, 4)), (1, 3)).scale_model(1)
    query, key = torch.randn(1, 2, 16, 8), [torch.randn(1, 2, n, 8) for n in (4, 16)]
    value = [torch.randn(1, 2, n, 8, requires_grad=True) for n in (4, 16)]
    out = scale._attend(query, key, value, 1)
    for token, count in ((1, 5), (10, 8)):
        grads = torch.autograd.grad(out[:, :, token].sum(), value, retain_graph=True)
        coarse, own = (grad.abs().sum((0, 1, 3)) > 0 for grad in grads)
        assert coarse.sum() == 1 and own.sum() == count and not own[token]


@pytest.mark.parametrize("kernels", [None, (1, 3), (3, 5)])
def test_no_logit_depends_on_its_own_code_or_a_later_one(kernels) -> None:
    grids = ((2, 3), (4, 6))
    model = prior(AutoregressivePrior, grids, kernels)
    codes = random_codes(grids, batch=1)
    before = model.logits(codes)[1]
    reached = torch.zeros(24, 24, dtype=torch.bool)  # logit i by code j
    for j in range(24):
        changed = codes[1].clone()
        changed.view(-1)[j] = (changed.view(-1)[j] + 1) % 11
        reached[:, j] = (model.logits([codes[0], changed])[1] != before).any(-1)[0]
    assert not reached.triu().any()
    assert reached[1:].any(1).all()
    assert reached[:, :23].any(0).all(), "a code, such as a row's last, that nobody ever sees"
    if kernels is None:
        assert torch.equal(reached, torch.ones(24, 24).tril(-1).bool())


@pytest.mark.parametrize("grids", [((3, 5),), GRIDS, ((2, 2), (3, 5), (6, 10))])
@pytest.mark.parametrize("kernels", [None, (3, 3, 3), (1, 3, 5)])
@pytest.mark.parametrize("decoding", ["wavefront", "sequential"])
def test_cached_path_equals_full_path(grids, kernels, decoding: str) -> None:
    kernels = None if kernels is None else kernels[-len(grids) :]
    model = prior(AutoregressivePrior, grids, kernels, num_classes=3)
    codes, labels = random_codes(grids), torch.tensor([0, 2])
    with torch.no_grad():
        full = model.logits(codes, labels)
    cached = cached_logits(model, codes, labels, decoding=decoding)
    for mine, other in zip(cached, full, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grid", [(12, 12), (5, 9), (9, 4), (19, 20)])
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_wavefront_equals_sequential_bit_for_bit(grid, kernel: int) -> None:
    grids = ((3, 3), grid)
    model = prior(AutoregressivePrior, grids, (3, kernel))
    codes = random_codes(grids)
    one = cached_logits(model, codes, decoding="sequential")
    all_at_once = cached_logits(model, codes, decoding="wavefront")
    assert all(torch.equal(a, b) for a, b in zip(one, all_at_once, strict=True))
    drawn = [
        sample(model, 3, seed=5, coarser=[codes[0][:1].expand(3, 3, 3)], settings={"decoding": d})[
            1
        ]
        for d in ("sequential", "wavefront")
    ]
    assert torch.equal(*drawn)
    assert len(drawn[0].unique()) > 5
    steps = len(fronts(model.scale_model(1), True))
    assert steps == grid[1] + (grid[0] - 1) * (kernel // 2)


def test_wavefront_needs_few_steps() -> None:
    config = PriorConfig(grids=((1, 1), (128, 128)), kernels=(1, 7), **SMALL)
    model = AutoregressivePrior(config).scale_model(1)
    table = fronts(model, True)
    assert table.shape == (509, 48)  # 43 cells at most, in tiles of 16
    cells = table[table < 128 * 128]
    assert torch.equal(cells.sort().values, torch.arange(128 * 128))


def test_a_token_costs_the_same_on_any_large_grid() -> None:
    for side, slots in ((8, 8), (32, 16), (128, 16)):
        config = PriorConfig(grids=((1, 1), (side, side)), kernels=(1, 3), **SMALL)
        model = AutoregressivePrior(config).scale_model(1)
        one, front = fronts(model, False), fronts(model, True)
        assert one.shape == (side * side, slots) and front.shape[1] % slots == 0
        assert ((one < side * side).sum(1) == 1).all()
        places = (front < side * side).nonzero()[:, 1] % slots
        assert torch.equal(places, front[front < side * side] // side % slots)


@pytest.mark.parametrize("kind", [AutoregressivePrior, MaskGITPrior])
@pytest.mark.parametrize("kernels", [None, (3, 3, 5, 5)])
@pytest.mark.parametrize("scales", [1, 3, 4])
def test_any_number_of_scales_and_labels(kind: type, kernels, scales: int) -> None:
    grids = tuple((m + 3, m + 5) for m in range(scales))
    kernels = None if kernels is None else kernels[:scales]
    model = prior(kind, grids, kernels, num_classes=3)
    labels = torch.tensor([0, 2])
    codes = sample(model, 2, labels=labels)
    assert [tuple(c.shape[1:]) for c in codes] == list(grids)
    loss = model(codes, labels).loss
    used = [p for p in model.parameters() if p.requires_grad]
    assert loss.isfinite() and all(
        g is not None for g in torch.autograd.grad(loss, used, allow_unused=False)
    )
    others = sample(model, 2, labels=labels.flip(0))
    assert any(not torch.equal(a, b) for a, b in zip(codes, others, strict=True))


@torch.no_grad()
def test_every_scale_has_its_own_settings() -> None:
    model = prior(AutoregressivePrior)
    settings = [{"temperature": 0.0}, {"temperature": 9.0}]
    a, b = (sample(model, 2, seed=seed, settings=settings) for seed in (1, 2))
    assert torch.equal(a[0], b[0]) and not torch.equal(a[1], b[1])


@torch.no_grad()
@pytest.mark.parametrize("kind", [AutoregressivePrior, MaskGITPrior])
def test_no_label_is_a_row_of_its_own(kind: type) -> None:
    scale, codes = prior(kind, num_classes=3).scale_model(0), random_codes(GRIDS)[0].flatten(1)
    for row in range(4):
        before = scale.embed(codes)
        scale.labels.weight[row] += 1
        assert torch.equal(scale.embed(codes), before) == (row < 3)


@pytest.mark.parametrize("kind", [AutoregressivePrior, MaskGITPrior])
def test_coarse_keys_are_computed_once_per_scale(
    kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    context = ScaleTransformer.context

    def counted(model: ScaleTransformer, *rest: object) -> object:
        calls.append(model)
        return context(model, *rest)

    monkeypatch.setattr(ScaleTransformer, "context", counted)
    model = prior(kind, kernels=(3, 5))
    sample(model, 2)
    assert calls == [model.scale_model(0), model.scale_model(1)]


@pytest.mark.parametrize("kind", [AutoregressivePrior, MaskGITPrior])
def test_images_do_not_depend_on_their_batch(kind: type) -> None:
    model = prior(kind, kernels=(3, 5))
    whole = sample(model, 4, seed=3)
    parts = [sample(model, 2, seed=3, first=first) for first in (0, 2)]
    for m in range(2):
        assert torch.equal(whole[m], torch.cat([part[m] for part in parts]))
        assert whole[m].min() >= 0 and whole[m].max() < 11
    assert not torch.equal(whole[0][0], whole[0][1])
    assert not torch.equal(whole[1], sample(model, 4, seed=4)[1])


@pytest.mark.parametrize("kind", [AutoregressivePrior, MaskGITPrior])
def test_variations_keep_the_coarse_codes_and_fixed_codes_stay(kind: type) -> None:
    model = prior(kind, kernels=(3, 5))
    coarse = sample(model, 2, seed=0, upto=0)
    assert len(coarse) == 1
    a, b = (sample(model, 2, seed=s, coarser=coarse) for s in (1, 2))
    assert torch.equal(a[0], coarse[0]) and torch.equal(b[0], coarse[0])
    assert not torch.equal(a[1], b[1])
    fixed = torch.full((2, 8, 8), -1)
    fixed[:, 2:5] = torch.randint(11, (2, 3, 8))
    inpainted = sample(model, 2, seed=1, coarser=coarse, fixed=[None, fixed])[1]
    assert torch.equal(inpainted[:, 2:5], fixed[:, 2:5])
    both = sample(model, 2, seed=1, fixed=[coarse[0], fixed])
    assert torch.equal(both[0], coarse[0]) and torch.equal(both[1][:, 2:5], fixed[:, 2:5])
    assert inpainted.min() >= 0 and not torch.equal(inpainted[:, 5:], a[1][:, 5:])


def test_autoregressive_frequencies_match_exact_conditionals() -> None:
    """Chi-square of 2 x 2 grids of two codes against the chain rule, all 16 outcomes."""
    model = prior(AutoregressivePrior, ((1, 1), (2, 2)), (1, 3), num_codes=2)
    outcomes = torch.tensor([[i >> k & 1 for k in range(4)] for i in range(16)]).view(16, 2, 2)
    coarse = torch.ones(16, 1, 1, dtype=torch.int64)
    with torch.no_grad():
        log_p = model.logits([coarse, outcomes])[1].log_softmax(-1)
    expected = log_p.gather(-1, outcomes.flatten(1)[..., None]).sum((1, 2)).exp().double()
    count = 20000
    drawn = sample(model, count, seed=1, coarser=[coarse[:1].expand(count, 1, 1)])[1]
    index = (drawn.flatten(1) * torch.tensor([1, 2, 4, 8])).sum(1)
    chi_square(torch.bincount(index, minlength=16), expected * count)


@pytest.mark.parametrize("order", ["confidence", "halton"])
def test_maskgit_frequencies_match_exact_conditionals(order: str) -> None:
    """One pass over two cells draws both from the logits of two masks, independently."""
    model = prior(MaskGITPrior, ((1, 2),), num_codes=3)
    count = 20000
    settings = {"steps": 1, "order": order}
    drawn = sample(model, count, seed=1, settings=settings)[0].flatten(1)
    scale = model.scale_model(0)
    masks = torch.full((1, 2), 3)
    with torch.no_grad():
        p = scale(scale.embed(masks), scale.context([]))[0].double().softmax(-1)
    observed = torch.bincount(drawn[:, 0] * 3 + drawn[:, 1], minlength=9)
    chi_square(observed, (p[0][:, None] * p[1]).flatten() * count)


def test_guided_frequencies_match_exact_conditionals() -> None:
    """One pass with guidance w: the logits are ``(1 + w)`` with the label less ``w`` without."""
    model = prior(MaskGITPrior, ((1, 2),), num_codes=3, num_classes=2)
    count, w = 20000, 1.5
    labels = torch.ones(count, dtype=torch.int64)
    settings = {"steps": 1, "guidance": w}
    drawn = sample(model, count, seed=1, labels=labels, settings=settings)[0].flatten(1)
    scale = model.scale_model(0)
    masks = torch.full((1, 2), 3)
    with torch.no_grad():
        labelled = scale(scale.embed(masks, labels[:1]), scale.context([], labels[:1]))[0]
        plain = scale(scale.embed(masks), scale.context([]))[0]
    p = ((1 + w) * labelled - w * plain).double().softmax(-1)
    assert not torch.allclose(p, plain.double().softmax(-1), atol=0.05)
    observed = torch.bincount(drawn[:, 0] * 3 + drawn[:, 1], minlength=9)
    chi_square(observed, (p[0][:, None] * p[1]).flatten() * count)


def test_halton_order_visits_every_cell_and_spreads() -> None:
    # Radical inverses in bases 2 and 3: (1/2, 1/3), (1/4, 2/3), (3/4, 1/9), (1/8, 4/9).
    assert halton_rank((4, 6)).argsort()[:4].tolist() == [2 * 6 + 2, 6 + 4, 3 * 6, 2]
    for grid in ((8, 8), (5, 7), (1, 3)):
        rank = halton_rank(grid)
        assert torch.equal(rank.sort().values, torch.arange(grid[0] * grid[1]))
    first = halton_rank((16, 16)).view(16, 16) < 64
    quarters = [first[y : y + 8, x : x + 8].sum() for y in (0, 8) for x in (0, 8)]
    assert all(14 <= count <= 18 for count in quarters)


def test_maskgit_two_passes_match_exact_conditionals() -> None:
    """Halton order fixes which cell is first, so two passes are the chain rule."""
    model = prior(MaskGITPrior, ((1, 2),), num_codes=3)
    count = 20000
    drawn = sample(model, count, seed=2, settings={"steps": 2, "order": "halton"})[0].flatten(1)
    first, second = halton_rank((1, 2)).argsort().tolist()
    scale = model.scale_model(0)
    states = torch.full((4, 2), 3)
    states[1:, first] = torch.arange(3)
    with torch.no_grad():
        p = scale(scale.embed(states), scale.context([])).double().softmax(-1)
    expected = p[0, first][:, None] * p[1:, second]
    observed = torch.bincount(drawn[:, first] * 3 + drawn[:, second], minlength=9)
    chi_square(observed, expected.flatten() * count)


def chi_square(observed: Tensor, expected: Tensor) -> None:
    large = expected >= 5
    assert large.sum() >= 4
    o = torch.cat([observed[large].double(), observed[~large].sum()[None].double()])
    e = torch.cat([expected[large], expected[~large].sum()[None]])
    o, e = o[e > 0], e[e > 0]
    statistic, freedom = ((o - e) ** 2 / e).sum(), len(e) - 1
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5  # about one in 2000 by chance


@pytest.mark.parametrize("schedule", ["cosine", "arccos"])
def test_maskgit_loss_counts_masked_codes_alone(schedule: str) -> None:
    model = prior(MaskGITPrior, kernels=(3, 5))
    codes = random_codes(GRIDS, batch=64)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    a, b = (model(codes, schedule=schedule, generator=g) for g in generators)
    assert torch.equal(a.loss, b.loss) and torch.allclose(a.loss, a.nll.sum())
    with torch.no_grad():
        model.scale_model(1).head.weight.zero_()
        model.scale_model(1).head.bias.zero_()
    assert float(model(codes).nll[1]) == pytest.approx(torch.tensor(11.0).log().item())


def test_guidance_moves_draws_and_needs_labels() -> None:
    model = prior(MaskGITPrior, num_classes=2)
    labels = torch.tensor([0, 1])
    plain = sample(model, 2, labels=labels)[1]
    guided = sample(model, 2, labels=labels, settings={"guidance": 3.0})[1]
    assert not torch.equal(plain, guided)
    with pytest.raises(InputError, match="without labels"):
        sample(model, 2, settings={"guidance": 3.0})


@pytest.mark.parametrize("kind", [AutoregressivePrior, MaskGITPrior])
def test_learns_and_saves(kind: type, tmp_path: Path) -> None:
    model = kind(PriorConfig(grids=((2, 2), (4, 4)), kernels=(3, 3), **SMALL))
    codes = random_codes(((2, 2), (4, 4)))
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(80):
        adam.zero_grad()
        model(codes).loss.backward()
        adam.step()
    assert float(model(codes).nll.max()) < 0.8 < 2.39  # log 11
    model.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path).eval()
    assert again.config == model.config
    assert torch.equal(sample(again, 2)[1], sample(model.eval(), 2)[1])
    other = MaskGITPrior if kind is AutoregressivePrior else AutoregressivePrior
    with pytest.raises(InputError, match="holds a"):
        other.from_pretrained(tmp_path)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for load in (kind.from_pretrained, from_pretrained):
        with pytest.raises(InputError, match="run is a run, not a saved model"):
            load(tmp_path / "run")


def test_parameters_beside_table_4() -> None:
    config = {"grids": GRIDS, "num_codes": 512}
    sizes = PriorConfig(**config)
    assert (sizes.depth, sizes.heads, sizes.width) == (8, 8, 256)
    masked = MaskGITPrior(PriorConfig(**config, kernels=(3, 5)))
    count = sum(p.numel() for p in masked.parameters())
    assert count == 13_318_656  # 14.7 M less VQ-VAE 2's 1.39 M
    dense = MaskGITPrior(PriorConfig(**config))
    assert sum(p.numel() for p in dense.parameters()) == count  # windows have no parameters
    raster = AutoregressivePrior(PriorConfig(**config))
    assert sum(p.numel() for p in raster.parameters()) == count + 2 * 513 * 256
