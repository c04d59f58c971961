"""Layers, and numbers whose sums are exact, for the tests of `conv_bias_relu`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from msvq_fast.ops import conv_bias_relu
from msvq_fast.ops.conv_bias_relu.op import OP

needs_triton = pytest.mark.skipif("triton" in OP.missing, reason=OP.missing.get("triton", ""))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAST = torch.channels_last
# C, C', side, kernel, stride, padding, transposed
LAYERS = [
    (3, 8, (9, 6), 3, 2, 1, False),
    (16, 8, (5, 7), 3, 1, 1, False),
    (8, 24, (4, 3), 1, 1, 0, False),
    (8, 5, (3, 4), 4, 2, 1, True),
    (16, 3, (1, 2), 4, 2, 1, True),
]
WANTED = ("sum", "relu", "both")


def small(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Whole numbers from -2 to 2: every type here adds up their products exactly."""
    return torch.randint(-2, 3, size).to(DEVICE, dtype)


def inputs(layer, residual: bool, dtype=torch.float32, batch: int = 2) -> list[Tensor | None]:
    channels, out, (h, w), kernel, *_, transposed = layer
    x = small(batch, channels, h, w, dtype=dtype)
    shape = (channels, out) if transposed else (out, channels)
    weight, bias = small(*shape, kernel, kernel, dtype=dtype), small(out, dtype=dtype)
    rest = None
    if residual:
        size = run([x.double(), weight.double(), bias.double(), None], layer, "sum", "reference")
        rest = small(*size[0].shape, dtype=dtype).to(memory_format=LAST)
    return [x.to(memory_format=LAST), weight.to(memory_format=LAST), bias, rest]


def run(tensors, layer, want: str, backend: str):
    *_, stride, padding, transposed = layer
    steps = {"stride": stride, "padding": padding, "transposed": transposed}
    return conv_bias_relu(*tensors, **steps, want=want, backend=backend)


def leaves(tensors, dtype: torch.dtype | None = None) -> list[Tensor | None]:
    return [
        None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors
    ]
