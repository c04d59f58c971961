"""Networks whose features compare sets of images: what every one of them gives."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from msvq_fast.metrics.weights import Judge
from msvq_fast.ops import InputError


class FeatureExtractor(Judge, ABC):
    """A frozen classifier that turns 8-bit images into features and class scores.

    Attributes:
        name: Its name in result files.
        suffix: What follows FD, KID and IS in their names; only the FID Inception's FD is a FID.
        dim: D, width of the features.
    """

    name: str
    suffix: str
    dim: int

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``(B, D)`` and class scores ``(B, C)``, float32, of uint8 ``(B, 3, H, W)``.

        Raises:
            InputError: For anything else than 8-bit RGB.
        """
        if images.dim() != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
            raise InputError(
                f"images has shape {tuple(images.shape)} and dtype {images.dtype}; "
                "expected uint8 (B, 3, H, W)"
            )
        return self._extract(images.float())

    @abstractmethod
    def _extract(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The same for float32 pixels in 0..255."""
