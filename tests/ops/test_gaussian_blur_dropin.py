"""The blur called as other libraries are, against them or against their formula written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from msvq_fast.ops import InputError, default_sigma, gaussian_blur

SETTINGS = [((31, 5), (5.0, 1.1)), ((3, 21), (0.8, 3.5))]


def torchvision_blur(x: Tensor, kernel_size: list[int], sigma: list[float] | None) -> Tensor:
    """Pairs are (x, y); sigma's default is 0.3 ((k - 1) / 2 - 1) + 0.8; a dense kernel."""
    sigma = sigma or [0.3 * ((k - 1) * 0.5 - 1) + 0.8 for k in kernel_size]
    axes = []
    for size, width in zip(kernel_size, sigma, strict=True):
        offsets = torch.linspace(-(size - 1) / 2, (size - 1) / 2, size, dtype=torch.float64)
        weights = torch.exp(-0.5 * (offsets / width) ** 2)
        axes.append(weights / weights.sum())
    kernel = torch.outer(axes[1], axes[0]).expand(x.shape[1], 1, -1, -1)
    left, top = kernel_size[0] // 2, kernel_size[1] // 2
    padded = F.pad(x.double(), [left, left, top, top], mode="reflect")
    return F.conv2d(padded, kernel, groups=x.shape[1])


@pytest.mark.parametrize(("sizes", "sigmas"), SETTINGS)
@pytest.mark.parametrize("border", ["reflect", "replicate", "circular", "constant"])
def test_kornias_pairs_and_borders(
    sizes: tuple[int, int], sigmas: tuple[float, float], border: str
) -> None:
    filters = pytest.importorskip("kornia.filters")
    x = torch.rand(2, 3, 48, 40)
    want = filters.gaussian_blur2d(x, sizes, sigmas, border)
    assert (gaussian_blur(x, sizes, sigmas, border=border) - want).abs().max() <= 2e-6


@pytest.mark.parametrize(("sizes", "sigmas"), SETTINGS)
def test_torchvisions_pairs_are_reversed(
    sizes: tuple[int, int], sigmas: tuple[float, float]
) -> None:
    x = torch.rand(2, 3, 48, 40)
    want = torchvision_blur(x, list(sizes[::-1]), list(sigmas[::-1]))
    assert (gaussian_blur(x, list(sizes), list(sigmas)) - want).abs().max() <= 2e-6
    want = torchvision_blur(x, list(sizes[::-1]), None)
    rule = [default_sigma(size, "opencv") for size in sizes]
    assert (gaussian_blur(x, sizes, rule) - want).abs().max() <= 2e-6


def test_lists_of_one_number() -> None:
    x = torch.rand(1, 1, 20, 30)
    assert torch.equal(gaussian_blur(x, [7], [1.5]), gaussian_blur(x, 7, 1.5))
    with pytest.raises(InputError, match="kernel_size"):
        gaussian_blur(x, [])
    with pytest.raises(InputError, match="sigma"):
        gaussian_blur(x, 7, [1.0, 1.0, 1.0])
