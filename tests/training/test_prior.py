from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from msvq_fast import priors
from msvq_fast.cli import main
from msvq_fast.training import prior as training
from msvq_fast.training.checkpoint import checkpoint_path, find_model, list_checkpoints
from msvq_fast.training.tokens import load_tokens, write_index, write_shard

GRIDS, NUM_CODES = [(2, 2), (4, 4)], 5
SMALL = ["--depth=1", "--heads=2", "--width=16", "--device=cpu", "--batch_size=4", "--log_every=2"]


def write_tokens(folder: Path, codes: list[torch.Tensor], **settings: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    names = [str(i) for i in range(len(codes[0]))]
    half = len(names) // 2
    shards = [
        write_shard(folder, 0, names[:half], [c[:half] for c in codes]),
        write_shard(folder, 1, names[half:], [c[half:] for c in codes]),
    ]
    index = {
        "num_codes": NUM_CODES,
        "grids": GRIDS,
        "files": 1,
        "files_done": 1,
        "complete": True,
        "shards": shards,
        "settings": {"weights_sha256": "a", "size": 16, **settings},
    }
    write_index(folder, index)
    return folder


def stripes(count: int, seed: int) -> list[torch.Tensor]:
    """Codes that a prior can learn: constant along rows of scale 0, its code doubled on scale 1."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(NUM_CODES, (count, 2, 1), generator=generator).expand(-1, -1, 2)
    fine = rows.repeat_interleave(2, 1).repeat_interleave(2, 2)
    return [rows.contiguous(), (2 * fine) % NUM_CODES]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("tokens")
    train = write_tokens(root / "train", stripes(22, 0))
    return [f"--tokens={train}", f"--validation={write_tokens(root / 'val', stripes(6, 1))}"]


def train(tokens: list[str], out: Path, *options: str) -> int:
    return main(["train-prior", *tokens, f"--out={out}", *SMALL, *options])


def records(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    clock = ("total_steps", "steps_per_second", "images_per_second", "eta_seconds")
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


KINDS = [(kind, how) for kind in ("autoregressive", "maskgit") for how in ("dense", "windowed")]


def test_settings_reach_the_optimiser(
    tokens: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms: list[float] = []

    class Spied(torch.optim.AdamW):
        def step(self) -> None:
            (group,) = self.param_groups
            given.update({name: group[name] for name in ("lr", "betas", "weight_decay")})
            norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in group["params"]])))
            super().step()

    given: dict[str, Any] = {}
    monkeypatch.setattr(torch.optim, "AdamW", Spied)
    options = ["--lr=0.5", "--betas=[0.8,0.7]", "--weight_decay=0.2", "--grad_clip=0.125"]
    assert train(tokens, tmp_path, "--steps=1", "--warmup_epochs=0", *options) == 0
    assert given == {"lr": 0.5, "betas": (0.8, 0.7), "weight_decay": 0.2}
    assert norms == pytest.approx([0.125], rel=1e-4)


def test_the_best_is_that_of_the_same_validation(
    tokens: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = iter([[1.0, 1.0], [2.0, 2.0], [8.0, 8.0], [9.0, 9.0]])  # after every step
    monkeypatch.setattr(training, "validate_prior", lambda *a, **o: next(figures))
    for steps, images, best in ((2, 6, 1), (3, 2, 3), (4, 2, 3)):
        options = (f"--steps={steps}", f"--validation_images={images}", "--resume=auto")
        assert train(tokens, tmp_path, *options, "--batch_size=22") == 0
        assert find_model(tmp_path) == checkpoint_path(tmp_path, best)


def test_auto_and_what_it_stands_for_are_one_precision(
    tokens: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So what began on a CPU keeps its precision on a GPU."""
    assert train(tokens, tmp_path, "--steps=1") == 0
    assert train(tokens, tmp_path, "--steps=2", "--resume=auto", "--precision=bf16") == 2
    assert "precision is auto there and bf16 here" in capsys.readouterr().err
    assert train(tokens, tmp_path, "--steps=2", "--resume=auto", "--precision=fp32") == 0


def test_a_run_in_another_folder_finds_a_best_of_its_own(
    tokens: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    figures = iter([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])  # after every step
    monkeypatch.setattr(training, "validate_prior", lambda *a, **o: next(figures))
    first, second = tmp_path / "first", tmp_path / "second"
    options = ("--batch_size=22", "--keep_last=1")
    assert train(tokens, first, "--steps=1", *options) == 0
    on = (f"--resume={first}", "--backend=reference")
    assert train(tokens, second, "--steps=3", *on, *options) == 0
    assert find_model(second) == checkpoint_path(second, 2)
    assert "warning: backend None -> reference: what is trained" in capsys.readouterr().out


@pytest.mark.parametrize(("kind", "attention"), KINDS)
def test_it_learns_what_can_be_learnt(
    tokens: list[str], tmp_path: Path, kind: str, attention: str
) -> None:
    settings = (f"--kind={kind}", f"--attention={attention}", "--dropout=0", "--lr=1e-2")
    assert train(tokens, tmp_path, *settings, "--steps=60", "--validate_every=4") == 0
    found = records(tmp_path)
    validation = [r for r in found if r["kind"] == "validation"]
    assert validation[0]["step"] == 20 and validation[-1]["step"] == 60
    chance = math.log(NUM_CODES)
    coarse, fine = validation[-1]["nll"]
    assert validation[-1]["nats_per_image"] < 0.8 * 20 * chance
    if kind == "autoregressive":
        assert coarse < 0.95 * chance and fine < 0.3 * chance
    assert validation[-1]["nats_per_image"] == pytest.approx(4 * coarse + 16 * fine)
    best = min(validation, key=lambda record: record["nats_per_image"])["step"]
    assert find_model(tmp_path) == checkpoint_path(tmp_path, best)
    model = priors.from_pretrained(find_model(tmp_path))
    assert model.config.kernels == (None if attention == "dense" else (3, 5))
    assert type(model).__name__ == {"maskgit": "MaskGITPrior"}.get(kind, "AutoregressivePrior")


def test_validation_is_the_exact_likelihood(tokens: list[str], tmp_path: Path) -> None:
    assert train(tokens, tmp_path, "--kind=autoregressive", "--steps=2") == 0
    model = priors.from_pretrained(find_model(tmp_path)).eval()
    held_out = load_tokens(tokens[1].partition("=")[2])
    codes = held_out.batch(torch.arange(6))
    assert isinstance(model, priors.AutoregressivePrior)
    for m, logits in enumerate(model.logits(codes)):
        own = logits.detach().double().log_softmax(-1).gather(-1, codes[m].flatten(1)[..., None])
        assert records(tmp_path)[-1]["nll"][m] == pytest.approx(-own.mean().item(), rel=1e-5)
    picked = training.validate_prior(model, held_out, batch_size=4, limit=2)
    expected = model([c[[0, 3]] for c in codes]).nll.tolist()  # spread over all images
    assert picked == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("kind", "attention"), KINDS)
def test_resumed_is_uninterrupted(
    tokens: list[str], tmp_path: Path, kind: str, attention: str
) -> None:
    settings = (f"--kind={kind}", f"--attention={attention}", "--checkpoint_every=3")
    schedule = ("--warmup_epochs=0", "--min_lr_fraction=1", "--log_every=5")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(tokens, whole, *settings, *schedule, "--steps=12") == 0
    assert train(tokens, parts, *settings, *schedule, "--steps=7") == 0
    shutil.rmtree(checkpoint_path(parts, 7))  # as killed after step 6, between two log lines
    assert [p.name for p in list_checkpoints(parts)][-1] == "step_00000006"
    assert train(tokens, parts, *settings, *schedule, "--steps=12", "--resume=auto") == 0
    ours, theirs = (load_file(checkpoint_path(p, 12) / "model.safetensors") for p in (parts, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [r for r in records(parts) if r["kind"] == "train"] == [
        r for r in records(whole) if r["kind"] == "train"
    ]


def test_a_signal_saves_and_stops(
    tokens: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = training._Run._optimizer_step

    def interrupted(run: Any, rows: torch.Tensor) -> None:
        step(run, rows)
        if run.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(training._Run, "_optimizer_step", interrupted)
    assert train(tokens, tmp_path, "--steps=9") == 128 + signal.SIGTERM
    assert list_checkpoints(tmp_path)[-1].name == "step_00000003"


def test_a_bad_loss_stops(
    tokens: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("--lr=1e37", "--warmup_epochs=0", "--grad_clip=0", "--weight_decay=0")
    assert train(tokens, tmp_path, "--steps=9", "--checkpoint_every=1", *settings) == 1
    error = capsys.readouterr().err
    assert "is not finite" in error and "try a lower lr" in error and error.count("\n") == 1


def test_a_bad_loss_is_named_and_the_run_goes_on_with_another_rate(
    tokens: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ("--steps=9", "--log_every=5", "--checkpoint_every=2", "--validate_every=0")
    step = training._Run._optimizer_step

    def spoiled(run: Any, rows: torch.Tensor) -> None:
        if run.step == 2:
            run.prior.scales[1].head.weight.data.fill_(math.nan)
        step(run, rows)

    with monkeypatch.context() as patch:
        patch.setattr(training._Run, "_optimizer_step", spoiled)
        assert train(tokens, tmp_path, *options) == 1
    last = checkpoint_path(tmp_path, 2)
    error = capsys.readouterr().err
    assert "the loss is not finite at step 3: NLL of scale 1; " in error
    assert error.endswith(f"try a lower lr with resume={last}\n")
    other = ("--betas=[0.8,0.9]", "--weight_decay=0")
    assert train(tokens, tmp_path, *options, *other, "--resume=auto") == 2
    assert train(tokens, tmp_path, *options, *other, f"--resume={last}") == 0
    assert "weight_decay 0.03 -> 0.0: from here" in capsys.readouterr().out
    saved = torch.load(checkpoint_path(tmp_path, 9) / "optimizer.pt", weights_only=True)
    group = saved["optimizer"]["param_groups"][0]
    assert tuple(group["betas"]) == (0.8, 0.9) and group["weight_decay"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch_size=50"], "has 22 images, too few for one step of batch_size=50"),
        (["--tokens=nowhere"], "nowhere/tokens.json does not exist; expected a folder of msvq"),
        (["--validation=nowhere"], "nowhere/tokens.json does not exist"),
        (["--lr=0"], "lr=0.0; expected a positive finite number"),
        (["--warmup_epochs=.inf"], "warmup_epochs=inf; expected a finite number"),
        (["--dropout=1"], "dropout=1.0; expected 0 <= dropout < 1"),
        (["--heads=3"], "width=16; expected a multiple of heads=3"),
        (["--kernels=[3]"], "expected 2 odd windows"),
        (["--kernels=[3,5]", "--attention=dense"], "they are of attention=windowed"),
        (["--label_smoothing=2"], "label_smoothing=2.0; expected 0 to 1"),
        (["--betas=[0.9,1]"], "expected two numbers in [0, 1)"),
        (["--steps=0"], "steps=0; expected at least 1"),
        (["--device=tpu"], "device='tpu'"),
        (["--resume=nowhere"], "resume=nowhere does not exist"),
    ],
)
def test_settings_that_cannot_work(
    tokens: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    assert train(tokens, tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_tokens_of_another_model_are_refused(
    tokens: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_tokens(tmp_path / "other", stripes(22, 2))
    foreign = write_tokens(tmp_path / "foreign", stripes(6, 2), weights_sha256="b")
    assert train([tokens[0], f"--validation={foreign}"], tmp_path / "out") == 2
    assert "has weights_sha256 b; the tokens have a" in capsys.readouterr().err
    assert train(tokens, tmp_path / "out", "--steps=2") == 0
    assert train([f"--tokens={other}"], tmp_path / "out", "--steps=4", "--resume=auto") == 2
    assert "tokens_sha256 is" in capsys.readouterr().err
    assert train(tokens, tmp_path / "out", "--steps=4", "--width=32", "--resume=auto") == 2
    assert "width is 16 there and 32 here" in capsys.readouterr().err
    assert train(tokens, tmp_path / "out", "--steps=4") == 2
    assert "already holds a run" in capsys.readouterr().err
