"""LPIPS (Zhang et al. 2018): distance of two images in the features of a classifier."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msvq_fast.metrics.image import check_pair
from msvq_fast.metrics.weights import Judge, fill, read_weights
from msvq_fast.ops import InputError
from msvq_fast.ops.checks import check_choice

NETWORKS = ("alex", "vgg", "squeeze")
_HOLDS = (
    "torchvision's features of alexnet, vgg16 or squeezenet1_1 (features.0.weight, ...) and the "
    "linear heads of the lpips package for it (lin0.model.1.weight, ...), in one file or in the "
    "files of a folder"
)
_EPS = 1e-10
_LEAST_SIDE = {"alex": 31, "vgg": 16, "squeeze": 17}  # pixels that leave one for every layer
# The statistics of ImageNet as LPIPS applies them to images in [-1, 1].
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class LPIPS(Judge):
    """``Σ_l mean_xy w_l · (a_l / |a_l| - b_l / |b_l|)²`` over layers l; 0 for equal images.

    Args:
        net: ``alex`` (the usual one for reporting), ``vgg`` or ``squeeze``.

    Attributes:
        net: As given.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, net: str = "alex") -> None:
        super().__init__()
        check_choice("net", net, NETWORKS)
        self.net = net
        layers, self.taps, channels = _BUILDERS[net]()
        self.features = nn.Sequential(*layers)
        self.heads = nn.ParameterList(nn.Parameter(torch.rand(c)) for c in channels)  # (C_l,)
        self.register_buffer("shift", torch.tensor(_SHIFT).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE).view(3, 1, 1), persistent=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance of each pair of images.

        Args:
            x: ``(B, 3, H, W)`` float images in [-1, 1], H and W at least 31 (``alex``), 16
                (``vgg``) or 17 (``squeeze``).
            y: Images of the same shape and device.

        Returns:
            ``(B,)`` float64, at least 0 with the published heads. Differentiable.

        Raises:
            InputError: If an input is not a float RGB batch or too small, or shapes or devices
                differ.

        Numerics:
            Convolutions run in the weights' dtype; features are normalised, compared and summed
            in float64.
        """
        check_pair(x, y)
        if x.shape[1] != 3:
            raise InputError(f"x has {x.shape[1]} channels; expected 3 (RGB)")
        if min(x.shape[-2:]) < _LEAST_SIDE[self.net]:
            raise InputError(
                f"x has images of {x.shape[-2]}x{x.shape[-1]} pixels; LPIPS of {self.net} needs "
                f"at least {_LEAST_SIDE[self.net]} a side"
            )
        total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for a, b, head in zip(self._taps(x), self._taps(y), self.heads, strict=True):
            difference = (_unit(a) - _unit(b)).square()  # (B, C, h, w)
            weighted = difference.mean(dim=(2, 3)) @ head.double()
            total = total + weighted
        return total

    def _taps(self, x: Tensor) -> list[Tensor]:
        x = (x.to(self.shift.dtype) - self.shift) / self.scale
        found = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.taps:
                found.append(x)
        return found


def load_lpips(weights: str | Path) -> LPIPS:
    """LPIPS with trained weights; which network it is shows in the file.

    Args:
        weights: A file with the backbone's features and the heads, such as a saved
            ``lpips.LPIPS(...).state_dict()``, or a folder that holds them in separate files.

    Raises:
        InputError: If a file is missing or holds something else; the message says what it must.
    """
    found = _canonical(read_weights(weights, argument="lpips_weights", holds=_HOLDS))
    source = f"lpips_weights={str(weights)!r}"
    if "features.0.weight" not in found:
        raise InputError(f"{source} has no backbone; expected {_HOLDS}")
    if "heads.0" not in found:
        raise InputError(f"{source} has no linear heads; expected {_HOLDS}")
    if found["features.0.weight"].shape[-1] == 11:
        net = "alex"
    else:
        net = "squeeze" if "features.3.squeeze.weight" in found else "vgg"
    return fill(LPIPS(net), found, weights, argument="lpips_weights", holds=_HOLDS)


def _unit(x: Tensor) -> Tensor:
    x = x.double()
    return x / (x.square().sum(dim=1, keepdim=True).sqrt() + _EPS)


def _canonical(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of torchvision and of the lpips package, which keeps the layers' numbers, as ours."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if layer := re.fullmatch(r"(?:net\.)?(?:features|slice\d+)\.(\d+\..+)", name):
            found[f"features.{layer[1]}"] = tensor
        elif head := re.fullmatch(r"lin(\d+)\.model\.1\.weight", name):
            found[f"heads.{head[1]}"] = tensor.flatten()
    return found


class _Fire(nn.Module):
    """SqueezeNet's block: a narrow 1x1 convolution, then 1x1 and 3x3 side by side."""

    def __init__(self, channels: int, narrow: int, wide: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, narrow, 1)
        self.expand1x1 = nn.Conv2d(narrow, wide, 1)
        self.expand3x3 = nn.Conv2d(narrow, wide, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, 2 wide, H, W)``."""
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))], dim=1)


_Layers = tuple[list[nn.Module], tuple[int, ...], tuple[int, ...]]  # layers, taps, their channels


def _alex() -> _Layers:
    layers = [
        nn.Conv2d(3, 64, 11, 4, 2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
    ]
    return layers, (1, 4, 7, 9, 11), (64, 192, 384, 256, 256)


def _vgg() -> _Layers:
    layers: list[nn.Module] = []
    taps, channels, before = [], (64, 128, 256, 512, 512), 3
    for stage, width in enumerate(channels):
        layers += [nn.MaxPool2d(2, 2)] if stage else []
        for _ in range(2 if stage < 2 else 3):
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
            before = width
        taps.append(len(layers) - 1)
    return layers, tuple(taps), channels


def _squeeze() -> _Layers:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 2), nn.ReLU()]
    fires = {3: (64, 16, 64), 4: (128, 16, 64), 6: (128, 32, 128), 7: (256, 32, 128)}
    fires |= {9: (256, 48, 192), 10: (384, 48, 192), 11: (384, 64, 256), 12: (512, 64, 256)}
    for index in range(2, 13):
        pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        layers.append(_Fire(*fires[index]) if index in fires else pool)
    return layers, (1, 4, 7, 9, 10, 11, 12), (64, 128, 256, 384, 384, 512, 512)


_BUILDERS = {"alex": _alex, "vgg": _vgg, "squeeze": _squeeze}
