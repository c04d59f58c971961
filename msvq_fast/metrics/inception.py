"""The FID Inception: Inception-v3 as ported from TensorFlow in 2015, with its own pooling.

Definition: Szegedy et al. 2016 with the three departures that FID code shares: average pooling
does not count the border, the last block pools by maximum, and images are resized as TensorFlow 1
did. Names of parameters are those of pt_inception-2015-12-05-6726825d.pth.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msvq_fast.metrics.extractors import FeatureExtractor
from msvq_fast.metrics.weights import fill, read_weights

_HOLDS = (
    "the FID Inception that pytorch-fid and torch-fidelity publish, "
    "pt_inception-2015-12-05-6726825d.pth or weights-inception-2015-12-05-6726825d.pth"
)
_SIDE = 299
_CLASSES = 1008
_Step = tuple[str, int, int | tuple[int, int], int, bool]  # name, channels, kernel, stride, padded
_ROW, _COLUMN = (1, 7), (7, 1)


class FIDInception(FeatureExtractor):
    """2048 pooled features, and class scores without the classifier's bias, as IS uses them."""

    name, suffix, dim = "Inception-v3 (FID, 2015-12-05)", "", 2048

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, 2, padded=False)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3, padded=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _a(192, 32), _a(256, 64), _a(288, 64)
        self.Mixed_6a = _b()
        self.Mixed_6b, self.Mixed_6c = _c(128), _c(160)
        self.Mixed_6d, self.Mixed_6e = _c(160), _c(192)
        self.Mixed_7a = _d()
        self.Mixed_7b, self.Mixed_7c = _e(1280, "average"), _e(2048, "maximum")
        self.fc = nn.Linear(self.dim, _CLASSES)

    def _extract(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        x = (_resize_as_tensorflow_1(pixels, _SIDE) - 128) / 128
        for name, child in self.named_children():
            if name == "fc":
                break
            x = child(x)
            if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                x = F.max_pool2d(x, 3, 2)
        features = x.mean(dim=(2, 3))  # (B, 2048)
        return features, features @ self.fc.weight.T


class _Conv(nn.Module):
    """Convolution without bias, batch normalisation, ReLU."""

    def __init__(
        self,
        channels: int,
        out: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        *,
        padded: bool = True,
    ) -> None:
        super().__init__()
        rows, columns = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (rows // 2, columns // 2) if padded else (0, 0)
        self.conv = nn.Conv2d(channels, out, (rows, columns), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, out, H', W')``."""
        return F.relu(self.bn(self.conv(x)))


class _Mixed(nn.Module):
    """Branches of convolutions side by side, and one that pools.

    Args:
        channels: Of the input.
        branches: Per branch its steps in a row. A last pair of steps named ...a and ...b both
            see what comes before them and are concatenated.
        pool: ``average`` or ``maximum`` at stride 1, or ``shrink``, the maximum at stride 2.
        pool_channels: Of the 1x1 convolution behind the pooling, 0 for none.
    """

    def __init__(
        self, channels: int, branches: Sequence[Sequence[_Step]], pool: str, pool_channels: int = 0
    ) -> None:
        super().__init__()
        self.branches = [[step[0] for step in steps] for steps in branches]
        self.pool = pool
        for steps in branches:
            width = channels
            for name, out, kernel, stride, padded in steps:
                setattr(self, name, _Conv(width, out, kernel, stride, padded=padded))
                width = width if name.endswith("a") else out
        self.branch_pool = _Conv(channels, pool_channels, 1) if pool_channels else None

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the branches' channels, one after the other, the pool's last."""
        parts: list[Tensor] = []
        for names in self.branches:
            y = x
            for name in names:
                z = getattr(self, name)(y)
                if name[-1] in "ab":
                    parts.append(z)
                else:
                    y = z
            if names[-1][-1] != "b":
                parts.append(y)
        pooled = self._pooled(x)
        parts.append(self.branch_pool(pooled) if self.branch_pool is not None else pooled)
        return torch.cat(parts, dim=1)

    def _pooled(self, x: Tensor) -> Tensor:
        if self.pool == "average":
            return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        if self.pool == "maximum":
            return F.max_pool2d(x, 3, 1, 1)
        return F.max_pool2d(x, 3, 2)


def load_inception(weights: str | Path) -> FIDInception:
    """The network with the published weights.

    Args:
        weights: The file.

    Raises:
        InputError: If it is missing or holds something else; the message names what it must hold.
    """
    tensors = read_weights(weights, argument="inception_weights", holds=_HOLDS)
    return fill(FIDInception(), tensors, weights, argument="inception_weights", holds=_HOLDS)


def _step(
    name: str, out: int, kernel: int | tuple[int, int], stride: int = 1, padded: bool = True
) -> _Step:
    return name, out, kernel, stride, padded


def _a(channels: int, pool_channels: int) -> _Mixed:
    branches = [
        [_step("branch1x1", 64, 1)],
        [_step("branch5x5_1", 48, 1), _step("branch5x5_2", 64, 5)],
        [
            _step("branch3x3dbl_1", 64, 1),
            _step("branch3x3dbl_2", 96, 3),
            _step("branch3x3dbl_3", 96, 3),
        ],
    ]
    return _Mixed(channels, branches, "average", pool_channels)


def _b() -> _Mixed:
    branches = [
        [_step("branch3x3", 384, 3, 2, False)],
        [
            _step("branch3x3dbl_1", 64, 1),
            _step("branch3x3dbl_2", 96, 3),
            _step("branch3x3dbl_3", 96, 3, 2, False),
        ],
    ]
    return _Mixed(288, branches, "shrink")


def _c(width: int) -> _Mixed:
    branches = [
        [_step("branch1x1", 192, 1)],
        [
            _step("branch7x7_1", width, 1),
            _step("branch7x7_2", width, _ROW),
            _step("branch7x7_3", 192, _COLUMN),
        ],
        [
            _step("branch7x7dbl_1", width, 1),
            _step("branch7x7dbl_2", width, _COLUMN),
            _step("branch7x7dbl_3", width, _ROW),
            _step("branch7x7dbl_4", width, _COLUMN),
            _step("branch7x7dbl_5", 192, _ROW),
        ],
    ]
    return _Mixed(768, branches, "average", 192)


def _d() -> _Mixed:
    branches = [
        [_step("branch3x3_1", 192, 1), _step("branch3x3_2", 320, 3, 2, False)],
        [
            _step("branch7x7x3_1", 192, 1),
            _step("branch7x7x3_2", 192, _ROW),
            _step("branch7x7x3_3", 192, _COLUMN),
            _step("branch7x7x3_4", 192, 3, 2, False),
        ],
    ]
    return _Mixed(768, branches, "shrink")


def _e(channels: int, pool: str) -> _Mixed:
    branches = [
        [_step("branch1x1", 320, 1)],
        [
            _step("branch3x3_1", 384, 1),
            _step("branch3x3_2a", 384, (1, 3)),
            _step("branch3x3_2b", 384, (3, 1)),
        ],
        [
            _step("branch3x3dbl_1", 448, 1),
            _step("branch3x3dbl_2", 384, 3),
            _step("branch3x3dbl_3a", 384, (1, 3)),
            _step("branch3x3dbl_3b", 384, (3, 1)),
        ],
    ]
    return _Mixed(channels, branches, pool, 192)


def _resize_as_tensorflow_1(x: Tensor, side: int) -> Tensor:
    """Bilinear ``(B, C, H, W)`` to ``(B, C, side, side)``; output i reads input i H / side."""
    for dim in (2, 3):
        size = x.shape[dim]
        place = torch.arange(side, device=x.device, dtype=torch.float32) * (size / side)
        low = place.long().clamp_max(size - 1)
        share = (place - low).view(-1, 1) if dim == 2 else place - low
        before, after = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp_max(size - 1))
        x = before + (after - before) * share
    return x
