"""The linear layer of the transformers."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msvq_fast.ops.checks import is_watched

LEAST_ROWS = 128  # fewer are no quicker as a convolution
_LEAST_PRODUCTS = 2**22  # of two numbers: fewer take less time than a convolution to begin
_IMAGES = 16  # fewer go to MKL where PyTorch has one thread


class Linear(nn.Linear):
    """``nn.Linear`` that takes half the time in float32 on AMD's processors with AVX-512.

    PyTorch's matrix products are MKL's, which does not use AVX-512 there; its convolutions are
    oneDNN's, which does. Many rows of float32 run as a 1x1 convolution on such a processor, without
    a copy; everything else, small layers too, is ``F.linear``. The two differ in last bits;
    parameters and gradients are those of ``nn.Linear``.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in_features)`` to ``(..., out_features)``."""
        if not _is_better_convolved(x, self.weight):
            return F.linear(x, self.weight, self.bias)
        lines = x.reshape(_IMAGES, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)  # (16, C, 1, N / 16)
        out = F.conv2d(lines, self.weight[:, :, None, None], self.bias)
        return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], self.out_features)


def _is_better_convolved(x: Tensor, weight: Tensor) -> bool:
    # What quantizes or shards weights gives them a class of its own, which may know no other.
    plain = type(weight) in (Tensor, nn.Parameter) and weight.dtype == torch.float32
    if not plain or x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    rows = x.numel() // max(x.shape[-1], 1)
    many = rows >= LEAST_ROWS and x.numel() * weight.shape[0] >= _LEAST_PRODUCTS
    if not many or rows % _IMAGES or torch.is_autocast_enabled("cpu") or is_watched():
        return False
    return _mkl_lacks_avx512()


@functools.lru_cache(maxsize=1)
def _mkl_lacks_avx512() -> bool:
    """Whether PyTorch's MKL leaves this processor's AVX-512 unused and its oneDNN does not."""
    backends = torch.backends
    if not (backends.mkl.is_available() and backends.mkldnn.is_available()):
        return False
    try:
        amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False
    return amd and backends.cpu.get_cpu_capability() == "AVX512"
