"""A training step as a CUDA graph: where there can be none, it is said before anything starts."""

from __future__ import annotations

import pytest
import torch

from msvq_fast.ops.checks import InputError
from msvq_fast.training.config import TrainConfig
from msvq_fast.training.distributed import World
from msvq_fast.training.loop import run_train
from msvq_fast.training.step_graph import check_graph


def test_needs_a_cuda_device(tmp_path) -> None:
    config = TrainConfig(out=str(tmp_path / "run"), cuda_graph=True, device="cpu", steps=1)
    with pytest.raises(InputError, match=r"cuda_graph=True needs a CUDA device; .* on cpu"):
        run_train(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "processes", "message"),
    [
        ({}, 2, "cuda_graph=True takes one process; there are 2"),
        ({"compile": True}, 1, "cuda_graph=True cannot run with compile=True"),
        ({"gan": True}, 1, "cuda_graph=True cannot run with gan=True"),
        ({"perceptual_weight": 0.5}, 1, r"cannot run with perceptual_weight=0\.5"),
        ({"backend": "reference"}, 1, "cannot run with backend=reference"),
        ({"accumulate": 2}, 1, "cuda_graph=True takes accumulate=1, it is 2"),
    ],
)
def test_errors_name_what_it_cannot_run_with(settings, processes: int, message: str) -> None:
    world = World(0, processes, torch.device("cuda", 0))
    with pytest.raises(InputError, match=message):
        check_graph(TrainConfig(cuda_graph=True, **settings), world)
    check_graph(TrainConfig(cuda_graph=False, **settings), world)
    check_graph(TrainConfig(cuda_graph=True), World(0, 1, world.device))
