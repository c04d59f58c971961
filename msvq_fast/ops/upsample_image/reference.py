"""The definition of the last layer of a decoder: PyTorch's transposed convolution."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def upsample_image(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``out[2i + ky - 1, 2j + kx - 1, o] = bias[o] + Σ x[i, j, c] weight[c, o, ky, kx]``."""
    return F.conv_transpose2d(x, weight, bias, stride=2, padding=1)
