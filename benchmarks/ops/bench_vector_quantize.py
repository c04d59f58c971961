"""Nearest code and the quantizer's training step on the CPU, beside what people use today."""

from __future__ import annotations

from collections.abc import Callable

import peers
import pytest
import torch
from device.exact import exact_codes
from parity import assert_close
from torch import Tensor

from msvq_fast.ops import ema_update_, nearest_code, vector_quantize

D = 64
SHAPES = [(65536, 256), (65536, 512), (65536, 1024), (16384, 8192)]
PEERS = {
    "faiss IndexFlatL2": peers.faiss_search,
    "torch cdist": peers.cdist_search,
    "torch addmm": peers.addmm_search,
}


def make(data: str, n: int, k: int) -> tuple[Tensor, Tensor]:
    z, codebook = torch.randn(n, D), torch.randn(k, D)
    if data == "init":
        codebook = (torch.rand(k, D) * 2 - 1) / k
    elif data == "trained":
        z = codebook[torch.randint(k, (n,))] + 0.3 * z
    return z, codebook


@pytest.mark.parametrize("name", ["native", "native NCHW", *PEERS])
@pytest.mark.parametrize(
    ("n", "k", "data"),
    [*((*shape, "normal") for shape in SHAPES), (65536, 512, "init"), (65536, 512, "trained")],
)
def test_search(measure: peers.Measure, n: int, k: int, data: str, name: str) -> None:
    z, codebook = make(data, n, k)
    if name == "native":
        function = lambda: nearest_code(z, codebook, backend="native")  # noqa: E731
    elif name == "native NCHW":
        image = z.view(16, -1, D).transpose(1, 2).contiguous()
        function = lambda: nearest_code(image, codebook, dim=1, backend="native")  # noqa: E731
    else:
        function = PEERS[name](z, codebook)
    part = 2**21 // k
    want = nearest_code(z[:part], codebook, backend="reference")
    wrong = int((function().reshape(-1)[:part] != want).sum())
    assert wrong == 0 or name in PEERS
    label = f"nearest code {n}x{k} D{D} {data}"
    measure(label, name, function, rounds=9, wrong_codes=wrong, of=part)


def training_step(
    z: Tensor, codebook: Tensor, upstream: Tensor, backend: str
) -> Callable[[], Tensor]:
    """Forward, backward and EMA update; returns the gradient of ``z``."""
    size, sums, one = torch.ones(len(codebook)), codebook.clone(), torch.ones(())

    def step() -> Tensor:
        out = vector_quantize(z, codebook, backend=backend)
        (grad,) = torch.autograd.grad([out.z_q, out.commitment_loss], z, [upstream, one])
        ema_update_(codebook, size, sums, out.code_counts, out.code_sums, backend=backend)
        return grad

    return step


@pytest.mark.parametrize(
    ("n", "k", "name"),
    [
        *((4096, 256, name) for name in ("native", "reference", "vector-quantize-pytorch")),
        *((65536, 512, name) for name in ("native", "vector-quantize-pytorch")),
    ],
)
def test_training_step(measure: peers.Measure, n: int, k: int, name: str) -> None:
    z, codebook = make("normal", n, k)
    z.requires_grad_()
    upstream, rows, before = torch.randn_like(z), z.detach().double(), codebook.double()
    codes = exact_codes(z.detach(), codebook)
    if name == "vector-quantize-pytorch":
        function = peers.vector_quantize_pytorch_step(z, codebook, upstream)
    else:
        function = training_step(z, codebook, upstream, name)
    want = upstream.double() + 0.5 / z.numel() * (rows - before[codes])
    assert_close(name, function(), want)
    if name != "vector-quantize-pytorch":
        counts = torch.bincount(codes, minlength=k)[:, None]
        sums = torch.zeros_like(before).index_add_(0, codes, rows)
        moved = (0.99 * before + 0.01 * sums) / (0.99 + 0.01 * counts)
        assert_close(name, codebook, torch.where(counts > 0, moved, before))
    measure(f"quantizer's training step {n}x{k} D{D}", name, function, rounds=9)
