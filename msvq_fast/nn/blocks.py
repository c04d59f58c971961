"""The convolution blocks of VQ-VAE 2, of which every model here is built."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """Convolution that keeps the size, or halves it with ``stride=2``.

    It starts with weights of variance ``1 / (in_channels * kernel²)`` and without biases. PyTorch's
    own start has smaller weights and random biases. With no normalisation in between, what differs
    between images then shrinks from layer to layer while the biases do not: bfloat16 rounds it
    away, and gradients fall below Adam's ε.
    """
    layer = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2)
    _start(layer)
    return layer


def _start(layer: nn.Conv2d) -> None:
    assert layer.bias is not None
    nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
    nn.init.zeros_(layer.bias)


class JoinedConv(nn.Conv2d):
    """1x1 `conv` of two maps joined, without a joined copy that its backward would keep."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)
        _start(self)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Map ``(B, C, h, w)`` and ``(B, in_channels - C, h, w)`` to ``(B, out_channels, h, w)``.

        Without ``context`` C is all of ``in_channels``.
        """
        if context is None:
            return F.conv2d(x, self.weight, self.bias)
        width = x.shape[1]
        out = F.conv2d(x, self.weight[:, :width], self.bias)
        return out + F.conv2d(context, self.weight[:, width:])


def upsample(in_channels: int, out_channels: int) -> nn.ConvTranspose2d:
    """4x4 transposed convolution of stride 2: doubles height and width.

    It starts as bilinear interpolation between randomly mixed channels, without biases, and keeps
    the variance of what is smooth. With weights drawn one by one its four phases would differ, and
    a grid that short trainings do not get rid of would lie over every image.
    """
    layer = nn.ConvTranspose2d(in_channels, out_channels, 4, 2, 1)
    assert layer.bias is not None
    mix = layer.weight.new_empty(in_channels, out_channels).normal_(std=in_channels**-0.5)
    with torch.no_grad():
        for (y, a), (x, b) in itertools.product(enumerate((1, 3, 3, 1)), repeat=2):
            layer.weight[:, :, y, x] = mix * (a * b / 16)
    nn.init.zeros_(layer.bias)
    return layer


class Residual(nn.Module):
    """``x + conv1x1(relu(conv3x3(relu(x))))`` with half the width inside.

    Args:
        width: Channels of the input and output ``(B, width, H, W)``.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = conv(width, width // 2, 3)
        self.outer = conv(width // 2, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, width, H, W)`` to the same shape."""
        h = self.outer(F.relu(self.inner(F.relu(x))))
        return x + h


def residual_stack(width: int, count: int) -> list[nn.Module]:
    """``count`` residual blocks and a last ReLU."""
    return [*(Residual(width) for _ in range(count)), nn.ReLU()]


class Chain(nn.Sequential):
    """``nn.Sequential`` that ``compile()`` takes as one graph.

    torch.compile leaves code of ``torch.nn`` alone unless other code that it compiles calls it: of
    PyTorch's own ``nn.Sequential`` it would compile only the `Residual` inside.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` through every layer."""
        for layer in self:
            x = layer(x)
        return x


class Encoder(nn.Module):
    """The encoder of VQ-VAE 2: one feature map per scale, coarsest first.

    Args:
        stages: Halvings from the image to the finest scale.
        num_scales: M; every coarser scale is one more halving.
        width: Channels of every feature map; the first stages have half of it per halving further
            from the finest scale, never fewer than ``min(16, width)``.
        num_residual_blocks: Residual blocks per scale.
    """

    def __init__(self, stages: int, num_scales: int, width: int, num_residual_blocks: int) -> None:
        super().__init__()
        finest: list[nn.Module] = []
        channels = 3
        for out in encoder_widths(stages, width):
            finest += [conv(channels, out, 3, stride=2), nn.ReLU()]
            channels = out
        scales = [Chain(*finest, *residual_stack(width, num_residual_blocks))]
        for _ in range(num_scales - 1):
            halve = conv(width, width, 3, stride=2)
            scales.append(Chain(halve, *residual_stack(width, num_residual_blocks)))
        self.scales = nn.ModuleList(scales)  # finest first, as the data flow

    def forward(
        self, x: Tensor, *, run: Callable[[nn.Module, Tensor], Tensor] | None = None
    ) -> list[Tensor]:
        """Map ``(B, 3, H, W)`` to M feature maps ``(B, width, h_m, w_m)``, coarsest first.

        ``run(part, x)`` runs the part down to the finest features in place of ``part(x)``.
        """
        finest = self.scales[0]
        features = [finest(x) if run is None else run(finest, x)]
        for scale in self.scales[1:]:
            features.append(scale(features[-1]))
        return features[::-1]


def encoder_widths(stages: int, width: int) -> list[int]:
    """Channels after each halving: ``width`` at the end, half of it per stage before."""
    return [max(width >> (stages - k), min(16, width)) for k in range(1, stages + 1)]
