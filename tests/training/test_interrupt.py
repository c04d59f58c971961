"""Signals, launchers that are killed and readers that leave: a run saves before it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from msvq_fast.training import loop
from msvq_fast.training.checkpoint import checkpoint_path, list_checkpoints, read_state
from msvq_fast.training.interrupt import StopSignals

Train = Callable[..., int]
ReadMetrics = Callable[[Path], list[dict[str, Any]]]


@pytest.fixture(autouse=True)
def _hang_ups_count() -> Iterator[None]:
    """Under nohup they are ignored, by what is tested too."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def weights(out: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(checkpoint_path(out, step) / "model.safetensors")


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGUSR1, 138)],
)
def test_a_signal_saves_and_the_run_can_go_on(
    tmp_path: Path,
    train: Train,
    read_metrics: ReadMetrics,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    code: int,
) -> None:
    assert train(tmp_path / "whole", "--steps=8") == 0
    before, step = signal.getsignal(number), loop._Run._optimizer_step

    def interrupted(run: Any, stream: Any) -> None:
        if run.step == 2:
            os.kill(os.getpid(), number)
        step(run, stream)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "_optimizer_step", interrupted)
        assert train(tmp_path / "stopped", "--steps=8") == code
    assert [read_state(p)["step"] for p in list_checkpoints(tmp_path / "stopped")] == [3]
    assert signal.getsignal(number) is before
    assert train(tmp_path / "stopped", "--steps=8", "--resume=auto") == 0
    assert read_metrics(tmp_path / "stopped") == read_metrics(tmp_path / "whole")
    expected = weights(tmp_path / "whole", 8)
    assert all(torch.equal(t, expected[n]) for n, t in weights(tmp_path / "stopped", 8).items())


def test_a_second_signal_is_not_held_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_in_a_thread_of_a_server_leaves_signals_alone(tmp_path: Path, train: Train) -> None:
    before = signal.getsignal(signal.SIGINT)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(train, tmp_path, "--steps=2").result() == 0
    assert signal.getsignal(signal.SIGINT) is before
    assert [read_state(p)["step"] for p in list_checkpoints(tmp_path)] == [2]


def test_a_hangup_that_nohup_ignores_stops_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received == 0
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received == signal.SIGTERM
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# The second signal comes while the first one's step is saved; the third one when people wait.
PASSED_ON = """
import os, signal, threading
from msvq_fast.training.interrupt import StopSignals
with StopSignals() as signals:
    again = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    again.start()
    os.kill(os.getpid(), signal.SIGTERM)
    again.join()
    print("saved", signals.received, flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("not stopped")
"""


def test_a_signal_that_a_launcher_passes_on_is_the_same_request() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", PASSED_ON]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == f"saved {int(signal.SIGTERM)}\n"
    assert done.returncode == -signal.SIGINT


# The first process is the launcher; it ends without a word to the second.
ABANDONED = """
import os, subprocess, sys, time
if len(sys.argv) == 1:
    child = subprocess.Popen([sys.executable, __file__, "child"], stdout=subprocess.PIPE)
    child.stdout.readline()
    os._exit(0)
from msvq_fast.training.interrupt import StopSignals
with StopSignals() as signals:
    assert signals.received == 0
    print("started", flush=True)
    for _ in range(600):
        time.sleep(0.1)
        if signals.received:
            break
    sys.stderr.write(f"received {signals.received}")
"""


@pytest.mark.parametrize("launched", [True, False], ids=["torchrun", "nohup"])
def test_a_launcher_that_is_killed_stops_its_processes(tmp_path: Path, launched: bool) -> None:
    program = tmp_path / "program.py"
    program.write_text(ABANDONED if launched else ABANDONED.replace("600", "20"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TORCHELASTIC_RUN_ID", None)
    if launched:
        environment["TORCHELASTIC_RUN_ID"] = "none"
    command = [sys.executable, str(program)]
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.stderr.endswith(f"received {int(signal.SIGHUP) if launched else 0}")


@pytest.mark.parametrize("reader", [True, False], ids=["tee", "full disk"])
def test_output_that_ends_costs_no_step(
    tmp_path: Path,
    train: Train,
    train_command: Callable[..., list[str]],
    reader: bool,
) -> None:
    """Ctrl-C ends tee as well."""
    options = ("--steps=9", "--log_every=1", "--validate_every=0")
    command = [sys.executable, "-m", "msvq_fast", *train_command(tmp_path, *options)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    if reader:
        read, write = os.pipe()
        os.close(read)
    else:
        write = os.open("/dev/full", os.O_WRONLY)
    done = subprocess.run(command, env=environment, stdout=write, stderr=write, timeout=120)
    os.close(write)
    assert done.returncode == 141
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000001"]
    assert train(tmp_path, *options, "--resume=auto") == 0
