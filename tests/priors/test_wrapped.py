"""Priors inside what PyTorch wraps around them: parallel training, export, compilation."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from msvq_fast import priors
from msvq_fast.training.distributed import leave
from tests.training.two_processes import tripled

KINDS = (priors.AutoregressivePrior, priors.MaskGITPrior)
CODES = [torch.arange(size * size).view(1, size, size).expand(2, -1, -1) % 16 for size in (4, 8)]


def small(kind: type[priors.Prior]) -> priors.Prior:
    grids = ((4, 4), (8, 8))
    return kind(priors.PriorConfig(grids=grids, num_codes=16, width=32, heads=4, depth=2))


def train_static_graph(folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/store", rank=0, world_size=1)
    prior = small(priors.AutoregressivePrior)
    wrapped = DistributedDataParallel(prior, static_graph=True)
    wrapped.register_comm_hook(None, lambda _, bucket: tripled(bucket.buffer()))
    want = torch.autograd.grad(prior(CODES).loss, list(prior.parameters()))
    wrapped(CODES).loss.backward()
    for parameter, grad in zip(prior.parameters(), want, strict=True):
        torch.testing.assert_close(parameter.grad, 3 * grad)
    leave()


def test_gradients_of_a_static_graph_are_reduced(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(
        target=train_static_graph, args=(str(tmp_path),)
    )
    process.start()
    process.join(100)
    process.kill()  # if it hangs
    assert process.exitcode == 0


@pytest.mark.parametrize("kind", KINDS)
def test_exports(kind: type[priors.Prior]) -> None:
    prior = small(kind).eval()
    out = torch.export.export(prior, (CODES,)).module()(CODES)
    assert isinstance(out, priors.PriorOutput)


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_in_one_graph_for_any_batch(kind: type[priors.Prior]) -> None:
    prior = small(kind)
    torch.compiler.reset()
    compiled = torch.compile(prior, fullgraph=True, backend="eager")
    for batch in (2, 3, 5):
        codes = [grid[:1].repeat(batch, 1, 1) for grid in CODES]
        torch.manual_seed(0)
        want = prior(codes).loss
        torch.manual_seed(0)
        torch.testing.assert_close(compiled(codes).loss, want)
