"""Distances between two sets of images, from features of a network, in float64.

Heusel et al. 2017 (Fréchet distance), Bińkowski et al. 2018 (kernel distance), Salimans et al. 2016
(inception score). What a number means depends on the network as much as on the images: name it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from msvq_fast.ops import InputError

_ROWS = 1024  # of a set in float64 at a time


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """``|μ_x - μ_y|² + tr(Σ_x + Σ_y - 2 (Σ_x Σ_y)^½)`` of two sets of features.

    With few images it is biased upward: `fewest_images` says how many it takes to mean something.

    Args:
        x: ``(N, D)`` features, one row per image, N >= 2.
        y: ``(M, D)`` features, M >= 2.

    Returns:
        The squared distance of the two Gaussians, at least 0.

    Raises:
        InputError: If a set is too small, not a float matrix, not finite, or of another width.

    Numerics:
        The trace of the root is the sum of the singular values of ``X Yᵀ``, X and Y the centred
        features over √(N - 1): no covariance is squared, and no eigenvalue can turn negative.
    """
    _check_sets(x, y)
    mean_x, mean_y = _mean(x), _mean(y)
    root_x, root_y = _root(x, mean_x), _root(y, mean_y)
    overlap = torch.linalg.svdvals(root_x @ root_y.T).sum()
    shift = (mean_x - mean_y).square().sum()
    distance = shift + root_x.square().sum() + root_y.square().sum() - 2 * overlap
    return max(float(distance), 0.0)


def fewest_images(dim: int) -> int:
    """Images per set below which `frechet_distance` in ``dim`` dimensions is mostly bias."""
    return 2 * dim


def kernel_distance(x: Tensor, y: Tensor, *, paired: bool = False) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel ``(a·b / D + 1)³``.

    Its expectation does not depend on N, so it may be compared between small sets, and it may be
    slightly negative. All pairs are used, once: no random subsets.

    Args:
        x: ``(N, D)`` features, N >= 2.
        y: ``(M, D)`` features, M >= 2.
        paired: Row i of ``y`` was made from row i of ``x``, as a reconstruction is; N = M. These
            pairs are left out: they are no independent draws and would make the result too low,
            the more the smaller N. Equal sets then give 0.

    Raises:
        InputError: As `frechet_distance`, and for paired sets of different sizes.
    """
    _check_sets(x, y)
    n, m = len(x), len(y)
    if paired and n != m:
        raise InputError(f"y has {m} rows but x has {n}; paired sets need as many")
    within_x = (_kernel_sum(x, x) - _kernel_diagonal(x, x)) / (n * (n - 1))
    within_y = (_kernel_sum(y, y) - _kernel_diagonal(y, y)) / (m * (m - 1))
    if paired:
        between = (_kernel_sum(x, y) - _kernel_diagonal(x, y)) / (n * (n - 1))
    else:
        between = _kernel_sum(x, y) / (n * m)
    return float(within_x + within_y - 2 * between)


def inception_score(logits: Tensor, *, splits: int = 10) -> tuple[float, float]:
    """``exp(mean KL(p(class | image) ‖ p(class)))``, its mean and spread over parts of the set.

    Args:
        logits: ``(N, C)`` class scores before the softmax, one row per image.
        splits: Parts of as equal size as can be, in the order of the rows: rows that come class
            by class must be shuffled before.

    Returns:
        Mean and standard deviation (of a sample; 0 for one part), from 1 to C.

    Raises:
        InputError: If ``logits`` is not a finite float matrix or has fewer rows than ``splits``.
    """
    _check_features("logits", logits, least=1)
    if not 1 <= splits <= len(logits):
        raise InputError(f"splits={splits}; expected 1 to {len(logits)}, the number of images")
    scores = []
    cuts = [i * len(logits) // splits for i in range(1, splits)]  # as Salimans et al. cut
    for part in logits.tensor_split(cuts):
        log_p = part.double().log_softmax(dim=1)
        p = log_p.exp()
        marginal = p.mean(dim=0, keepdim=True)  # (1, C)
        divergence = torch.special.xlogy(p, p) - torch.special.xlogy(p, marginal)
        scores.append(divergence.sum(dim=1).mean().exp())
    values = torch.stack(scores)
    return float(values.mean()), float(values.std()) if len(values) > 1 else 0.0


def _mean(x: Tensor) -> Tensor:
    return torch.stack([rows.double().sum(dim=0) for rows in x.split(_ROWS)]).sum(dim=0) / len(x)


def _root(x: Tensor, mean: Tensor) -> Tensor:
    """R with ``RᵀR`` the covariance of the rows of ``x``, at most D rows."""
    dim = x.shape[1]
    root = mean.new_empty(0, dim)
    for rows in x.split(max(_ROWS, 4 * dim)):  # longer than R, which every block is joined to
        root = torch.cat([root, rows.double() - mean])
        if len(root) > dim:
            root = torch.linalg.qr(root, mode="r").R
    return root / (len(x) - 1) ** 0.5


def _kernel_sum(x: Tensor, y: Tensor) -> Tensor:
    parts = []
    for i, rows in enumerate(x.split(_ROWS)):
        a = rows.double()
        for j, others in enumerate(y.split(_ROWS)):
            if x is y and j < i:  # the transpose of what is counted twice
                continue
            part = (a @ others.double().T).div_(x.shape[1]).add_(1).pow_(3).sum()
            parts.append(2 * part if x is y and j > i else part)
    return torch.stack(parts).sum()


def _kernel_diagonal(x: Tensor, y: Tensor) -> Tensor:
    pairs = zip(x.split(_ROWS), y.split(_ROWS), strict=True)
    dots = torch.cat([(a.double() * b.double()).sum(dim=1) for a, b in pairs])
    return (dots / x.shape[1] + 1).pow(3).sum()


def _check_sets(x: Tensor, y: Tensor) -> None:
    _check_features("x", x, least=2)
    _check_features("y", y, least=2)
    if x.shape[1] != y.shape[1]:
        raise InputError(f"y has {y.shape[1]} features per image but x has {x.shape[1]}")


def _check_features(name: str, x: Tensor, *, least: int) -> None:
    if x.dim() != 2 or not x.dtype.is_floating_point:
        raise InputError(
            f"{name} has shape {tuple(x.shape)} and dtype {x.dtype}; expected float (N, D)"
        )
    if len(x) < least or x.shape[1] < 1:
        raise InputError(f"{name} has shape {tuple(x.shape)}; expected at least {least} rows")
    if not bool(x.isfinite().all()):
        raise InputError(f"{name} has values that are not finite")
