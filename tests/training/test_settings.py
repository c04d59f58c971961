"""What a run is asked for is what it has, before its first step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training.test_prior import tokens as tokens
from training.test_prior import train as train_prior

from msvq_fast.cli import main, parse
from msvq_fast.priors import AutoregressivePrior, MaskGITPrior, PriorOutput
from msvq_fast.training import loop
from msvq_fast.training import prior as prior_training
from msvq_fast.training.config import how_computed
from msvq_fast.training.distributed import World

CPU = World(0, 1, torch.device("cpu"))
OTHERS = (
    *("--backend=reference", "--memory=strips", "--strips=3", "--channels_last=on"),
    *("--precision=bf16", "--crop=center", "--no_flip"),
)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), (None, "default", 8, False, None, "random", True)),
        (
            OTHERS,
            ("reference", "strips", 3, True, torch.bfloat16, "center", False),
        ),
    ],
    ids=["defaults", "others"],
)
def test_of_training(
    tmp_path: Path,
    train_command: Callable[..., list[str]],
    options: tuple[str, ...],
    expected: tuple[Any, ...],
) -> None:
    _, config = parse(train_command(tmp_path, *options))
    run = loop._Run(config, CPU)
    model, dataset = run.model, run.dataset
    last = model.decoder if hasattr(model, "decoder") else model.step_two[-1]
    weight = next(p for p in last.parameters() if p.dim() == 4 and p.shape[-1] > 1)
    found = (model.backend, model.memory, model.strips)
    found += (weight.is_contiguous(memory_format=torch.channels_last), run.autocast_dtype)
    assert (*found, dataset.crop, dataset.flip) == expected
    assert all(quantizer.backend == expected[0] for quantizer in model.quantizers)
    run.close()


def test_of_computation() -> None:
    _, config = parse(["train"])
    how = [how_computed(config.to_dict(), device) for device in ("cpu", "cuda")]
    assert [h["precision"] for h in how] == ["fp32", "bf16"]
    assert [h["channels_last"] for h in how] == ["off", "on"]
    _, config = parse(["train", "--precision=bf16"])
    assert how_computed(config.to_dict(), "cpu")["channels_last"] == "on"


def test_deterministic_algorithms_last_as_long_as_the_run(
    tmp_path: Path, train_command: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, step = [], loop._Run._optimizer_step

    def noted(run: Any, stream: Any) -> None:
        seen.append(torch.are_deterministic_algorithms_enabled())
        step(run, stream)

    monkeypatch.setattr(loop._Run, "_optimizer_step", noted)
    for name, *options in (("a", "--deterministic"), ("b",)):
        short = ("--steps=1", "--validate_every=0")
        assert main(train_command(tmp_path / name, *short, *options)) == 0
    assert seen == [True, False] and not torch.are_deterministic_algorithms_enabled()


def test_a_run_into_a_file_is_refused(
    tmp_path: Path, train_command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert main(train_command(out, "--steps=1")) == 2
        message = f"msvq: error: cannot write into {str(out)!r}: not a folder\n"
        assert capsys.readouterr().err == message


@pytest.mark.parametrize("kind", [AutoregressivePrior, MaskGITPrior])
def test_of_a_prior(
    tokens: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type
) -> None:
    calls, forward = [], kind.forward

    def noted(prior: Any, codes: Any, labels: Any = None, **settings: Any) -> PriorOutput:
        calls.append((prior, settings))
        return forward(prior, codes, labels, **settings)

    monkeypatch.setattr(kind, "forward", noted)
    name = "maskgit" if kind is MaskGITPrior else "autoregressive"
    options = [f"--kind={name}", "--steps=1", "--backend=reference", "--dropout=0.25"]
    other = ["--mask_schedule=cosine", "--label_smoothing=0.2", "--validate_every=0"]
    assert train_prior(tokens, tmp_path, *options, *other) == 0
    ((prior, settings),) = calls
    assert prior.config.kernels == (3, 5) and prior.config.dropout == 0.25  # the paper's windows
    assert all(scale.backend == "reference" for scale in prior.scales)
    masked = {"schedule": "cosine", "label_smoothing": 0.2}
    assert settings == (masked if kind is MaskGITPrior else {})


def test_dense_attention_has_no_windows(tokens: list[str]) -> None:
    _, config = parse(["train-prior", *tokens, "--attention=dense"])
    built = prior_training.build_prior(config, prior_training.load_tokens(config.tokens))
    assert built.config.kernels is None
