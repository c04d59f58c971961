"""The definition of `conv_bias_relu`: PyTorch's own operations one after another."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def conv_bias_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    stride: int,
    padding: int,
    transposed: bool,
    want: str,
) -> tuple[Tensor | None, Tensor | None]:
    """The sum and its ReLU, each None unless wanted."""
    convolution = F.conv_transpose2d if transposed else F.conv2d
    total = convolution(x, weight, bias, stride, padding)
    if residual is not None:
        total = residual + total
    return (
        None if want == "relu" else total,
        None if want == "sum" else F.relu(total),
    )


def output_size(
    x: Tensor, weight: Tensor, stride: int, padding: int, transposed: bool
) -> tuple[int, int, int, int]:
    """The size ``(B, C', H', W')`` of what the convolution makes."""
    sides = [
        (n - 1) * stride - 2 * padding + k if transposed else (n + 2 * padding - k) // stride + 1
        for n, k in zip(x.shape[2:], weight.shape[2:], strict=True)
    ]
    return x.shape[0], weight.shape[1 if transposed else 0], sides[0], sides[1]
