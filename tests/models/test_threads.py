"""One model that several threads use at once, as a server's do."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from msvq_fast import models
from msvq_fast.nn import replay


@pytest.fixture
def model() -> models.MSVQVAE:
    torch.manual_seed(0)
    return models.MSVQVAE.from_preset("tiny", resolution=32, latents=(4, 8), width=16).eval()


def images(seed: int) -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("memory", models.MEMORY_MODES)
def test_gradients_are_those_of_one_thread(model: models.MSVQVAE, memory: str) -> None:
    model.set_memory(memory, strips=2)
    parameters = list(model.parameters())

    def gradients(seed: int) -> tuple[Tensor, ...]:
        return torch.autograd.grad(model(images(seed)).loss, parameters)

    alone = [gradients(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(gradients, range(8)))
    for got, want in zip(together, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


@pytest.mark.parametrize("memory", models.MEMORY_MODES)
def test_decoding_waits_for_no_other_model(model: models.MSVQVAE, memory: str) -> None:
    model.set_memory(memory, strips=2)

    @torch.no_grad()
    def look() -> None:
        model.reconstruct(images(0))

    with ThreadPoolExecutor(1) as pool, replay._LENDING:  # as while that one's backward runs
        pool.submit(look).result(timeout=60)
