from __future__ import annotations

import errno
import json
import os
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from msvq_fast.models import from_preset, from_pretrained
from msvq_fast.ops import InputError
from msvq_fast.training import loop
from msvq_fast.training.checkpoint import (
    checkpoint_path,
    find_model,
    list_checkpoints,
    prune_checkpoints,
    read_state,
    save_checkpoint,
)
from msvq_fast.training.progress import MetricsFile

Train = Callable[..., int]
ReadMetrics = Callable[[Path], list[dict[str, Any]]]

# Kill the process without a chance to clean up: in step 9, the fourth of the second epoch and the
# first after an unlogged one, or while the checkpoint of step 9 is half written.
KILL_IN_STEP = """
from msvq_fast.training import loop
step = loop._Run._optimizer_step
def killed(self, stream):
    if self.step == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    step(self, stream)
loop._Run._optimizer_step = killed
"""
KILL_IN_SAVE = """
import torch
save = torch.save
def killed(content, path):
    save(content, path)
    if "00000009" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = killed
"""
SETTINGS = ("--steps=13", "--checkpoint_every=3", "--keep_last=3")


def weights(out: Path, step: int) -> dict[str, torch.Tensor]:
    # Copies: load_file maps the file, which a test may damage later.
    loaded = load_file(checkpoint_path(out, step) / "model.safetensors")
    return {name: tensor.clone() for name, tensor in loaded.items()}


def assert_same_run(a: Path, b: Path, step: int, read_metrics: ReadMetrics) -> None:
    assert read_metrics(a) == read_metrics(b)
    ours, theirs = weights(a, step), weights(b, step)
    assert ours.keys() == theirs.keys()
    assert any("codebook" in name for name in ours)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    adam = [
        torch.load(checkpoint_path(out, step) / "optimizer.pt", weights_only=True)["optimizer"]
        for out in (a, b)
    ]
    for mine, other in zip(*(state["state"].values() for state in adam), strict=True):
        assert all(torch.equal(mine[key], other[key]) for key in mine)


@pytest.mark.parametrize("kill", [KILL_IN_STEP, KILL_IN_SAVE], ids=["step", "save"])
def test_a_killed_run_goes_on_bit_for_bit(
    kill: str,
    tmp_path: Path,
    train: Train,
    train_command: Callable[..., list[str]],
    read_metrics: ReadMetrics,
) -> None:
    assert train(tmp_path / "whole", *SETTINGS) == 0
    command = train_command(tmp_path / "killed", *SETTINGS)
    threads = f"import os, signal, torch\ntorch.set_num_threads({torch.get_num_threads()})"
    program = f"{threads}{kill}\nfrom msvq_fast.cli import main\nmain({command!r})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    left = [path.name for path in list_checkpoints(tmp_path / "killed")]
    assert left[-1] == ("step_00000009" if kill == KILL_IN_STEP else "step_00000006")
    assert train(tmp_path / "killed", *SETTINGS, "--resume=auto") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "killed", 13, read_metrics)
    names = {path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()}
    assert all(name.startswith("step_") for name in names), "half a checkpoint was left behind"


@pytest.fixture
def run(tmp_path: Path, train: Train) -> Path:
    """Four steps with a checkpoint after each, the last two of them kept."""
    out = tmp_path / "run"
    assert train(out, "--steps=4", "--checkpoint_every=1", "--validate_every=0") == 0
    return out


def test_reports_and_places_may_change_on_resume(
    run: Path, tmp_path: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--steps=6", "--log_every=1", "--workers=1", "--validate_every=0")
    assert train(tmp_path / "elsewhere", f"--resume={run}", *options) == 0
    assert "going on after step 4" in capsys.readouterr().out
    assert read_state(list_checkpoints(tmp_path / "elsewhere")[-1])["step"] == 6


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--batch_size=2", "batch_size is 4 there and 2 here"),
        ("--seed=1", "seed is 0 there and 1 here"),
        ("--model.num_codes=16", "num_codes is 8 there and 16 here"),
        ("--preset=vqvae2-tiny", "model_class is MSVQVAE there and VQVAE2 here"),
    ],
)
def test_another_configuration_cannot_go_on(
    run: Path, train: Train, capsys: pytest.CaptureFixture[str], option: str, message: str
) -> None:
    before = (run / "config.json").read_text()
    assert train(run, "--steps=6", "--resume=auto", option) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert (run / "config.json").read_text() == before


def test_a_default_and_its_number_are_the_same_run(
    run: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--steps=6", "--resume=auto", "--betas=[0.5,0.9]")
    assert train(run, *options, "--lr=0.002") == 2
    assert "lr is 0.001 there and 0.002 here" in capsys.readouterr().err
    assert train(run, *options, "--lr=0.001") == 0


def test_a_second_run_does_not_overwrite_the_first(
    run: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (run / "metrics.jsonl").read_text()
    assert train(run, "--steps=4") == 2
    assert "already holds a run; go on with resume=auto" in capsys.readouterr().err
    older = list_checkpoints(run)[0]
    assert train(run, "--steps=6", f"--resume={older}") == 2
    assert "would overwrite" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_text() == lines


def test_a_run_before_its_first_checkpoint_is_not_overwritten(
    tmp_path: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    first = MetricsFile(tmp_path, step=0, tensorboard=False)
    first.write({"kind": "train", "step": 1})
    for options in ((), ("--resume=auto",)):
        assert train(tmp_path, "--steps=3", *options) == 2
        named = f"{tmp_path / 'metrics.jsonl'} is being written by another run; choose another out"
        assert capsys.readouterr().err == f"msvq: error: {named}\n"
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 1
    assert not (tmp_path / "config.json").exists()
    first.close()
    assert train(tmp_path, "--steps=3", "--resume=auto") == 0


def test_what_a_power_cut_leaves_in_the_metrics_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = b'{"kind": "train", "step": 1}\n', b'{"kind": "train", "step": 2}\n'
    path.write_bytes(good[0] + b"\xff\xfe\x00\n" + good[1] + bytes(9))
    MetricsFile(tmp_path, step=2, tensorboard=False).close()
    assert path.read_bytes() == b"".join(good)


def test_the_best_is_that_of_the_same_tiles(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = iter([20.0, 19.0, 10.0, 9.0])  # in dB, after every epoch of five steps
    monkeypatch.setattr(loop, "validate", lambda *a, **o: ([0.1], [next(figures)]))
    for steps, tiles, best in ((10, 2, 5), (15, 1, 15), (20, 1, 15)):
        options = (f"--steps={steps}", f"--validation_tiles={tiles}", "--resume=auto")
        assert train(tmp_path, *options) == 0
        assert read_state(list_checkpoints(tmp_path)[-1])["best"]["step"] == best
        assert find_model(tmp_path) == checkpoint_path(tmp_path, best)


def test_a_finished_run_says_that_nothing_is_left(
    run: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    newest, lines = list_checkpoints(run)[-1], (run / "metrics.jsonl").read_text()
    assert train(run, "--steps=4", f"--resume={newest}", "--validate_every=0") == 2
    assert "step 4 of 4: nothing is left to train" in capsys.readouterr().err
    # A command that is started again and again should end well once its work is done.
    assert train(run, "--steps=4", "--resume=auto", "--validate_every=0") == 0
    assert "going on after step 4; nothing is left to train" in capsys.readouterr().out
    assert (run / "metrics.jsonl").read_text() == lines


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("model.safetensors", truncate, "bytes, written were"),
        ("model.safetensors", flip_a_bit, "checksum does not match"),
        ("optimizer.pt", truncate, "bytes, written were"),
        ("optimizer.pt", Path.unlink, "is missing"),
        ("state.json", truncate, "is corrupt"),
        ("state.json", Path.unlink, "is missing"),
    ],
)
def test_a_corrupt_checkpoint_is_named_and_auto_takes_the_one_before(
    run: Path,
    train: Train,
    capsys: pytest.CaptureFixture[str],
    name: str,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    good, newest = list_checkpoints(run)
    expected = weights(run, 4)
    damage(newest / name)
    assert train(run, "--steps=6", f"--resume={newest}") == 2
    error = capsys.readouterr().err
    assert str(newest / name) in error and message in error and error.count("\n") == 1

    options = ("--steps=4", "--checkpoint_every=1", "--validate_every=0", "--resume=auto")
    assert train(run, *options) == 0
    printed = capsys.readouterr().out
    assert "warning: " in printed and "going on after step 3" in printed
    assert all(torch.equal(t, expected[n]) for n, t in weights(run, 4).items())
    assert good.is_dir() and newest.with_name(f"{newest.name}.corrupt").is_dir()
    damage(newest / name)  # a bad disk does it again
    assert train(run, *options) == 0
    assert "going on after step 3" in capsys.readouterr().out


def test_auto_does_not_start_anew_where_every_checkpoint_is_corrupt(
    run: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    before, lines = list_checkpoints(run), (run / "metrics.jsonl").read_text()
    for path in before:
        truncate(path / "model.safetensors")
    for _ in range(2):  # as a scheduler that starts it again would
        assert train(run, "--steps=6", "--validate_every=0", "--resume=auto") == 2
        error = capsys.readouterr().err
        assert f"no checkpoint of {run} can be used: {before[-1]}" in error
    assert list_checkpoints(run) == before
    assert (run / "metrics.jsonl").read_text() == lines


def test_a_full_disk_leaves_the_older_checkpoints(
    tmp_path: Path,
    train: Train,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train(tmp_path, "--steps=1") == 0
    grows = {"optimizer.pt": 0, "model.safetensors": 0}
    for name in grows:
        grows[name] = (checkpoint_path(tmp_path, 1) / name).stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The kernel refuses what is beyond the limit, as it does on a full disk.
    for size in (min(grows.values()) // 2, max(grows.values()) - 5000, max(grows.values()) - 50):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            assert train(tmp_path, "--steps=2", "--resume=auto") == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        error = capsys.readouterr().err
        assert "step_00000002: " in error and "File too large" in error and error.count("\n") == 1
        assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    from_pretrained(find_model(tmp_path))


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    named: list[set[int]] = []
    fsync, rename = os.fsync, Path.rename

    def note_sync(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def note_name(path: Path, target: Path) -> Path:
        named.append(set(synced))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "rename", note_name)
    folder = save_checkpoint(
        tmp_path, model=from_preset("tiny"), optimizer={}, state={"step": 1, "config": {}}
    )
    assert {path.stat().st_ino for path in (folder, *folder.iterdir())} <= named[-1]
    assert synced[-1] == folder.parent.stat().st_ino


def test_a_disk_that_loses_a_file_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == of_folders:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    parts: dict[str, Any] = {"model": from_preset("tiny"), "optimizer": {}, "state": {"step": 1}}
    of_folders, number = False, errno.EIO
    with pytest.raises(OSError, match=r"cannot write checkpoint .*step_00000001: Input/output"):
        save_checkpoint(tmp_path, **parts)
    assert list((tmp_path / "checkpoints").iterdir()) == []
    for of_folders in (False, True):  # some file systems cannot
        number, parts["state"] = errno.EINVAL, {"step": 2 + of_folders}
        assert save_checkpoint(tmp_path, **parts) == checkpoint_path(tmp_path, 2 + of_folders)


def test_metrics_that_cannot_be_written_are_named(
    tmp_path: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path, "--steps=1", "--log_every=1") == 0
    metrics = tmp_path / "metrics.jsonl"
    # Longer than config.json, which is written first.
    copies = 1 + (tmp_path / "config.json").stat().st_size // metrics.stat().st_size
    metrics.write_text(metrics.read_text() * copies)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (metrics.stat().st_size + 10, before[1]))
    try:
        assert train(tmp_path, "--steps=2", "--log_every=1", "--resume=auto") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert capsys.readouterr().err == f"msvq: error: cannot write {metrics}: File too large\n"


def test_a_full_disk_on_resume_names_the_metrics_and_keeps_them(
    run: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = run / "metrics.jsonl"
    content, names = metrics.read_text(), sorted(path.name for path in run.iterdir())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) // 2, before[1]))
    try:
        assert train(run, "--steps=6", "--validate_every=0", "--resume=auto") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert capsys.readouterr().err == f"msvq: error: cannot write {metrics}: File too large\n"
    assert metrics.read_text() == content
    assert sorted(path.name for path in run.iterdir()) == names


def test_find_model_takes_runs_checkpoints_and_saved_models(run: Path, tmp_path: Path) -> None:
    older, newest = list_checkpoints(run)
    assert find_model(run) == newest
    assert find_model(older) == older
    state = read_state(newest)
    state["best"] = {"step": 3, "psnr": 20.0}
    (newest / "state.json").write_text(json.dumps(state))
    assert find_model(run) == older
    from_preset("tiny").save_pretrained(tmp_path / "saved")
    assert find_model(tmp_path / "saved") == tmp_path / "saved"


def test_find_model_says_what_is_wrong(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        find_model(tmp_path / "nothing")
    with pytest.raises(InputError, match="no checkpoint and no saved model"):
        find_model(run / "checkpoints")
    truncate(list_checkpoints(run)[-1] / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.safetensors is corrupt"):
        find_model(run)


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        checkpoint_path(tmp_path, step).mkdir(parents=True)
    prune_checkpoints(tmp_path, keep_last=1, best_step=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000002", "step_00000004"]


def test_the_newest_is_that_of_most_steps(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        checkpoint_path(tmp_path, step).mkdir(parents=True)
    prune_checkpoints(tmp_path, keep_last=1, best_step=None)
    assert list_checkpoints(tmp_path) == [checkpoint_path(tmp_path, 100_000_000)]
