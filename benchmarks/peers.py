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
Attention = Callable[[], Tensor]
Search = Callable[[], Tensor]


def torch_separable_blur(x: Tensor, size: int, sigma: float) -> Blur:
    """Two depthwise convolutions over reflect padding: what kornia runs on a GPU."""
    taps, channels = _taps(x, size, sigma), x.shape[1]
    rows = taps.view(1, 1, 1, size).expand(channels, 1, 1, size)
    columns = taps.view(1, 1, size, 1).expand(channels, 1, size, 1)

    def blur() -> Tensor:
        h = F.conv2d(F.pad(x, [size // 2, size // 2, 0, 0], mode="reflect"), rows, groups=channels)
        h = F.pad(h, [0, 0, size // 2, size // 2], mode="reflect")
        return F.conv2d(h, columns, groups=channels)

    return blur


def torch_dense_blur(x: Tensor, size: int, sigma: float) -> Blur:
    """One depthwise convolution with size² taps: what torchvision runs."""
    taps, channels = _taps(x, size, sigma), x.shape[1]
    kernel = torch.outer(taps, taps).expand(channels, 1, size, size)
    return lambda: F.conv2d(F.pad(x, [size // 2] * 4, mode="reflect"), kernel, groups=channels)


def kornia_blur(x: Tensor, size: int, sigma: float) -> Blur:
    filters = pytest.importorskip("kornia.filters")
    return lambda: filters.gaussian_blur2d(x, (size, size), (sigma, sigma), "reflect")


def opencv_blur(x: Tensor, size: int, sigma: float) -> Blur:
    """OpenCV on one image of HWC layout, float32 or uint8, with as many threads as torch."""
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


def expanded_search(z: Tensor, codebook: Tensor, *, autocast: bool = False) -> Search:
    """``|z|² - 2 z.e + |e|²``: what most VQ-VAE code runs, in training often under autocast."""

    def search() -> Tensor:
        squares = z.square().sum(1, keepdim=True) + codebook.square().sum(1)
        with torch.autocast(z.device.type, torch.bfloat16, enabled=autocast):
            products = z @ codebook.t()
        return (squares - 2 * products).argmin(1)

    return search


def tf32_search(z: Tensor, codebook: Tensor) -> Search:
    """`expanded_search` on a GPU with TF32: factors of 11 significant bits, sums in float32."""

    def rounded(x: Tensor) -> Tensor:
        bits = x.view(torch.int32)
        return (bits + 0xFFF + (bits >> 13 & 1) & ~0x1FFF).view(torch.float32)

    def search() -> Tensor:
        squares = z.square().sum(1, keepdim=True) + codebook.square().sum(1)
        return (squares - 2 * (rounded(z) @ rounded(codebook).t())).argmin(1)

    return search


def vector_quantize_pytorch_search(z: Tensor, codebook: Tensor) -> Search:
    package = pytest.importorskip("vector_quantize_pytorch")
    size, width = codebook.shape
    quantizer = package.VectorQuantize(dim=width, codebook_size=size).to(z.device).eval()
    quantizer.codebook = codebook
    return lambda: quantizer(z[None])[1][0]


def flash_kmeans_search(z: Tensor, codebook: Tensor) -> Search:
    """Its assignment kernel; codes are in the latents' dtype, as it requires."""
    package = pytest.importorskip("flash_kmeans.assign_euclid_triton")
    rows, codes = z[None], codebook.to(z.dtype)[None]
    squares = rows.float().square().sum(-1)
    return lambda: package.euclid_assign_triton(rows, codes, squares)[0]


def vector_quantize_pytorch_step(
    z: Tensor, codebook: Tensor, upstream: Tensor
) -> Callable[[], Tensor]:
    """Forward, backward and EMA update of ``z (N, D)``; returns its gradient.

    Its default gradient, the rotation trick, is more work than the straight-through one of ours.
    """
    package = pytest.importorskip("vector_quantize_pytorch")
    size, width = codebook.shape
    quantizer = package.VectorQuantize(
        dim=width, codebook_size=size, decay=0.99, commitment_weight=0.25, rotation_trick=False
    ).to(z.device)
    quantizer.codebook = codebook
    one = z.new_ones((), dtype=torch.float32)

    def step() -> Tensor:
        z_q, _, loss = quantizer(z[None])
        (grad,) = torch.autograd.grad([z_q[0], loss.sum()], z, [upstream, one])
        return grad

    return step


def sdpa_masked_attention(
    q: Tensor, keys: list[Tensor], values: list[Tensor], grids: list[tuple[int, int]], kernels: list
) -> Callable[[], Tensor]:
    """Dense attention of torch over all scales under a mask, which is not timed.

    It is added to the scores, in their dtype: torch makes one of a boolean mask in every call.
    """
    masks = []
    for n in range(len(grids)):
        index, inside = _window_index(grids, kernels, n)
        mask = torch.zeros(q.shape[2], keys[n].shape[2], dtype=torch.bool)
        rows = torch.arange(q.shape[2])[:, None].expand_as(index)
        mask[rows[inside], index[inside]] = True
        masks.append(mask)
    seen = torch.cat(masks, dim=1).to(q.device)
    mask = torch.zeros_like(seen, dtype=q.dtype).masked_fill_(~seen, -torch.inf)

    def attend() -> Tensor:
        key, value = torch.cat(keys, dim=2), torch.cat(values, dim=2)
        return F.scaled_dot_product_attention(q, key, value, attn_mask=mask)

    return attend


def gathered_attention(
    q: Tensor, keys: list[Tensor], values: list[Tensor], grids: list[tuple[int, int]], kernels: list
) -> Callable[[], Tensor]:
    """The windows gathered by an index into ``(N, k²)`` copies of keys and values (unfold)."""
    windows = [_window_index(grids, kernels, n) for n in range(len(grids))]
    windows = [(index.to(q.device), inside.to(q.device)) for index, inside in windows]
    inside = torch.cat([w for _, w in windows], dim=1)

    def attend() -> Tensor:
        near = torch.cat([k[:, :, i] for k, (i, _) in zip(keys, windows, strict=True)], dim=3)
        scores = (near @ q[..., None])[..., 0] * q.shape[-1] ** -0.5  # (B, heads, N, pairs)
        weights = scores.masked_fill(~inside, -torch.inf).softmax(-1)
        near = torch.cat([v[:, :, i] for v, (i, _) in zip(values, windows, strict=True)], dim=3)
        return (weights[..., None, :] @ near)[..., 0, :]

    return attend


def flex_attention(
    q: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    grids: list[tuple[int, int]],
    kernels: list,
    block: int = 128,
) -> Attention:
    """FlexAttention, compiled, over two scales with a block mask, which is not timed."""
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    if q.requires_grad and q.device.type == "cpu":
        pytest.skip("FlexAttention has no backward on the CPU")
    (h, w), (height, width) = grids
    coarse, (kernel, own_kernel) = h * w, kernels

    def near(y: Tensor, x: Tensor, cell_y: Tensor, cell_x: Tensor, size: int) -> Tensor:
        return ((y - cell_y).abs() <= size // 2) & ((x - cell_x).abs() <= size // 2)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        y, x, own = query // width, query % width, key - coarse
        above = near(y * h // height, x * w // width, key // w, key % w, kernel) & (own < 0)
        beside = near(y, x, own // width, own % width, own_kernel) & (own >= 0) & (own != query)
        return above | beside

    tokens = height * width
    mask = flex.create_block_mask(
        visible, None, None, tokens, coarse + tokens, device=q.device.type, BLOCK_SIZE=block
    )
    torch.compiler.reset()  # past some shapes in one process it would run uncompiled
    attend = torch.compile(flex.flex_attention, dynamic=False)
    return lambda: attend(q, torch.cat(keys, dim=2), torch.cat(values, dim=2), block_mask=mask)


def _window_index(grids: list[tuple[int, int]], kernels: list, n: int) -> tuple[Tensor, Tensor]:
    """Keys ``(N, k²)`` of every query on scale n and whether each exists; the own is left out."""
    (height, width), (h, w), kernel = grids[-1], grids[n], kernels[n]
    offset = torch.arange(kernel) - kernel // 2
    rows = (torch.arange(height) * h // height)[:, None] + offset  # integer ratios
    columns = (torch.arange(width) * w // width)[:, None] + offset
    y, x = rows[:, None, :, None], columns[None, :, None, :]
    inside = ((y >= 0) & (y < h) & (x >= 0) & (x < w)).reshape(height * width, -1)
    index = (y.clamp(0, h - 1) * w + x.clamp(0, w - 1)).reshape(height * width, -1)
    if n == len(grids) - 1:
        inside = inside & (index != torch.arange(height * width)[:, None])
    return index, inside


def _taps(x: Tensor, size: int, sigma: float) -> Tensor:
    j = torch.arange(size, dtype=torch.float64) - size // 2
    taps = torch.exp(-0.5 * (j / sigma) ** 2)
    return (taps / taps.sum()).to(x)
