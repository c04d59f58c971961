from __future__ import annotations

import pytest
import torch

from msvq_fast.nn.discriminator import PatchDiscriminator, adaptive_weight, hinge_loss
from msvq_fast.ops import InputError


@pytest.mark.parametrize(("size", "grid"), [(8, 2), (16, 6), (32, 6), (64, 6), (256, 30)])
def test_it_judges_patches(size: int, grid: int) -> None:
    judge = PatchDiscriminator(size, width=16)
    assert judge(torch.zeros(2, 3, size, size)).shape == (2, 1, grid, grid)


def test_it_is_that_of_vqgan_but_for_the_normalisation() -> None:
    # 3x64, 64x128, 128x256, 256x512 and 512x1 kernels of 16 taps, biases of the first and last.
    weights = 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512)
    norms = 2 * (128 + 256 + 512)
    judge = PatchDiscriminator(256)
    assert sum(p.numel() for p in judge.parameters()) == weights + 64 + 1 + norms
    kernels = [p for p in judge.parameters() if p.dim() == 4]
    assert [float(p.detach().std()) for p in kernels] == pytest.approx([0.02] * 5, rel=0.1)


def test_a_verdict_depends_on_no_other_image() -> None:
    judge = PatchDiscriminator(32, width=16)
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(judge(x)[1:2], judge(x[1:2]))


def test_hinge_loss() -> None:
    real, fake = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([-3.0, 0.0, 2.0])
    assert float(hinge_loss(real, fake)) == pytest.approx(((0 + 1 + 2) / 3 + (0 + 1 + 3) / 3) / 2)


def test_adaptive_weight_is_the_ratio_of_norms() -> None:
    a = torch.tensor([3.0, 4.0], requires_grad=True)
    weight = adaptive_weight(2 * a, torch.tensor([0.0, 0.5]))
    assert float(weight) == pytest.approx(10 / (0.5 + 1e-4)) and not weight.requires_grad
    assert float(adaptive_weight(torch.full((9,), 1e9), torch.zeros(9))) == pytest.approx(1e4)
    assert float(adaptive_weight(torch.zeros(9), torch.zeros(9))) == 0


@pytest.mark.parametrize(("size", "width"), [(7, 64), (64, 8), (64, 40)])
def test_sizes_that_cannot_work(size: int, width: int) -> None:
    with pytest.raises(InputError, match="size=7" if size == 7 else f"width={width}"):
        PatchDiscriminator(size, width=width)
