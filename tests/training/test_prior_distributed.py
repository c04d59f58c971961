"""Two processes over gloo learn a prior as one does."""

from __future__ import annotations

import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from msvq_fast.cli import main
from msvq_fast.priors import MaskGITPrior, PriorConfig
from msvq_fast.training.checkpoint import checkpoint_path, list_checkpoints
from msvq_fast.training.distributed import World
from msvq_fast.training.prior import validate_prior
from msvq_fast.training.tokens import load_tokens
from tests.training.test_prior import records, stripes, write_tokens
from tests.training.two_processes import run_two

WORKER = """
import os, signal, sys, torch
from msvq_fast.cli import main
from msvq_fast.training import prior
torch.set_num_threads(1)
close = prior._Run.close
def closing(run):
    torch.save(run.prior.state_dict(), sys.argv[1] + ".pt")
    close(run)
prior._Run.close = closing
"""
DYING = """
step = prior._Run._optimizer_step
def dying(run, rows):
    if run.step == 3 and run.world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    step(run, rows)
prior._Run._optimizer_step = dying
"""


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("tokens")
    train = write_tokens(root / "train", stripes(22, 0))
    return [f"--tokens={train}", f"--validation={write_tokens(root / 'val', stripes(7, 1))}"]


def command(tokens: list[str], out: Path, *options: str) -> list[str]:
    sizes = ["--depth=1", "--heads=2", "--width=16", "--device=cpu", "--log_every=1"]
    rates = ["--lr=1e-2", "--warmup_epochs=0", "--min_lr_fraction=1"]
    return ["train-prior", *tokens, f"--out={out}", *sizes, *rates, *options]


def train_records(out: Path) -> list[dict[str, Any]]:
    return [record for record in records(out) if record["kind"] == "train"]


def test_two_processes_learn_as_one(tokens: list[str], tmp_path: Path) -> None:
    run = ("--kind=autoregressive", "--dropout=0", "--steps=12")
    done = run_two(tmp_path, command(tokens, tmp_path / "two", *run, "--batch_size=2"), WORKER)
    assert [code for code, _ in done] == [0, 0], done
    assert done[1][1] == "", "only the first process speaks"
    first, second = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert main(command(tokens, tmp_path / "one", *run, "--batch_size=4")) == 0
    two, one = records(tmp_path / "two"), records(tmp_path / "one")
    assert [r["kind"] for r in two] == [r["kind"] for r in one] and len(two) == 15
    for ours, theirs in zip(two, one, strict=True):
        assert ours["nll"] == pytest.approx(theirs["nll"], rel=1e-4)


def test_resumed_is_uninterrupted(tokens: list[str], tmp_path: Path) -> None:
    run = ("--kind=maskgit", "--batch_size=2", "--log_every=5", "--checkpoint_every=3")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for out, *options in (
        (whole, "--steps=9"),
        (parts, "--steps=7"),
        (parts, "--steps=9", "--resume=auto"),
    ):
        if "--resume=auto" in options:
            shutil.rmtree(checkpoint_path(parts, 7))  # as killed after step 6, between log lines
        done = run_two(tmp_path, command(tokens, out, *run, *options), WORKER)
        assert [code for code, _ in done] == [0, 0], done
    ours, theirs = (load_file(checkpoint_path(p, 9) / "model.safetensors") for p in (parts, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert train_records(parts) == train_records(whole)


def test_a_process_that_dies_ends_the_other(
    tokens: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "two"
    run = command(tokens, out, "--steps=5", "--batch_size=2", "--checkpoint_every=1")
    (code, printed), (other, _) = run_two(tmp_path, run, WORKER + DYING)
    assert (code, other) == (1, -signal.SIGKILL)
    last = list_checkpoints(out)[-1]
    assert last.name == "step_00000003"
    assert re.fullmatch(
        r"msvq: error: process 0 of 2 cannot reach another one in step 4: .*; the last good "
        rf"checkpoint is {re.escape(str(last))}; go on with resume=auto",
        printed.splitlines()[-1],
    )
    assert main([*run, "--resume=auto"]) == 2
    assert "processes is 2 there and 1 here" in capsys.readouterr().err


@pytest.mark.parametrize("rank", [0, 1])
def test_a_validation_of_one_process_alone_ends_both(
    tokens: list[str], tmp_path: Path, rank: int
) -> None:
    theirs = f"if os.environ['RANK'] == '{rank}': sys.argv.append('--validation=null')\n"
    run = command(tokens, tmp_path / "two", "--steps=1", "--batch_size=2")
    found = [r"7 images \(codes \w+\)"] * 2
    found[rank] = "None"
    said = f"msvq: error: validation is {found[0]} in process 0 and {found[1]} in process 1; .*\n"
    for code, printed in run_two(tmp_path, run, WORKER + theirs):
        assert code == 2
        assert re.fullmatch(said, printed)


def test_masks_of_a_validation_are_the_same_for_any_number_of_processes(
    tokens: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = load_tokens(tokens[1].partition("=")[2])
    sizes = {"num_codes": held_out.num_codes, "depth": 1, "heads": 2, "width": 16}
    prior = MaskGITPrior(PriorConfig(held_out.grids, **sizes))
    alone = validate_prior(prior, held_out, batch_size=2, limit=7)
    shares = []
    monkeypatch.setattr("torch.distributed.all_reduce", lambda total, op: shares.append(total))
    for rank in range(3):
        world = World(rank, 3, torch.device("cpu"))
        validate_prior(prior, held_out, batch_size=2, limit=7, world=world)
    assert (torch.stack(shares).sum(0) / 7).tolist() == pytest.approx(alone, rel=1e-12)
    assert len({float(share.sum()) for share in shares}) == 3
