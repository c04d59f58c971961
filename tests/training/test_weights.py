"""Runs that start from trained weights and codebooks in place of new ones."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from msvq_fast.cli import main
from msvq_fast.models import from_pretrained
from msvq_fast.training import loop
from msvq_fast.training.checkpoint import checkpoint_path, find_model, read_state
from tests.training.conftest import train_arguments
from tests.training.two_processes import run_two

Train = Callable[..., int]
ReadMetrics = Callable[[Path], list[dict[str, Any]]]

KEPT = ("--lr=1e-60", "--steps=1", "--validate_every=0")  # weights stay: in float32 that is 0


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in from_pretrained(folder).named_parameters()}


@pytest.fixture(scope="module")
def trained(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert main(train_arguments(pictures, out, "--steps=3", "--validate_every=0")) == 0
    return out


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """What a run's model held before the first step."""
    found: dict[str, torch.Tensor] = {}
    step = loop._Run._optimizer_step

    def noting(run: Any, stream: Any) -> None:
        if not found:
            found.update({name: t.clone() for name, t in run.model.state_dict().items()})
        step(run, stream)

    monkeypatch.setattr(loop._Run, "_optimizer_step", noting)
    return found


@pytest.mark.parametrize("kind", ["run", "checkpoint", "saved model"])
def test_a_run_starts_from_trained_weights_and_codebooks(
    tmp_path: Path,
    train: Train,
    trained: Path,
    started: dict[str, torch.Tensor],
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    checkpoint = find_model(trained)
    source = {"run": trained, "checkpoint": checkpoint, "saved model": tmp_path / "saved"}[kind]
    if kind == "saved model":
        from_pretrained(checkpoint).save_pretrained(source)
    out = tmp_path / "out"
    # K-means would change the codebooks; another seed would have other weights.
    others = ("--seed=1", "--model.codebook_init=kmeans")
    assert train(out, f"--weights={source}", *KEPT, *others) == 0
    assert_equal(started, weights(checkpoint))  # moving averages among them
    assert_equal(parameters(checkpoint_path(out, 1)), parameters(checkpoint))
    found = checkpoint if kind == "run" else source
    assert f"starts from the weights of {found}\n" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["weights"] == str(source)


def test_another_size_and_other_losses_take_the_same_weights(
    tmp_path: Path, train: Train, trained: Path
) -> None:
    others = (
        "--model.resolution=24",
        "--model.latents=[3,6]",
        "--model.kernel_size=5",
        "--model.sigma_rule=opencv",
        "--model.commitment_weight=1",
        "--model.decay=0.9",
        "--model.restart_below=0.1",
        "--model.gradient=rotation",
    )
    assert train(tmp_path, f"--weights={trained}", *KEPT, *others) == 0
    result = checkpoint_path(tmp_path, 1)
    assert_equal(parameters(result), parameters(find_model(trained)))
    config = from_pretrained(result).config
    assert (config.resolution, config.commitment_weight, config.decay) == (24, 1, 0.9)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            ("--model.width=16", "--model.num_codes=4", "--model.decay=0.5"),
            "num_codes is 8 there and 4 here; width is 8 there and 16 here; give that preset",
        ),
        (  # of the sides only where they change the depth
            ("--model.resolution=24", "--model.latents=[3,6]", "--model.code_dim=8"),
            ": code_dim is 4 there and 8 here; give that preset",
        ),
        (
            ("--model.latents=[4,8]",),
            ": latents is [2, 4] there and [4, 8] here; give that preset",
        ),
        (
            ("--preset=vqvae2-tiny",),
            "; model_class is MSVQVAE there and VQVAE2 here; ",
        ),
    ],
    ids=["width", "code_dim", "latents", "class"],
)
def test_weights_of_another_model_are_refused(
    tmp_path: Path,
    train: Train,
    trained: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    told: str,
) -> None:
    out = tmp_path / "out"
    assert train(out, f"--weights={trained}", "--steps=1", *options) == 2
    error = capsys.readouterr().err
    assert f"weights={str(trained)!r} are of another model: " in error
    assert told in error and error.endswith("preset and --model.* settings\n")
    assert error.count("\n") == 1 and "decay" not in error
    assert not out.exists()


def test_weights_of_vqvae2_are_not_those_of_msvqvae(
    tmp_path: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    assert train(source, "--preset=vqvae2-tiny", "--steps=1", "--validate_every=0") == 0
    assert train(out, f"--weights={source}", "--steps=1") == 2
    assert "model_class is VQVAE2 there and MSVQVAE here; " in capsys.readouterr().err
    assert not out.exists()
    assert train(out, f"--weights={source}", "--preset=vqvae2-tiny", *KEPT) == 0
    assert_equal(parameters(checkpoint_path(out, 1)), parameters(find_model(source)))


def test_weights_that_are_not_there_are_one_line(
    tmp_path: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    out, missing = tmp_path / "out", tmp_path / "missing"
    assert train(out, f"--weights={missing}", "--steps=1") == 2
    told = "does not exist; give a run, a checkpoint or a saved model"
    assert f"weights='{missing}': {missing} {told}\n" in capsys.readouterr().err
    assert not out.exists()


def test_a_stopped_run_goes_on_as_if_it_had_not(
    tmp_path: Path,
    train: Train,
    trained: Path,
    read_metrics: ReadMetrics,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = tmp_path / "source"
    shutil.copytree(trained, source)
    options = (f"--weights={source}", "--steps=6", "--resume=auto")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert train(whole, *options) == 0
    step = loop._Run._optimizer_step

    def interrupted(run: Any, stream: Any) -> None:
        if run.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        step(run, stream)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "_optimizer_step", interrupted)
        assert train(stopped, *options) == 130
    shutil.rmtree(source)  # no longer needed
    capsys.readouterr()
    assert train(stopped, *options) == 0
    assert "starts from" not in capsys.readouterr().out
    assert read_metrics(stopped) == read_metrics(whole)
    assert_equal(weights(checkpoint_path(stopped, 6)), weights(checkpoint_path(whole, 6)))


def test_a_run_that_goes_on_keeps_what_it_started_from(
    tmp_path: Path, train: Train, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, given = tmp_path / "out", f"--weights={trained}"
    auto = ("--validate_every=0", "--resume=auto")
    assert train(out, given, "--steps=2", *auto) == 0
    assert train(out, "--steps=3", *auto) == 0
    assert read_state(checkpoint_path(out, 3))["config"]["weights"] == str(trained)
    assert train(out, f"{given}/", "--steps=4", *auto) == 0  # also after one without
    capsys.readouterr()
    other = find_model(trained)
    assert train(out, f"--weights={other}", "--steps=5", *auto) == 2
    error = capsys.readouterr().err
    assert f"weights is {trained} there and {other} here; give what is there" in error


def test_a_run_from_new_weights_takes_no_others_on_the_way(
    tmp_path: Path, train: Train, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor does one of a version that did not know the option."""
    auto = ("--validate_every=0", "--resume=auto")
    assert train(tmp_path, "--steps=1", *auto) == 0
    file = checkpoint_path(tmp_path, 1) / "state.json"
    state = json.loads(file.read_text())
    del state["config"]["weights"]
    file.write_text(json.dumps(state))
    assert train(tmp_path, f"--weights={trained}", "--steps=2", *auto) == 2
    assert f"weights is None there and {trained} here" in capsys.readouterr().err
    assert train(tmp_path, "--steps=2", *auto) == 0


# Each process has a place of its own, and the second one's holds others.
OWN_PLACES = """
import sys, torch
from msvq_fast.training import distributed
from msvq_fast.cli import main
torch.set_num_threads(1)
wrap = distributed.wrap
def wrapping(model, world):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrapped = wrap(model, world)
    torch.save([before, model.state_dict()], sys.argv[1] + ".pt")
    return wrapped
distributed.wrap = wrapping
sys.argv.append(f"--weights={sys.argv[1]}")
"""


def test_two_processes_start_from_the_weights_of_the_first(
    tmp_path: Path, train: Train, trained: Path, pictures: Path
) -> None:
    shutil.copytree(trained, tmp_path / "0")
    assert train(tmp_path / "1", "--seed=1", "--steps=1", "--validate_every=0") == 0
    command = train_arguments(pictures, tmp_path / "out", *KEPT, "--batch_size=2")
    done = run_two(tmp_path, command, OWN_PLACES)
    assert [code for code, _ in done] == [0, 0], done
    expected = weights(find_model(trained))
    first, second = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(2))
    assert_equal(first[1], expected)
    assert_equal(second[0], weights(find_model(tmp_path / "1")))
    assert_equal(second[1], expected)  # codebooks too
    done = run_two(tmp_path, [*command, "--steps=2", "--resume=auto"], OWN_PLACES)
    assert [code for code, _ in done] == [0, 0], done


def test_a_run_replaces_no_saved_model(
    tmp_path: Path, train: Train, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from_pretrained(find_model(trained)).save_pretrained(tmp_path)
    for given in ((), ("--resume=auto",), (f"--resume={trained}",)):
        assert train(tmp_path, f"--weights={tmp_path}", "--steps=1", *given) == 2
        assert f"out={tmp_path} holds a saved model" in capsys.readouterr().err
    from_pretrained(tmp_path)
