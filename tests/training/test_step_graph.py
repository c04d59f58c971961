"""A training step as a CUDA graph: where there can be none, it is said before anything starts."""

from __future__ import annotations

import contextlib
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from msvq_fast.ops.checks import InputError, WorkError
from msvq_fast.training.config import TrainConfig
from msvq_fast.training.distributed import World
from msvq_fast.training.loop import run_train
from msvq_fast.training.step_graph import WARM_UPS, StepGraph, check_graph


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


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    """Stands in for the recording of a graph, which runs the step as it is."""
    recorder = mock.Mock(side_effect=lambda *_, **__: contextlib.nullcontext())
    for name in ("Stream", "CUDAGraph", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, mock.Mock())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", recorder)
    return recorder


def test_gradients_are_those_of_the_last_call(recorder: mock.Mock) -> None:
    weight = nn.Parameter(torch.ones(3))

    def step(x: Tensor) -> Tensor:
        loss = (x * weight).sum()
        loss.backward()
        return loss.detach()

    graph = StepGraph(step, [weight])
    for number in range(WARM_UPS + 3):
        graph(torch.full((2, 3), float(number)))
        recorded = number >= WARM_UPS
        assert recorder.call_count == recorded
        assert graph.graph.replay.call_count == max(number - WARM_UPS + 1, 0)
        # Here a replay does nothing: the gradient stays that of the recording.
        assert torch.equal(weight.grad, torch.full((3,), 2.0 * min(number, WARM_UPS)))
        weight.grad = None
    for x in (torch.ones(4, 3), torch.ones(2, 3, dtype=torch.float64)):
        with pytest.raises(
            InputError, match=r"expected the first call's \(\(2, 3\), torch\.float32"
        ):
            graph(x)


def test_what_cannot_be_recorded_is_not_replayed(recorder: mock.Mock) -> None:
    graph = StepGraph(lambda x: x, [])
    x = torch.ones(2)
    for _ in range(WARM_UPS):
        graph(x)
    recorder.side_effect = RuntimeError("waits for the device")
    with pytest.raises(RuntimeError, match="waits for the device"):
        graph(x)
    with pytest.raises(WorkError, match="could not be recorded"):
        graph(x)
    graph.graph.replay.assert_not_called()
