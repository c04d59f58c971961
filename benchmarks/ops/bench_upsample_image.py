"""The last layer of a decoder on the CPU, where it is PyTorch's convolution: what the op adds."""

from __future__ import annotations

from collections.abc import Callable

import peers
import pytest
import torch
import torch.nn.functional as F
from parity import assert_close

from msvq_fast.ops import upsample_image

NAMES: dict[str, Callable[..., torch.Tensor]] = {
    "reference": lambda *inputs: upsample_image(*inputs, backend="reference"),
    "torch eager": lambda *inputs: F.conv_transpose2d(*inputs, stride=2, padding=1),
}


@pytest.mark.parametrize("name", NAMES)
def test_last_layer(measure: peers.Measure, name: str) -> None:
    x = torch.randn(1, 64, 256, 256).to(memory_format=torch.channels_last)
    inputs = [x, torch.randn(64, 3, 4, 4) / 32, torch.randn(3)]
    function = lambda: NAMES[name](*inputs)  # noqa: E731
    want = upsample_image(*(t.double() for t in inputs))
    assert_close(name, function(), want, ulps=64)
    measure("last layer 64x256x256 to 3x512x512 float32", name, function)
