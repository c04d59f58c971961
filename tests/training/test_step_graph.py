"""A training step as a CUDA graph: where there can be none, it is said before anything starts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from msvq_fast.ops.checks import InputError, WorkError
from msvq_fast.training import loop
from msvq_fast.training.checkpoint import checkpoint_path
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
    for backend in (None, "native", "triton"):
        check_graph(TrainConfig(cuda_graph=True, backend=backend), World(0, 1, world.device))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    """Stands in for the recording of a graph, which runs the step as it is."""
    recorder = mock.Mock(side_effect=lambda *_, **__: contextlib.nullcontext())
    for name in ("Stream", "CUDAGraph", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, mock.Mock())
    for name in ("stream", "device"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
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


def test_runs_on_the_device_of_the_parameters(recorder: mock.Mock) -> None:
    """Which need not be the current one: a stream of that one would record nothing."""
    graph = StepGraph(lambda x: x, [nn.Parameter(torch.ones(3, device="meta"))])
    torch.cuda.Stream.assert_called_once_with(torch.device("meta"))
    for _ in range(WARM_UPS):
        graph(torch.ones(2))
        torch.cuda.current_stream.assert_called_with(graph.stream.device)
    torch.cuda.device.assert_not_called()
    recorder.side_effect = lambda *_, **__: contextlib.nullcontext(
        torch.cuda.device.assert_called_once_with(graph.stream.device)
    )
    graph(torch.ones(2))
    recorder.assert_called_once()


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


def test_every_call_has_its_images_and_new_gradients(recorder: mock.Mock) -> None:
    """Here a replay is the step, as its kernels would be."""
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    seen = []

    def step(x: Tensor) -> Tensor:
        seen.append((x, x.clone(), used.grad))
        loss = (x * used).sum()
        loss.backward()
        return loss.detach()

    graph = StepGraph(step, iter([used, unused]))
    graph.graph.replay.side_effect = lambda: seen.append((graph.x, graph.x.clone(), None))
    for number in range(WARM_UPS + 3):
        x = torch.full((1, 3, 2, 3), float(number)).to(memory_format=torch.channels_last)
        x.requires_grad_(number >= WARM_UPS)
        assert graph(x) == 18 * min(number, WARM_UPS)
        own, values, before = seen[-1]
        assert torch.equal(values, x) and before is None
        assert own.stride() == x.stride() and (own is x) == (number < WARM_UPS)
        assert not own.requires_grad
        if number == WARM_UPS:
            assert seen[-2][0] is own  # the recording is of the images that a replay reads
        assert unused.grad is None and torch.equal(
            used.grad, torch.full((3,), 6.0 * min(number, WARM_UPS))
        )
        unused.grad = torch.ones(3)  # by whoever else, and `used` keeps its own
    recorder.assert_called_once_with(
        graph.graph, stream=graph.stream, capture_error_mode="thread_local"
    )


def test_steps_before_the_recording_run_on_its_stream(recorder: mock.Mock) -> None:
    """It waits for what made the images, and what comes next waits for it."""
    events = mock.Mock()
    graph = StepGraph(lambda x: events.step(x), [])
    current, stream = torch.cuda.current_stream.return_value, torch.cuda.stream
    events.attach_mock(graph.stream.wait_stream, "stream_waits")
    events.attach_mock(current.wait_stream, "current_waits")
    events.attach_mock(stream, "stream")
    x = torch.ones(2)
    graph(x)
    within = mock.call.stream(graph.stream)
    assert events.mock_calls == [
        mock.call.stream_waits(current),
        within,
        within.__enter__(),
        mock.call.step(x),
        within.__exit__(None, None, None),
        mock.call.current_waits(graph.stream),
    ]


class Direct:
    """A graph that runs every step as it is."""

    calls = 0

    def __init__(self, step, parameters) -> None:
        self.step = step
        Direct.calls = 0

    def __call__(self, x: Tensor):
        Direct.calls += 1
        return self.step(x)


@pytest.mark.parametrize("options", [(), ("--grad_clip=0.01", "--precision=bf16")], ids=str)
def test_a_run_with_a_graph_equals_one_without(
    tmp_path: Path,
    train: Callable[..., int],
    read_metrics: Callable[[Path], list],
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
) -> None:
    monkeypatch.setattr(loop, "check_graph", lambda *_: None)
    monkeypatch.setattr(loop, "StepGraph", Direct)
    add, counted = loop.Window.add, []
    monkeypatch.setattr(loop.Window, "add", lambda *a: (counted.append(a[2]), add(*a))[1])
    runs = []
    for graph in ("--cuda_graph", "--no_cuda_graph"):
        out = tmp_path / graph
        assert train(out, "--steps=4", graph, *options) == 0
        weights = load_file(checkpoint_path(out, 4) / "model.safetensors")
        runs.append((weights, read_metrics(out)))
    assert Direct.calls == 4 and counted == [1, 2, 3, 4] * 2
    assert all(torch.equal(runs[0][0][name], runs[1][0][name]) for name in runs[1][0])
    assert runs[0][1] == runs[1][1]
    steps = ("--steps=6", "--validate_every=0", "--resume=auto", *options)
    assert train(out, *steps, "--cuda_graph") == 0  # goes on without one, then with one
    assert Direct.calls == 2


def test_mixed_precision_reaches_the_model(tmp_path: Path, train: Callable[..., int]) -> None:
    weights = []
    for precision in ("fp32", "bf16"):
        out = tmp_path / precision
        assert train(out, "--steps=2", f"--precision={precision}") == 0
        weights.append(load_file(checkpoint_path(out, 2) / "model.safetensors"))
    assert not all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
