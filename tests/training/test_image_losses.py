from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from msvq_fast.metrics import LPIPS
from msvq_fast.models import MSVQVAE, VQVAE2, from_preset
from msvq_fast.nn.discriminator import PatchDiscriminator
from msvq_fast.training import loop
from msvq_fast.training.checkpoint import checkpoint_path
from msvq_fast.training.config import TrainConfig
from msvq_fast.training.distributed import World
from msvq_fast.training.image_losses import ImageLosses, last_layer

Train = Callable[..., int]
ReadMetrics = Callable[[Path], list[dict[str, Any]]]
GAN = ("--gan", "--gan_start=0")
ONE = World(0, 1, torch.device("cpu"))


def weights(out: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(checkpoint_path(out, step) / "model.safetensors")


def saved(out: Path, step: int) -> dict[str, Any]:
    return torch.load(checkpoint_path(out, step) / "optimizer.pt", weights_only=True)


def assert_equal(a: Any, b: Any) -> None:
    """Equal to the bit, through dictionaries and lists."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, (dict, list, tuple)):
        assert len(a) == len(b)
        for key in a if isinstance(a, dict) else range(len(a)):
            assert_equal(a[key], b[key])
    else:
        assert a == b


def small_model(preset: str) -> MSVQVAE | VQVAE2:
    torch.manual_seed(3)
    model = from_preset(preset, resolution=16, latents=(2, 4), width=8, code_dim=4, num_codes=8)
    model.defer_codebook_updates()
    return model


def images(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1


@pytest.mark.parametrize("preset", ["tiny", "vqvae2-tiny"])
@pytest.mark.parametrize("memory", ["default", "strips"])
def test_gradients_are_those_of_the_formula(preset: str, memory: str) -> None:
    model, x = small_model(preset), images(3)
    model.set_memory(memory, strips=2)
    config = TrainConfig(gan=True, gan_start=0, gan_weight=0.7)
    losses = ImageLosses(config, model, ONE, total_steps=1)
    judge = losses.discriminator
    assert judge is not None
    losses.backward(model(x), x, 0, 0, 1)
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    judged = [p.grad.clone() for p in judge.parameters()]

    twin = small_model(preset)
    out = twin(x)
    adversarial = -judge(out.partial()).mean()
    last = last_layer(twin)
    by_loss, by_judge = (
        torch.autograd.grad(loss, last, retain_graph=True)[0] for loss in (out.loss, adversarial)
    )
    factor = 0.7 * by_loss.norm() / (by_judge.norm() + 1e-4)
    (out.loss + factor.detach() * adversarial).backward()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=2e-4, atol=1e-6, msg=name)
    judge.zero_grad()
    real, fake = judge(x), judge(out.partial().detach())
    ((1 - real).relu().mean() / 2 + (1 + fake).relu().mean() / 2).backward()
    for got, parameter in zip(judged, judge.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, rtol=1e-4, atol=1e-6)
    figures = losses.read()
    assert figures["adversarial_weight"] == pytest.approx(float(factor), rel=1e-4)
    assert figures["adversarial_loss"] == pytest.approx(float(adversarial.detach()), rel=1e-4)
    assert losses.read() == {}


def test_a_perceptual_distance_adds_its_gradient() -> None:
    model, x = small_model("tiny"), images(3)
    config = TrainConfig(perceptual_weight=0.5)

    def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a - b).abs().mean(dim=(1, 2, 3)).double()

    losses = ImageLosses(config, model, ONE, total_steps=1, perceptual=distance)
    losses.backward(model(x), x, 0, 0, 2)
    twin = small_model("tiny")
    out = twin(x)
    measured = distance(out.partial(), x).mean()
    ((out.loss + 0.5 * measured) / 2).backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert losses.read() == {"perceptual_loss": pytest.approx(float(measured.detach()), rel=1e-6)}


def test_without_weight_or_before_its_start_it_changes_no_bit(
    tmp_path: Path, train: Train, read_metrics: ReadMetrics
) -> None:
    options = ("--steps=6", "--accumulate=2")
    assert train(tmp_path / "plain", *options) == 0
    assert train(tmp_path / "late", *options, "--gan", "--gan_start=5") == 0
    assert train(tmp_path / "mute", *options, *GAN, "--gan_weight=0") == 0
    plain, late = (read_metrics(tmp_path / name) for name in ("plain", "late"))
    train_lines = [line for line in plain if line["kind"] == "train"]
    assert train_lines == [
        {k: v for k, v in line.items() if not k.startswith(("adversarial", "discriminator"))}
        for line in late
        if line["kind"] == "train"
    ]
    assert_equal(weights(tmp_path / "plain", 6), weights(tmp_path / "mute", 6))
    assert "discriminator" not in saved(tmp_path / "plain", 6)["image_losses"]
    # The last step of `late` and every step of `mute` had a discriminator that learnt.
    torch.manual_seed(0)
    fresh = PatchDiscriminator(16).state_dict()
    for name in ("late", "mute"):
        judge = saved(tmp_path / name, 6)["image_losses"]["discriminator"]
        assert not torch.equal(judge["layers.0.weight"], fresh["layers.0.weight"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_goes_on_bit_for_bit(
    tmp_path: Path,
    train: Train,
    read_metrics: ReadMetrics,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
) -> None:
    options = ("--steps=8", "--gan", "--gan_start=1", f"--precision={precision}")
    assert train(tmp_path / "whole", *options) == 0
    step = loop._Run._optimizer_step

    def interrupted(run: Any, stream: Any) -> None:
        if run.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        step(run, stream)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "_optimizer_step", interrupted)
        assert train(tmp_path / "parts", *options) == 143
    assert saved(tmp_path / "parts", 3)["image_losses"]["totals"][2] == 1, "amid a log line"
    assert train(tmp_path / "parts", *options, "--resume=auto") == 0
    whole, parts = (read_metrics(tmp_path / name) for name in ("whole", "parts"))
    assert whole == parts
    logged = [line for line in whole if line["kind"] == "train"]
    assert logged[-1]["adversarial_weight"] > 0
    assert_equal(weights(tmp_path / "whole", 8), weights(tmp_path / "parts", 8))
    assert_equal(saved(tmp_path / "whole", 8), saved(tmp_path / "parts", 8))


def test_a_checkpoint_of_an_earlier_version_goes_on(tmp_path: Path, train: Train) -> None:
    assert train(tmp_path, "--steps=3") == 0
    path = checkpoint_path(tmp_path, 3) / "state.json"
    state = json.loads(path.read_text())
    for name in ("gan", "gan_weight", "gan_start", "perceptual_weight", "lpips_weights"):
        del state["config"][name]
    path.write_text(json.dumps(state))
    assert train(tmp_path, "--steps=4", "--resume=auto") == 0


def test_its_micro_batches_may_not_change(
    tmp_path: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ("--steps=4", "--batch_size=2", "--accumulate=2", "--resume=auto")
    assert train(tmp_path / "plain", "--steps=3") == 0
    assert train(tmp_path / "plain", *other) == 0
    assert train(tmp_path / "gan", "--steps=3", *GAN) == 0
    assert train(tmp_path / "gan", *other, *GAN) == 2
    assert "accumulate is 1 there and 2 here" in capsys.readouterr().err


def test_lpips_from_a_file_trains(tmp_path: Path, train: Train, read_metrics: ReadMetrics) -> None:
    torch.manual_seed(0)
    network = LPIPS("squeeze").state_dict()
    heads = {
        f"lin{j}.model.1.weight": network.pop(f"heads.{j}")[None, :, None, None] for j in range(7)
    }
    torch.save({**network, **heads}, tmp_path / "lpips.pt")
    options = ("--perceptual_weight=0.1", f"--lpips_weights={tmp_path / 'lpips.pt'}")
    sizes = ("--model.resolution=32", "--model.latents=[4,8]", "--resize=32")
    assert train(tmp_path / "out", "--steps=2", *options, *sizes) == 0
    assert read_metrics(tmp_path / "out")[0]["perceptual_loss"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gan"], "gan_start=10000; the run has 2 steps, so the discriminator would never"),
        ([*GAN, "--compile"], "gan=True cannot run with compile=True"),
        (["--gan_weight=-1"], "gan_weight=-1.0; expected at least 0"),
        (["--perceptual_weight=1"], "perceptual_weight needs lpips_weights"),
        (["--perceptual_weight=1", "--lpips_weights=nowhere"], "nowhere"),
    ],
)
def test_settings_that_cannot_work(
    tmp_path: Path,
    train: Train,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    assert train(tmp_path / "out", "--steps=2", *options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


WORKER = """
import sys, torch
from msvq_fast.training import loop
from msvq_fast.cli import main
torch.set_num_threads(1)
close = loop._Run.close
def closing(run):
    torch.save([run.model.state_dict(), run.losses.discriminator.state_dict()], sys.argv[1])
    close(run)
loop._Run.close = closing
sys.exit(main(sys.argv[2:]))
"""


def test_two_processes_train_as_one(
    tmp_path: Path,
    train: Train,
    train_command: Callable[..., list[str]],
    read_metrics: ReadMetrics,
) -> None:
    options = ("--steps=4", "--log_every=1", *GAN)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = train_command(tmp_path / "two", *options, "--batch_size=2")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path / f"{rank}.pt"), *command],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    assert_equal(*(torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)))
    assert train(tmp_path / "one", *options) == 0
    two, one = (
        [line for line in read_metrics(tmp_path / name) if line["kind"] == "train"]
        for name in ("two", "one")
    )
    for name in ("loss", "adversarial_loss", "adversarial_weight", "discriminator_loss"):
        ours, theirs = ([line[name] for line in lines] for lines in (two, one))
        assert ours == pytest.approx(theirs, rel=2e-3), name
        assert ours[0] == pytest.approx(theirs[0], rel=1e-5), name
