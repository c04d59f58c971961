from __future__ import annotations

import math

import pytest
import torch

from msvq_fast.metrics import radial_power
from msvq_fast.ops import InputError


def wave(cycles, size=64):
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    angle = 2 * math.pi * (cycles[0] * y + cycles[1] * x) / size
    return torch.sin(angle).expand(1, 3, size, size)


@pytest.mark.parametrize(
    ("cycles", "ring"), [((0, 9), 9), ((12, 0), 12), ((6, 8), 10), ((7, 7), 10)]
)
def test_a_wave_is_in_its_ring(cycles, ring):
    power = radial_power(wave(cycles))
    assert power.shape == (1, 32) and power.dtype == torch.float64
    assert int(power[0].argmax()) + 1 == ring
    # The window spreads a wave to its neighbours in frequency, and no further.
    far = torch.cat([power[0, : ring - 4], power[0, ring + 3 :]])
    assert far.max() < 1e-3 * power.max()


def test_every_image_and_side_is_its_own():
    x = torch.cat([wave((0, 3)), wave((0, 20))])
    assert radial_power(x).argmax(dim=1).tolist() == [2, 19]
    wide = torch.cat([wave((0, 5), 32), wave((0, 5), 32)], dim=3)  # 32 x 64
    assert radial_power(wide).shape == (1, 16)
    assert int(radial_power(wide)[0].argmax()) + 1 == 5


def test_white_noise_is_flat_and_a_constant_is_nothing():
    power = radial_power(torch.randn(64, 3, 64, 64)).mean(dim=0)
    assert power[3:].max() / power[3:].min() < 1.3
    colour = torch.tensor([0.7, -0.2, 0.0]).view(1, 3, 1, 1).expand(1, 3, 16, 16)
    assert radial_power(colour).abs().max() < 1e-25


def test_bad_images_are_named():
    with pytest.raises(InputError, match="images has shape"):
        radial_power(torch.zeros(3, 8, 8))
