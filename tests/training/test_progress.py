from __future__ import annotations

import io
import json
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from msvq_fast.cli import main
from msvq_fast.training.progress import (
    PRIOR_COLUMNS,
    LiveDisplay,
    MetricsFile,
    counting,
    only_writer,
    open_display,
)
from tests.training.test_sample import folders

__all__ = ["folders"]  # a fixture


def test_every_number_is_a_scalar_of_its_kind_scale_and_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            calls.append((folder, purge_step))

        def add_scalar(self, *scalar: object) -> None:
            calls.append(scalar)

        def close(self) -> None:
            calls.append("closed")

    module = SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    metrics = MetricsFile(tmp_path, step=4, tensorboard=True)
    record = {"kind": "train", "step": 7, "loss": 0.5, "usage": [50.0, 100.0], "note": "none"}
    metrics.write(record)
    metrics.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == record
    assert calls == [
        (str(tmp_path / "tensorboard"), 5),
        ("train/loss", 0.5, 7),
        ("train/usage/0", 50.0, 7),
        ("train/usage/1", 100.0, 7),
        "closed",
    ]


def test_events_that_cannot_be_written_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            pass

        def fail(self, *_: object) -> None:
            raise OSError(28, "No space left on device")

        add_scalar = close = fail

    module = SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    metrics = MetricsFile(tmp_path, step=0, tensorboard=True)
    expected = f"cannot write {tmp_path / 'tensorboard'}: No space left on device"
    with pytest.raises(OSError, match=expected):
        metrics.write({"kind": "train", "step": 1, "loss": 0.5})
    with pytest.raises(OSError, match=expected):
        metrics.close()


def test_every_line_is_json_whatever_is_measured(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path, step=0, tensorboard=False)
    metrics.write({"kind": "validation", "step": 1, "mse": [float("nan"), 0.0], "psnr": [1, 1e999]})
    metrics.close()
    expected = '{"kind": "validation", "step": 1, "mse": [null, 0.0], "psnr": [1, null]}\n'
    assert (tmp_path / "metrics.jsonl").read_text() == expected


def test_a_long_file_is_taken_over_line_by_line(tmp_path: Path) -> None:
    """Ten million steps leave half a gigabyte."""
    lines = [json.dumps({"step": step, "loss": "x" * 400}) + "\n" for step in range(1, 3001)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 3')
    tracemalloc.start()
    MetricsFile(tmp_path, step=2000, tensorboard=False).close()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines[:2000])
    assert peak < 200_000


@pytest.mark.parametrize("command", ["tokenize", "sample"])
def test_a_folder_that_another_process_writes_is_left_alone(
    command: str,
    folders: dict[str, Path],
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    to, model = tmp_path / "shared", f"--checkpoint={folders['model']}"
    to.mkdir()
    arguments, option = [f"--data={pictures}", f"--out={to}"], "out"
    if command == "sample":
        arguments, option = [f"--prior={folders['maskgit']}", f"--folder={to}"], "folder"
        arguments += ["--images=1", f"--out={tmp_path / 'grid.png'}"]
    with only_writer(to, "out"):
        assert main([command, model, "--device=cpu", *arguments]) == 2
    message = f"{to} is being written by another run; choose another {option}"
    assert capsys.readouterr().err == f"msvq: error: {message}\n"
    assert not list(to.iterdir())
    assert main([command, model, "--device=cpu", *arguments]) == 0


class Stream(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


@pytest.mark.parametrize(
    ("terminal", "kind", "redrawn"),
    [(True, "xterm", True), (True, "dumb", False), (False, "xterm", False)],
)
def test_only_what_can_be_drawn_over_is_drawn_over(
    terminal: bool, kind: str, redrawn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dumb terminal would show nothing before the end, a log file every frame."""
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", kind)
    out, err = Stream(terminal), Stream(terminal)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    display = open_display(leads=True, step=0, total_steps=9, grids=["4x4"], columns=())
    display.close()
    assert isinstance(display, LiveDisplay) == redrawn
    with counting("files", 3) as progress:
        assert (progress is not None) == redrawn
    assert ("\x1b" in out.getvalue(), "\x1b" in err.getvalue()) == (redrawn, redrawn)


def test_a_view_that_ends_without_figures_waits_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", out := Stream(True))
    monkeypatch.setenv("TERM", "xterm")
    display = LiveDisplay(step=9, total_steps=9, grids=["4x4"], columns=PRIOR_COLUMNS)
    display.close()
    assert "9/9" in out.getvalue()
    assert "waiting" not in out.getvalue()
    assert "NLL" not in out.getvalue()
