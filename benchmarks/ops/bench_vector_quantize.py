"""Nearest codes and the whole training step of a quantizer, beside what people use today."""

from __future__ import annotations

import peers
import pytest
import torch

from msvq_fast.nn import VectorQuantizer
from msvq_fast.ops import nearest_code

# N: one 256² batch of 16 images at stride 4 and more; K of the paper's tables, and a large one
SHAPES = [(65536, 256), (65536, 512), (65536, 1024), (16384, 8192)]
PEERS = {
    "faiss IndexFlatL2": peers.faiss_search,
    "cdist + argmin": peers.cdist_search,
    "addmm + argmin": peers.addmm_search,
}


def latents(count: int, num_codes: int, data: str = "normal") -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and codes: all N(0, 1); codes as at the start; latents near the codes."""
    z, codebook = torch.randn(count, 64), torch.randn(num_codes, 64)
    if data == "start":
        codebook = (torch.rand(num_codes, 64) * 2 - 1) / num_codes
    elif data == "trained":
        z = codebook[torch.randint(num_codes, (count,))] + 0.3 * z
    return z, codebook


@pytest.mark.parametrize("name", ["native", *PEERS])
@pytest.mark.parametrize(
    ("count", "num_codes", "data"),
    [*((*shape, "normal") for shape in SHAPES), (65536, 512, "start"), (65536, 512, "trained")],
)
def test_search(measure: peers.Measure, count: int, num_codes: int, data: str, name: str) -> None:
    z, codebook = latents(count, num_codes, data)
    if name == "native":
        function = lambda: nearest_code(z, codebook, backend="native")  # noqa: E731
    else:
        function = PEERS[name](z, codebook)
    exact = nearest_code(z[:2048], codebook, backend="reference")
    wrong = int((function()[:2048] != exact).sum())
    if name == "native":
        assert wrong == 0
    measure(
        f"nearest code N={count} K={num_codes} D=64 float32, {data} data",
        name,
        function,
        rounds=7,
        warmup=1,
        wrong_of_2048=wrong,
    )


@pytest.mark.parametrize("name", ["native", "reference", "vector-quantize-pytorch"])
@pytest.mark.parametrize("num_codes", [256, 512])
def test_training_step(measure: peers.Measure, num_codes: int, name: str) -> None:
    z, _ = latents(65536, num_codes)
    if name == "vector-quantize-pytorch":
        function = peers.vector_quantize_pytorch_step(z, num_codes)
    else:
        module = VectorQuantizer(num_codes, 64, dim=-1, backend=name)
        module.codebook.normal_()
        rows = z.clone().requires_grad_()

        def function() -> torch.Tensor:
            out = module(rows)
            (out.z_q.sum() + out.commitment_loss).backward()
            return out.z_q

    if name != "reference":  # its warm-up would take longer than all others together
        assert bool(function().isfinite().all())
    measure(
        f"quantizer step: forward, backward, EMA, N=65536 K={num_codes} D=64 float32",
        name,
        function,
        rounds=2 if name == "reference" else 5,
        warmup=0 if name == "reference" else 2,
    )
