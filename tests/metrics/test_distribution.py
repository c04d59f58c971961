from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from msvq_fast.metrics import fewest_images, frechet_distance, inception_score, kernel_distance
from msvq_fast.ops import InputError


def features(count, dim, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64) / dim**0.5
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) @ mixing + shift


def frechet_of_scipy(x, y):
    linalg = pytest.importorskip("scipy.linalg")
    x, y = x.numpy(), y.numpy()
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = linalg.sqrtm(a @ b)
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * root.real))


@pytest.mark.parametrize(("n", "m"), [(90, 70), (40, 33), (33, 90)])
def test_frechet_distance_is_that_of_scipy(n, m):
    x, y = features(n, 24, 1), features(m, 24, 2, shift=0.3)
    assert frechet_distance(x, y) == pytest.approx(frechet_of_scipy(x, y), rel=1e-6)


def test_frechet_distance_of_fewer_images_than_features():
    # The root of a singular product, from the eigenvalues of its symmetric form.
    x, y = features(9, 24, 1), features(7, 24, 2, shift=0.3)
    a, b = torch.cov(x.T), torch.cov(y.T)
    values, vectors = torch.linalg.eigh(a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    overlap = torch.linalg.eigvalsh(root @ b @ root).clamp_min(0).sqrt().sum()
    want = (x.mean(0) - y.mean(0)).square().sum() + a.trace() + b.trace() - 2 * overlap
    assert frechet_distance(x, y) == pytest.approx(float(want), rel=1e-6)


def test_frechet_distance_is_that_of_torchmetrics():
    fid = pytest.importorskip("torchmetrics.image.fid")
    x, y = features(300, 24, 1), features(250, 24, 2, shift=0.1)
    theirs = fid._compute_fid(x.mean(0), torch.cov(x.T), y.mean(0), torch.cov(y.T))
    assert frechet_distance(x, y) == pytest.approx(float(theirs), rel=1e-6)


@pytest.mark.parametrize(("n", "m"), [(300, 250), (40, 12), (97, 96)])
def test_distances_do_not_depend_on_blocks(n, m, monkeypatch):
    x, y = features(n, 12, 1), features(m, 12, 2, shift=0.3)
    kept = x.clone(), y.clone()
    whole = frechet_distance(x, y), kernel_distance(x, y), kernel_distance(x, x)
    monkeypatch.setattr("msvq_fast.metrics.distribution._ROWS", 7)
    blocks = frechet_distance(x, y), kernel_distance(x, y), kernel_distance(x, x)
    assert blocks == pytest.approx(whole, rel=1e-11)
    assert torch.equal(x, kept[0]) and torch.equal(y, kept[1])


class Largest(TorchDispatchMode):
    """Notes the most elements that a float64 tensor has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(made, torch.Tensor) and made.dtype == torch.float64:
                self.elements = max(self.elements, made.numel())
        return out


@pytest.mark.parametrize("paired", [True, False])
def test_no_set_is_in_memory_in_float64(paired, monkeypatch):
    """50,000 images have 0.8 GB of features then."""
    monkeypatch.setattr("msvq_fast.metrics.distribution._ROWS", 32)
    x, y = features(1000, 8, 1).float(), features(1000, 8, 2).float()
    with Largest() as largest:
        frechet_distance(x, y)
        kernel_distance(x, y, paired=paired)
        inception_score(x)
    assert 0 < largest.elements <= 32 * 32


def test_frechet_distance_of_known_gaussians():
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    # Means 5 apart, standard deviations twice as large in both directions.
    y = 2 * x + torch.tensor([3.0, 4.0])
    assert frechet_distance(x, y) == pytest.approx(25 + 2 * (2 / 3), rel=1e-12)
    assert frechet_distance(x, x) < 1e-12
    sets = [features(20, 8, seed) for seed in range(20)]  # rounding would put some below 0
    assert all(0 <= frechet_distance(x, x) < 1e-12 for x in sets)


def test_kernel_distance_is_its_double_sum():
    x, y = features(7, 5, 1), features(6, 5, 2, shift=0.2)

    def kernel(a, b):
        return float((a @ b / 5 + 1) ** 3)

    within = [
        sum(kernel(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j)
        / (len(s) * (len(s) - 1))
        for s in (x, y)
    ]
    between = sum(kernel(a, b) for a in x for b in y) / 42
    assert kernel_distance(x, y) == pytest.approx(sum(within) - 2 * between, rel=1e-12)


def test_kernel_distance_is_that_of_torchmetrics(monkeypatch):
    kid = pytest.importorskip("torchmetrics.image.kid")
    monkeypatch.setattr("msvq_fast.metrics.distribution._ROWS", 16)
    x, y = features(60, 24, 1), features(60, 24, 2, shift=0.1)
    assert kernel_distance(x, y) == pytest.approx(float(kid.poly_mmd(x, y)), rel=1e-6)


def test_kernel_distance_has_no_bias_where_frechet_has():
    kernel, frechet = [], []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        both = torch.randn(24, 8, generator=generator, dtype=torch.float64)
        x, y = both[:12], both[12:]
        kernel.append(kernel_distance(x, y))
        frechet.append(frechet_distance(x, y))
    error = torch.tensor(kernel).std() / 40**0.5
    assert abs(sum(kernel) / 40) < 3 * error
    assert min(frechet) > 1


def test_kernel_distance_of_pairs_has_no_bias():
    """Of images and their reconstructions; with pairs of a row and its own it lies far too low."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 8, generator=generator, dtype=torch.float64)
    y = 0.8 * x + 0.3 * torch.randn(2000, 8, generator=generator, dtype=torch.float64)
    want = kernel_distance(x, y, paired=True)
    halves = [kernel_distance(x[:1000], y[1000:]), kernel_distance(x[1000:], y[:1000])]
    assert sum(halves) / 2 == pytest.approx(want, abs=0.02)
    parts = list(zip(x.split(10), y.split(10), strict=True))
    for paired, biased in ((True, False), (False, True)):
        found = torch.tensor([kernel_distance(a, b, paired=paired) for a, b in parts])
        error = found.std() / len(found) ** 0.5
        assert (abs(found.mean() - want) > 3 * error) == biased
    assert kernel_distance(x, x, paired=True) == pytest.approx(0, abs=1e-12)
    with pytest.raises(InputError, match="y has 9 rows but x has 10; paired"):
        kernel_distance(x[:10], y[:9], paired=True)


@pytest.mark.filterwarnings("ignore:.*will save all extracted features:UserWarning")
@pytest.mark.parametrize("splits", [2, 4])
def test_inception_score_is_that_of_torchmetrics(splits, monkeypatch):
    inception = pytest.importorskip("torchmetrics.image.inception")
    logits = 3 * features(40, 12, 3)
    theirs = inception.InceptionScore(feature=torch.nn.Identity(), splits=splits)
    theirs.update(logits)
    monkeypatch.setattr(torch, "randperm", torch.arange)  # theirs shuffles
    mean, spread = theirs.compute()
    want = (float(mean), float(spread))
    assert inception_score(logits, splits=splits) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize(("count", "splits"), [(13, 10), (64, 10), (41, 4)])
def test_inception_score_has_as_many_parts_as_said_all_alike(count, splits):
    p = (3 * features(count, 12, 3)).softmax(dim=1)
    scores = []
    for i in range(splits):
        part = p[i * count // splits : (i + 1) * count // splits]
        scores.append((part * (part / part.mean(dim=0)).log()).sum(dim=1).mean().exp())
    want = (float(torch.stack(scores).mean()), float(torch.stack(scores).std()))
    assert inception_score(p.log(), splits=splits) == pytest.approx(want, rel=1e-9)


def test_inception_score_lies_between_one_and_the_number_of_classes():
    sure = torch.full((8, 4), -1e4)
    sure[torch.arange(8), torch.arange(8) % 4] = 0.0
    assert inception_score(sure, splits=1) == pytest.approx((4.0, 0.0))
    assert inception_score(torch.zeros(8, 4), splits=2) == pytest.approx((1.0, 0.0))


def test_fewest_images():
    assert fewest_images(2048) == 4096


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_bad_features_are_named(distance):
    good = features(5, 3, 0)
    with pytest.raises(InputError, match="y has 4 features per image but x has 3"):
        distance(good, features(5, 4, 0))
    with pytest.raises(InputError, match=r"x has shape \(1, 3\); expected at least 2 rows"):
        distance(good[:1], good)
    with pytest.raises(InputError, match=r"y has shape .* dtype torch\.int64"):
        distance(good, good.long())
    with pytest.raises(InputError, match="y has values that are not finite"):
        distance(good, good * math.inf)


def test_bad_splits_are_named():
    with pytest.raises(InputError, match="splits=6; expected 1 to 5"):
        inception_score(features(5, 3, 0), splits=6)
