"""Numbers that are no longer finite: noticed, named, not saved, and how to go on."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from msvq_fast.training import loop
from msvq_fast.training.checkpoint import checkpoint_path, list_checkpoints, read_state

Train = Callable[..., int]
ReadMetrics = Callable[[Path], list[dict[str, Any]]]


def test_a_bad_loss_stops_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    schedule = ("--warmup_epochs=0", "--schedule=constant")
    every = ("--steps=9", "--checkpoint_every=1", "--validate_every=0")
    assert train(tmp_path, *schedule, *every, "--lr=1e37") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "is not finite" in error and "try a lower lr" in error
    kept = list_checkpoints(tmp_path)
    assert (str(kept[-1]) if kept else "no checkpoint yet") in error
    for path in kept:
        assert all(t.isfinite().all() for t in load_file(path / "model.safetensors").values())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("inf"), "encoder.scales.0.0.weight is not finite after step 5"),
        # Its square is not: Adam would divide by it for ever.
        (1e25, "the gradient of encoder.scales.0.0.weight had no finite square by step 5"),
    ],
)
def test_a_bad_gradient_is_not_saved(
    tmp_path: Path,
    train: Train,
    read_metrics: ReadMetrics,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    value: float,
    message: str,
) -> None:
    step = loop.ImageLosses.backward

    def spoiled(losses: Any, out: Any, x: torch.Tensor, number: int, *rest: int) -> None:
        step(losses, out, x, number, *rest)
        if number == 4:
            weight.grad.view(-1)[0] = value

    build = loop._Run._build

    def built(run: Any, start: Path | None) -> None:
        nonlocal weight
        build(run, start)
        weight = next(run.model.parameters())

    weight: Any = None
    monkeypatch.setattr(loop.ImageLosses, "backward", spoiled)
    monkeypatch.setattr(loop._Run, "_build", built)
    assert train(tmp_path, "--steps=9", "--checkpoint_every=3") == 1
    assert message in capsys.readouterr().err
    assert [read_state(path)["step"] for path in list_checkpoints(tmp_path)] == [3]
    assert all(record["kind"] == "train" for record in read_metrics(tmp_path))


def test_a_run_that_diverged_goes_on_with_another_rate(
    tmp_path: Path,
    train: Train,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ("--steps=9", "--checkpoint_every=3", "--validate_every=0")
    add = loop.Window.add

    def spoiled(window: loop.Window, out: Any, step: int) -> None:
        if step == 5:
            out.loss.data.fill_(math.nan)
        add(window, out, step)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Window, "add", spoiled)
        assert train(tmp_path, *options) == 1
    last = checkpoint_path(tmp_path, 3)
    assert capsys.readouterr().err.endswith(f"try a lower lr with resume={last}\n")
    other = ("--lr=1e-4", "--betas=[0.4,0.8]", "--grad_clip=1")
    # A script that is called again and again should not change them unawares.
    assert train(tmp_path, *options, *other, "--resume=auto") == 2
    error = capsys.readouterr().err
    assert error.endswith(
        "lr is 0.001 there and 0.0001 here; to change that on the way name the checkpoint, "
        f"resume={last}\n"
    )
    assert train(tmp_path, *options, *other, "--seed=1", f"--resume={last}") == 2
    error = capsys.readouterr().err
    assert "seed is 0 there and 1 here; give what is there, or start a new run: " in error
    assert train(tmp_path, *options, *other, f"--resume={last}") == 0
    assert (
        "warning: betas [0.5, 0.9] -> [0.4, 0.8], grad_clip 0.0 -> 1.0, lr 0.001 -> 0.0001: "
        "from here on the run is another\n"
    ) in capsys.readouterr().out
    saved = torch.load(checkpoint_path(tmp_path, 9) / "optimizer.pt", weights_only=True)
    assert tuple(saved["optimizer"]["param_groups"][0]["betas"]) == (0.4, 0.8)
    assert train(tmp_path, "--steps=10", *options[1:], *other, "--resume=auto") == 0
    assert "from here on" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("reconstruction_loss", float("nan"), "step 4: reconstruction loss of scale 1;"),
        ("commitment_loss", float("inf"), "step 4: commitment loss of scale 1;"),
    ],
)
def test_a_bad_loss_is_named(
    tmp_path: Path,
    train: Train,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    part: str,
    value: float,
    message: str,
) -> None:
    add = loop.Window.add

    def spoiled(window: loop.Window, out: Any, step: int) -> None:
        if step == 4:
            getattr(out, part)[1] = value
        add(window, out, step)

    monkeypatch.setattr(loop.Window, "add", spoiled)
    assert train(tmp_path, "--steps=9", "--checkpoint_every=3", "--validate_every=0") == 1
    error = capsys.readouterr().err
    assert message in error and "the last good checkpoint is" in error
    assert [read_state(path)["step"] for path in list_checkpoints(tmp_path)] == [3]
