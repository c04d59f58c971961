"""Every rival once, as a function of the same arguments; one that is not installed is skipped."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

Measure = Callable[..., None]  # the fixture of benchmarks/conftest.py
Blur = Callable[[], Tensor]
Search = Callable[[], Tensor]


def torch_separable_blur(x: Tensor, size: int, sigma: float) -> Blur:
    """Two depthwise convolutions over reflect padding: what kornia runs."""
    taps, channels = _taps(size, sigma), x.shape[1]
    rows = taps.view(1, 1, 1, size).expand(channels, 1, 1, size)
    columns = taps.view(1, 1, size, 1).expand(channels, 1, size, 1)

    def blur() -> Tensor:
        h = F.conv2d(F.pad(x, [size // 2, size // 2, 0, 0], mode="reflect"), rows, groups=channels)
        h = F.pad(h, [0, 0, size // 2, size // 2], mode="reflect")
        return F.conv2d(h, columns, groups=channels)

    return blur


def torch_dense_blur(x: Tensor, size: int, sigma: float) -> Blur:
    """One depthwise convolution with size² taps: what torchvision runs."""
    taps, channels = _taps(size, sigma), x.shape[1]
    kernel = torch.outer(taps, taps).expand(channels, 1, size, size)
    return lambda: F.conv2d(F.pad(x, [size // 2] * 4, mode="reflect"), kernel, groups=channels)


def kornia_blur(x: Tensor, size: int, sigma: float) -> Blur:
    filters = pytest.importorskip("kornia.filters")
    return lambda: filters.gaussian_blur2d(x, (size, size), (sigma, sigma), "reflect")


def opencv_blur(x: Tensor, size: int, sigma: float) -> Blur:
    """OpenCV on one float32 image of HWC layout, with as many threads as torch."""
    cv2 = pytest.importorskip("cv2")
    cv2.setNumThreads(torch.get_num_threads())
    image = np.ascontiguousarray(x.squeeze(0).permute(1, 2, 0).numpy())

    def blur() -> Tensor:
        out = cv2.GaussianBlur(image, (size, size), sigma, borderType=cv2.BORDER_REFLECT_101)
        return torch.from_numpy(out).permute(2, 0, 1)[None]  # a view: no copy is timed

    return blur


def faiss_search(z: Tensor, codebook: Tensor) -> Search:
    faiss = pytest.importorskip("faiss")
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(codebook.shape[1])
    index.add(codebook.numpy())
    rows = z.numpy()
    return lambda: torch.from_numpy(index.search(rows, 1)[1][:, 0])


def cdist_search(z: Tensor, codebook: Tensor) -> Search:
    return lambda: torch.cdist(z, codebook).argmin(1)


def addmm_search(z: Tensor, codebook: Tensor) -> Search:
    """One matrix product per 4096 latents, without the term of the latent alone."""

    def search() -> Tensor:
        half, columns = codebook.square().sum(1) / 2, codebook.t().contiguous()
        scores = (torch.addmm(half, part, columns, alpha=-1) for part in z.split(4096))
        return torch.cat([score.argmin(1) for score in scores])

    return search


def vector_quantize_pytorch_step(z: Tensor, codebook: Tensor) -> Callable[[], None]:
    """Forward, backward and EMA update of ``z (N, D)``, which requires a gradient."""
    package = pytest.importorskip("vector_quantize_pytorch")
    size, width = codebook.shape
    quantizer = package.VectorQuantize(
        dim=width, codebook_size=size, decay=0.99, commitment_weight=0.25
    )
    upstream = torch.randn_like(z)

    def step() -> None:
        z.grad = None
        z_q, _, loss = quantizer(z[None])
        torch.autograd.backward([z_q[0], loss.sum()], [upstream, torch.ones(())])

    return step


def _taps(size: int, sigma: float) -> Tensor:
    j = torch.arange(size, dtype=torch.float64) - size // 2
    taps = torch.exp(-0.5 * (j / sigma) ** 2)
    return (taps / taps.sum()).float()
