"""A training step replayed from a CUDA graph gives the numbers of the step itself."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from msvq_fast import models
from msvq_fast.nn import blocks
from msvq_fast.ops.checks import InputError
from msvq_fast.training.optimizer import build_adam
from msvq_fast.training.step_graph import WARM_UPS, StepGraph


@pytest.fixture(autouse=True)
def _repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(blocks, "LEAST_VALUES", 0)


def trained(model: nn.Module, graph: bool, mode: str, steps: int) -> tuple[nn.Module, list[Tensor]]:
    model = copy.deepcopy(model)
    model.set_memory(mode, strips=2)
    optimizer = build_adam(model.parameters(), lr=1e-3, betas=(0.5, 0.9))

    def gradients(x: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            out = model(x)
        out.loss.backward()
        model.update_codebooks()
        return out.loss.detach()

    step = StepGraph(gradients, model.parameters()) if graph else gradients
    losses = []
    for number in range(steps):
        generator = torch.Generator("cuda").manual_seed(number)
        x = torch.rand(4, 3, 64, 64, device="cuda", generator=generator) * 2 - 1
        losses.append(step(x.contiguous(memory_format=torch.channels_last)).clone())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model, losses


@pytest.mark.parametrize("mode", models.MEMORY_MODES)
@pytest.mark.parametrize("preset", ["tiny", "vqvae2-tiny"])
def test_equals_the_step_itself(device: str, preset: str, mode: str) -> None:
    model = models.from_preset(preset, restart_below=0.5)
    model.to(device=device, memory_format=torch.channels_last).train()
    model.defer_codebook_updates()
    steps = WARM_UPS + 4
    mine, losses = trained(model, True, mode, steps)
    other, wanted = trained(model, False, mode, steps)
    assert torch.equal(torch.stack(losses), torch.stack(wanted))
    for name, tensor in mine.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_a_run_with_a_graph_equals_one_without(device: str, tmp_path: Path) -> None:
    for name in ("PIL", "rich", "safetensors", "yaml"):
        pytest.importorskip(name)
    from safetensors.torch import load_file

    from msvq_fast.training.config import TrainConfig
    from msvq_fast.training.loop import run_train

    weights = []
    for graph in (True, False):
        out = tmp_path / str(graph)
        settings = {
            "resize": 96,
            "batch_size": 4,
            "validate_every": 0,
            "log_every": 3,
            "workers": 0,
        }
        config = TrainConfig(out=str(out), steps=6, device=device, cuda_graph=graph, **settings)
        assert run_train(config) == 0
        weights.append(load_file(out / "checkpoints" / "step_00000006" / "model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


@pytest.mark.parametrize("number_of_device", [0, 1])
def test_simple_step_and_another_shape(number_of_device: int) -> None:
    """Where the parameters are, though that is not the current device."""
    if number_of_device >= torch.cuda.device_count():
        pytest.skip("needs two GPUs")
    device = f"cuda:{number_of_device}"
    weight = nn.Parameter(torch.ones(3, device=device))

    def step(x: Tensor) -> Tensor:
        loss = (x * weight).sum()
        loss.backward()
        return loss.detach()

    graph = StepGraph(step, [weight])
    for number in range(WARM_UPS + 3):
        x = torch.full((2, 3), float(number), device=device)
        assert graph(x) == 6 * number
        assert torch.equal(weight.grad, torch.full_like(weight, 2.0 * number))
        assert torch.cuda.current_device() == 0
    for x in (torch.ones(4, 3, device=device), torch.ones(2, 3, device=device).half()):
        with pytest.raises(
            InputError, match=r"expected the first call's \(\(2, 3\), torch\.float32"
        ):
            graph(x)


@pytest.mark.parametrize("preset", ["tiny", "vqvae2-tiny"])
def test_joined_layers_train_as_layers_one_by_one(
    device: str, monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    """In bfloat16, against the same in float32: joined layers are no further from it."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = models.from_preset(preset).to(device=device, memory_format=torch.channels_last).train()
    model.defer_codebook_updates()
    x = torch.rand(4, 3, 64, 64, device=device) * 2 - 1
    x = x.contiguous(memory_format=torch.channels_last)
    calls = []
    joined = blocks.run_joined
    monkeypatch.setattr(blocks, "run_joined", lambda *a: (calls.append(1), joined(*a))[1])

    def decoded(mixed: bool, together: bool) -> Tensor:
        for part in model.modules():
            if isinstance(part, blocks.Chain):
                part.joined = together
        calls.clear()
        with torch.autocast(device, torch.bfloat16, enabled=mixed):
            out = model.decode(codes)
        assert bool(calls) == together
        return out.detach().float()

    codes = model.encode(x)
    exact = decoded(False, False)
    torch.testing.assert_close(decoded(False, True), exact, rtol=1e-4, atol=1e-4)
    error = [float((decoded(True, t) - exact).square().mean()) for t in (True, False)]
    assert error[0] <= 1.2 * error[1] < 1e-2
