from __future__ import annotations

import torch
from torch.nn import functional as F

from msvq_fast.nn.blocks import conv, upsample


def test_upsampling_starts_as_bilinear_interpolation_of_mixed_channels() -> None:
    x = torch.randn(2, 5, 6, 7)
    layer = upsample(5, 3)
    out = layer(x)
    mix = layer.weight.sum((2, 3)) / 4  # every phase of an output takes a quarter of the taps' sum
    mixed = torch.einsum("bihw,io->bohw", x, mix)
    want = F.interpolate(mixed, scale_factor=2, mode="bilinear")
    # Outside the image it takes zeros, where interpolation repeats the border.
    inner = (..., slice(1, -1), slice(1, -1))
    torch.testing.assert_close(out[inner], want[inner], rtol=1e-5, atol=1e-5)


def test_layers_start_with_the_variance_of_their_input() -> None:
    x = torch.randn(1, 256, 8, 8)
    for layer, image in (
        (conv(256, 512, 3), x),
        (conv(256, 512, 4, 2), x),
        (conv(256, 512, 1), x),
        (upsample(256, 512), x[:, :, :1, :1].expand(x.shape)),  # what is smooth keeps it
    ):
        assert layer.bias.count_nonzero() == 0
        assert 0.9 < layer(image)[:, :, 2:-2, 2:-2].std() < 1.1
