"""Two processes over gloo: they train as one does, and what happens when one of them ends."""

from __future__ import annotations

import json
import multiprocessing
import re
import shutil
import signal
import socket
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from msvq_fast.ops import InputError
from msvq_fast.training.checkpoint import list_checkpoints, read_state, verify
from msvq_fast.training.distributed import World, _settle_buckets, gradient_sync, join, leave, wrap
from tests.training.two_processes import run_two

Train = Callable[..., int]
TrainCommand = Callable[..., list[str]]
ReadMetrics = Callable[[Path], list[dict[str, Any]]]

# Writes the last weights and codebooks, and every collective call with what it carried.
WORKER = """
import json, os, sys, torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from msvq_fast.training import distributed, loop
from msvq_fast.cli import main
torch.set_num_threads(1)
calls, all_reduce, wrap, close = [], dist.all_reduce, distributed.wrap, loop._Run.close
def counted(tensor, *rest, **options):
    calls.append([str(tensor.dtype), tensor.numel()])
    return all_reduce(tensor, *rest, **options)
def counted_bucket(group, bucket):
    calls.append(["gradients", bucket.buffer().numel()])
    return allreduce_hook(group, bucket)
def wrapping(model, world):
    wrapped = wrap(model, world)
    wrapped.register_comm_hook(None, counted_bucket)
    return wrapped
def closing(run):
    torch.save(run.model.state_dict(), sys.argv[1] + ".pt")
    open(sys.argv[1] + ".json", "w").write(json.dumps(calls))
    close(run)
dist.all_reduce, distributed.wrap, loop._Run.close = counted, wrapping, closing
"""
DYING = """
import signal
step = loop._Run._optimizer_step
def dying(run, stream):
    if run.step == 3 and run.world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    step(run, stream)
loop._Run._optimizer_step = dying
"""


# Process 1 is asked to stop; process 0, which saves, takes its time.
STOPPED = """
import signal, time
from msvq_fast.training import checkpoint
save, step = checkpoint.save_checkpoint, loop._Run._optimizer_step
def slow(*args, **options):
    time.sleep(4)
    return save(*args, **options)
def stopped(run, stream):
    if run.step == 1 and run.world.rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    step(run, stream)
def leaving(run):
    print("found", len(checkpoint.list_checkpoints(run.out)), flush=True)
    close(run)
checkpoint.save_checkpoint, loop._Run._optimizer_step = slow, stopped
loop._Run.close = leaving
"""


# Process 1 has no data.
APART = """
sys.argv += ["--data=nowhere"] * int(os.environ["RANK"])
"""


# A disk that fails for one process alone.
BLIND = """
real = dataset._load
def load(path, *rest, **options):
    if path.name == "11.png":
        raise dataset.ImageReadError("Input/output error")
    return real(path, *rest, **options)
dataset._load = load
"""


def losses(records: list[dict[str, Any]]) -> list[float]:
    return [record["loss"] for record in records if record["kind"] == "train"]


# Codes and vectors of two scales: counts, sums, and vectors to restart at.
STATISTICS, WITH_RESTART = 2 * (8 + 8 * 4), 2 * (8 + 2 * 8 * 4)


@pytest.mark.parametrize(
    ("steps", "options", "statistics"),
    [
        (50, (), STATISTICS),
        (6, ("--memory=strips", "--strips=2", "--accumulate=2"), STATISTICS),
        (6, ("--model.restart_below=0.5",), WITH_RESTART),
    ],
    ids=["plain", "strips", "restarts"],
)
def test_two_processes_train_as_one(
    tmp_path: Path,
    train: Train,
    train_command: TrainCommand,
    read_metrics: ReadMetrics,
    steps: int,
    options: tuple[str, ...],
    statistics: int,
) -> None:
    run = (f"--steps={steps}", "--log_every=1", "--validate_every=0", *options)
    done = run_two(tmp_path, train_command(tmp_path / "two", *run, "--batch_size=2"), WORKER)
    assert [code for code, _ in done] == [0, 0], done
    assert done[1][1] == "", "only the first process speaks"
    first, second = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    calls = json.loads((tmp_path / "0.json").read_text())
    # In every step one call for all scales, before the backward ends, and one for the gradients,
    # which so small a model has in one bucket; none for a micro-batch that is not the last.
    kinds = [kind for kind, _ in calls if kind in ("torch.float64", "gradients")]
    assert kinds == ["torch.float64", "gradients"] * steps
    assert {size for kind, size in calls if kind == "torch.float64"} == {statistics}
    assert train(tmp_path / "one", *run) == 0
    two, one = losses(read_metrics(tmp_path / "two")), losses(read_metrics(tmp_path / "one"))
    assert two[0] == pytest.approx(one[0], rel=1e-6)
    if statistics == STATISTICS:  # a lone process restarts codes at other latents
        assert two == pytest.approx(one, rel=1e-3)


def test_images_that_any_process_skips_are_named_once(
    tmp_path: Path, pictures: Path, train_command: TrainCommand
) -> None:
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    broken = sorted((data / "train").iterdir())[::2]
    for path in broken:
        path.write_bytes(b"")
    # An epoch in which each process reads five of the ten.
    run = ("--steps=5", "--validate_every=0", "--batch_size=1", "--repeat=1", f"--data={data}")
    first, second = run_two(tmp_path, train_command(tmp_path / "two", *run), WORKER)
    assert (first[0], second) == (0, (0, ""))
    assert [first[1].count(str(path)) for path in broken] == [1] * 5
    assert "skipped image 5 of 10: " in first[1]


def test_a_process_that_dies_ends_the_other_and_one_goes_on(
    tmp_path: Path,
    train: Train,
    train_command: TrainCommand,
    read_metrics: ReadMetrics,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "two"
    run = ("--steps=5", "--log_every=1", "--validate_every=0", "--checkpoint_every=1")
    command = train_command(out, *run, "--batch_size=2")
    (code, printed), (other, _) = run_two(tmp_path, command, WORKER + DYING)
    assert (code, other) == (1, -signal.SIGKILL)
    last = list_checkpoints(out)[-1]
    verify(last, read_state(last))
    assert read_state(last)["step"] == 3
    assert "Traceback" not in printed
    found = re.fullmatch(
        r"msvq: error: process 0 of 2 cannot reach another one in step 4: (.*); if that one ended, "
        r"its own output says why; the last good checkpoint is (.*); go on with resume=auto",
        printed.splitlines()[-1],
    )
    assert found and "peer" in found[1] and found[2] == str(last)

    before = (out / "metrics.jsonl").read_text()
    assert train(out, *run, "--batch_size=2", "--resume=auto") == 2
    error = capsys.readouterr().err
    assert "processes is 2 there and 1 here; a step had 4 images there and has 2 here" in error
    assert "choose processes x batch_size x accumulate = 4" in error and error.count("\n") == 1
    assert (out / "metrics.jsonl").read_text() == before
    assert train(out, *run, "--resume=auto") == 0  # four images a step again
    printed = capsys.readouterr().out
    assert "processes 2 -> 1, batch_size 2 -> 4, accumulate 1 -> 1: every step has" in printed
    assert train(tmp_path / "one", *run) == 0
    found = losses(read_metrics(out))
    assert len(found) == 5
    assert found == pytest.approx(losses(read_metrics(tmp_path / "one")), rel=1e-3)


def test_a_stopped_process_waits_until_the_first_has_saved(
    tmp_path: Path, train_command: TrainCommand
) -> None:
    command = train_command(tmp_path / "two", "--steps=50", "--validate_every=0", "--batch_size=2")
    first, second = run_two(tmp_path, command, WORKER + STOPPED)
    assert (first[0], second[0]) == (143, 143)
    assert "stopped after step 2, saved" in first[1]
    assert second[1].splitlines()[-1] == "found 1"


def test_a_process_that_cannot_start_ends_the_other(
    tmp_path: Path, train_command: TrainCommand
) -> None:
    command = train_command(tmp_path / "two", "--steps=5", "--batch_size=2")
    first, second = run_two(tmp_path, command, WORKER + APART)
    assert second == (2, "msvq: error: data folder 'nowhere' does not exist\n")
    assert first[0] == 1
    assert re.fullmatch(
        r"msvq: error: process 0 of 2 cannot reach another one: .*peer.*; if that one ended, "
        r"its own output says why\n",
        first[1],
    )
    assert not list_checkpoints(tmp_path / "two")


def test_channels_last_warns_of_nothing(tmp_path: Path, train_command: TrainCommand) -> None:
    options = ("--steps=1", "--batch_size=2", "--channels_last=on")
    first, second = run_two(tmp_path, train_command(tmp_path / "two", *options), WORKER)
    assert first[0] == second[0] == 0
    assert "Warning" not in first[1]
    assert second[1] == ""


@pytest.mark.parametrize("missing", [True, False])
def test_processes_that_cannot_meet(monkeypatch: pytest.MonkeyPatch, missing: bool) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        here = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in here.items():
            monkeypatch.setenv(name, value)
        if missing:
            monkeypatch.delenv("RANK")
        what = "RANK expected, but not set" if missing else "EADDRINUSE"
        said = pytest.raises(InputError, match=f"^WORLD_SIZE=2, but the .*{what}.*torchrun")
        with said, join("cpu"):
            pass


class Backwards(nn.Module):
    """Its gradients come in the order in which its parameters were made."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(50, 50)
        self.first = nn.Linear(50, 50)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x)).square().sum()


def gradients_of_two_steps(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=3)
    torch.manual_seed(rank)
    wrapped, x = wrap(Backwards(), World(rank, 3, torch.device("cpu"))), torch.randn(8, 50)
    found = []
    for _ in range(2):
        wrapped.zero_grad()
        wrapped(x).backward()
        found.append([p.grad for p in wrapped.parameters()])
    torch.save(found, f"{folder}/{rank}.pt")
    leave()


def test_the_first_step_is_summed_as_all_others(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=gradients_of_two_steps, args=(r, tmp_path)) for r in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * 3
    first, second = torch.load(tmp_path / "0.pt", weights_only=True)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)  # or a resumed run would differ from one that never stopped


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ("sys.argv += [f'--data={sys.argv[1][:-1]}other']", "data is 10 images .* and 9 images"),
        ("sys.argv += ['--steps=6']", "steps is 5 in process 0 and 6 in process 1"),
        (
            "from msvq_fast.data import dataset\n" + BLIND,
            "validation is 2 tiles .* 0 unreadable in process 0 and 1 tiles .* 1 unreadable",
        ),
        (
            "sys.argv += [f'--data={sys.argv[1][:-1]}renamed']",
            r"validation is 2 tiles of 2 images \(.* and 2 tiles of 2 images \(",
        ),
    ],
    ids=["data", "options", "disk", "validation"],
)
def test_processes_that_differ_end_all(
    tmp_path: Path, pictures: Path, train_command: TrainCommand, theirs: str, message: str
) -> None:
    shutil.copytree(pictures, tmp_path / "other")
    (tmp_path / "other" / "train" / "3.png").unlink()
    shutil.copytree(pictures, tmp_path / "renamed")
    (tmp_path / "renamed" / "val" / "11.png").rename(tmp_path / "renamed" / "val" / "12.png")
    command = train_command(tmp_path / "two", "--steps=5", "--batch_size=2")
    program = WORKER + f"if os.environ['RANK'] == '1':\n{textwrap.indent(theirs, ' ')}\n"
    first, second = run_two(tmp_path, command, program)
    assert first[0] == second[0] == 2
    assert first[1] == second[1]
    assert re.fullmatch(f"msvq: error: {message}.*; expected the same in all\n", first[1])


def test_the_backward_before_the_first_step_leaves_nothing(tmp_path: Path) -> None:
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(Backwards())
        wrapped.device_ids = [0]  # as on a GPU, where inputs are moved there
        _settle_buckets(wrapped)
    finally:
        leave()
    assert all(p.grad is None for p in wrapped.parameters())
    assert "forward" not in vars(wrapped.module)


@pytest.mark.parametrize("compiled", [False, True])
def test_only_the_last_micro_batch_is_reduced(tmp_path: Path, compiled: bool) -> None:
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain = DistributedDataParallel(torch.nn.Linear(2, 2))
        wrapped = torch.compile(plain, backend="eager") if compiled else plain
        found = []
        for last in (False, True):
            with gradient_sync(wrapped, last):
                found.append(plain.require_backward_grad_sync)
    finally:
        leave()
    assert found == [False, True]


def test_a_process_group_leaves_other_tests_the_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    leave()
    x = torch.zeros(2)
    torch.compile(lambda: x + 1, backend="eager")()
    monkeypatch.undo()  # torch.empty_like is PyTorch's own again
    compiled = torch.compile(lambda: torch.empty_like(x).fill_(3), fullgraph=True, backend="eager")
    assert torch.equal(compiled(), x + 3)
