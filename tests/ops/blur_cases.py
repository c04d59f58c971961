"""What the blur is compared with: a dense operator in float64, independent of the package."""

from __future__ import annotations

import functools

import torch
from parity import EPS
from torch import Tensor

from msvq_fast.ops.gaussian_blur.op import OP


def taps(kernel_size: int, sigma: float | None = None) -> list[float]:
    """Samples of the Gaussian over their sum, independent of the package."""
    sigma = sigma or (kernel_size - 3) / 6 + 0.8
    offsets = torch.arange(kernel_size, dtype=torch.float64) - kernel_size // 2
    weights = torch.exp(-offsets.square() / (2 * sigma * sigma))
    return (weights / weights.sum()).tolist()


@functools.lru_cache(maxsize=64)
def operator(size: int, weights: tuple[float, ...], border: str) -> Tensor:
    """The blur of one axis as a dense matrix, by walking every tap from its pixel."""
    radius = len(weights) // 2
    pixels, sources, values = [], [], []
    for i in range(size):
        for offset, weight in enumerate(weights, -radius):
            j = i + offset
            while not 0 <= j < size:
                if border == "constant":
                    break
                if border == "replicate":
                    j = 0 if j < 0 else size - 1
                elif border == "circular":
                    j += size if j < 0 else -size
                elif border == "symmetric":
                    j = -1 - j if j < 0 else 2 * size - 1 - j
                elif size == 1:
                    j = 0
                else:
                    j = -j if j < 0 else 2 * (size - 1) - j
            else:
                pixels.append(i)
                sources.append(j)
                values.append(weight)
    index = torch.tensor(pixels), torch.tensor(sources)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    return matrix.index_put_(index, torch.tensor(values, dtype=torch.float64), accumulate=True)


def dense_blur(
    x: Tensor, taps_y: list[float], taps_x: list[float], border: str, adjoint: bool = False
) -> Tensor:
    across, along = (
        operator(n, tuple(w), border) for n, w in zip(x.shape[-2:], (taps_y, taps_x), strict=True)
    )
    if adjoint:
        across, along = across.T, along.T
    return across @ x.double() @ along.T


def native_blur(
    x: Tensor,
    taps_y: list[float],
    taps_x: list[float],
    border: str,
    adjoint: bool,
    isa: str,
    threads: int = 1,
) -> Tensor:
    """The C++ kernel itself, on the instruction set named."""
    native = OP.kernels["native"]
    out = torch.empty_like(x)
    batch, channels, height, width = x.shape
    nchw = x.is_contiguous()
    native._C.gaussian_blur_cpu(
        x.data_ptr(),
        out.data_ptr(),
        native.IMAGE_TYPES[x.dtype],
        (batch * channels if nchw else batch, height, width, 1 if nchw else channels),
        taps_y,
        taps_x,
        native.BORDERS[border],
        adjoint,
        threads,
        isa,
    )
    return out


def assert_blur_close(got: Tensor, want: Tensor, x: Tensor, ulps: float = 4) -> None:
    """The taps are positive and sum to 1, so rounding errors are relative to max |x|."""
    assert got.dtype == x.dtype
    limit = ulps * EPS[torch.float32] * x.double().abs().max()
    if x.dtype in (torch.bfloat16, torch.float16):
        limit = limit + EPS[x.dtype] / 2 * want.abs()
    error = (got.double() - want).abs() - limit
    assert bool((error <= 0).all()), f"{error.max():.3e} over the limit"
