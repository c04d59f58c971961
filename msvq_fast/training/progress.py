"""What a run says while it trains: a live view on a terminal, lines elsewhere, metrics.jsonl."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from msvq_fast.ops.checks import InputError
from msvq_fast.training.results import without_infinities, writing

METRICS = "metrics.jsonl"
_EVENTS = "tensorboard"  # the folder of its files
_SIGPIPE = 13  # also where the signal is not known


class Column(NamedTuple):
    """A figure per scale in the live view: ``key`` of the records of one ``kind``."""

    title: str
    kind: str
    key: str
    style: str


AUTOENCODER_COLUMNS = (
    Column("usage %", "train", "usage", ".1f"),
    Column("perplexity", "train", "perplexity", ".1f"),
    Column("validation PSNR dB", "validation", "psnr", ".2f"),
)
PRIOR_COLUMNS = (
    Column("NLL", "train", "nll", ".3f"),
    Column("validation NLL", "validation", "nll", ".3f"),
)


class Display(Protocol):
    """Where people watch a run.

    Attributes:
        lost: SIGPIPE's number once nothing can be printed any more, 0 before.
    """

    lost: int

    def advance(self, step: int) -> None:
        """Take note of a finished optimiser step."""

    def log(self, record: dict[str, Any]) -> None:
        """Show a record of metrics.jsonl."""

    def message(self, text: str) -> None:
        """Show a line of text."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class PlainDisplay:
    """One line per record, for logs and pipes."""

    def __init__(self) -> None:
        self.lost = 0

    def advance(self, step: int) -> None:
        """Say nothing: only records make lines."""

    def log(self, record: dict[str, Any]) -> None:
        """Print a record as one line."""
        self.message(_line(record))

    def message(self, text: str) -> None:
        """Print a line of text."""
        try:
            print(text, flush=True)
        except OSError as error:  # a reader that leaves or a full disk is no reason not to save
            if not self.lost:
                with contextlib.suppress(OSError):
                    reason = f"cannot print: {error.strerror}"
                    print(f"{reason}; stopping after this step and saving", file=sys.stderr)
            self.lost = _SIGPIPE

    def close(self) -> None:
        """Do nothing: there is nothing to restore."""


class SilentDisplay(PlainDisplay):
    """For every process but the first."""

    def message(self, text: str) -> None:
        """Say nothing."""


class LiveDisplay:
    """A bar, the last figures and a table of scales that redraw themselves."""

    def __init__(
        self, *, step: int, total_steps: int, grids: list[str], columns: tuple[Column, ...]
    ) -> None:
        self.lost = 0
        from rich.console import Console, Group
        from rich.live import Live
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
        )

        self._group = Group
        self._grids = grids
        self._columns = columns
        self._last: dict[str, dict[str, Any]] = {"train": {}, "validation": {}}
        self._console = Console()
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=self._console,
        )
        self._task = self._bar.add_task("training", total=total_steps, completed=step)
        self._live = Live(self._render(), console=self._console, refresh_per_second=4)
        self._live.start()

    def advance(self, step: int) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=step)

    def log(self, record: dict[str, Any]) -> None:
        """Put a record's figures in place of the last ones."""
        self._last[record["kind"]] = record
        self._live.update(self._render())

    def message(self, text: str) -> None:
        """Print a line of text above the live view."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Draw the last state and give the terminal back."""
        if not any(self._last.values()):  # stopped early, or nothing was left to train
            self._live.update(self._bar)
        self._live.stop()

    def _render(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False)
        for name in ("scale", "grid", *(column.title for column in self._columns)):
            table.add_column(name, justify="right")
        for m, grid in enumerate(self._grids):
            table.add_row(
                str(m),
                grid,
                *(_entry(self._last[c.kind].get(c.key), m, c.style) for c in self._columns),
            )
        train = self._last["train"]
        summary = _summary(train) if train else "waiting for the first figures"
        return self._group(self._bar, Text(summary), table)


def open_display(
    *,
    leads: bool,
    step: int,
    total_steps: int,
    grids: list[str],
    columns: tuple[Column, ...],
) -> Display:
    """Return the view for this process: live on a terminal, lines in pipes and CI, else silent."""
    if not leads:
        return SilentDisplay()
    if _redraws(sys.stdout) and not os.environ.get("CI"):
        return LiveDisplay(step=step, total_steps=total_steps, grids=grids, columns=columns)
    return PlainDisplay()


@contextlib.contextmanager
def counting(what: str, total: int | None = None) -> Iterator[Callable[[int], None] | None]:
    """A live count on a terminal, a bar where ``total`` is known; None elsewhere.

    What it yields takes the number of things done so far.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    if not _redraws(sys.stderr):
        yield None
        return
    console = Console(stderr=True)
    count = "{task.completed}" if total is None else "{task.completed}/{task.total}"
    bar = () if total is None else (BarColumn(),)
    columns = (SpinnerColumn(), *bar, TextColumn(f"{count} {what}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)


def _redraws(stream: IO[str] | None) -> bool:
    """Whether lines of a stream can be drawn over: FORCE_COLOR alone makes no terminal of a pipe.

    On a dumb terminal rich would show nothing before the end.
    """
    from rich.console import Console

    terminal = stream is not None and stream.isatty()
    return terminal and not Console(file=stream).is_dumb_terminal


class MetricsFile:
    """``metrics.jsonl``: one JSON object per log line and validation, each step once.

    Numbers that are not finite, which JSON does not know, are null there and kept by TensorBoard.
    While it is open it is locked, so that a second run cannot go into the same folder.

    Args:
        folder: Folder of the run.
        step: Step from which the run goes on; what the file says about later steps is dropped.
        tensorboard: Also write TensorBoard events into ``folder/tensorboard``.

    Raises:
        InputError: If another run has it open, or TensorBoard is asked for and not installed.
        OSError: If it cannot be written; what it says is kept.
    """

    def __init__(self, folder: Path, *, step: int, tensorboard: bool) -> None:
        self._path = path = folder / METRICS
        with path.open("a", encoding="utf-8") as before:
            _lock(before, path)
            self._events = _open_events(folder, step) if tensorboard else None
            temporary = path.with_name(f".{METRICS}.{os.getpid()}")
            try:
                with writing(path):
                    with temporary.open("wb") as file:
                        file.writelines(_lines_upto(path, step) if step else ())
                    self._file: IO[str] = temporary.open("a", encoding="utf-8")
                    _lock(self._file, temporary)
                    temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)

    def write(self, record: dict[str, Any]) -> None:
        """Append a record; `OSError` naming the file or folder that cannot be written."""
        with writing(self._path):
            self._file.write(json.dumps(without_infinities(record)) + "\n")
            self._file.flush()
        if self._events is None:
            return
        with writing(self._path.with_name(_EVENTS)):
            for name, value in record.items():
                values = value if isinstance(value, list) else [value]
                for m, number in enumerate(values):
                    if isinstance(number, (int, float)) and name != "step":
                        suffix = f"/{m}" if isinstance(value, list) else ""
                        tag = f"{record['kind']}/{name}{suffix}"
                        self._events.add_scalar(tag, number, record["step"])

    def close(self) -> None:
        """Close the file; `OSError` if the last of TensorBoard's events cannot be written."""
        with contextlib.suppress(OSError):  # of a line that `write` has failed to write
            self._file.close()
        if self._events is not None:
            with writing(self._path.with_name(_EVENTS)):
                self._events.close()


def is_running(folder: Path) -> bool:
    """Whether a run has its ``metrics.jsonl`` open in ``folder``; never where nothing locks."""
    try:
        with (folder / METRICS).open("r+", encoding="utf-8") as file:
            _lock(file, folder / METRICS)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except InputError:
        return True
    return False


@contextlib.contextmanager
def only_writer(folder: Path, option: str) -> Iterator[None]:
    """Keep other processes that enter this out of ``folder``; `InputError` if one is in it.

    Args:
        folder: It exists.
        option: Name of the option that chose it.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows, where nothing locks
        yield
        return
    try:
        _lock(descriptor, folder, option)
        yield
    finally:
        os.close(descriptor)


def _lock(file: IO[str] | int, path: Path, option: str = "out") -> None:
    """Lock a file until it is closed or the process ends; `InputError` if another one has it."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(
            f"{path} is being written by another run; choose another {option}"
        ) from None
    except OSError:  # some file systems have no locks
        return


def _lines_upto(path: Path, step: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        for line in file:
            try:
                kept = json.loads(line)["step"] <= step and line.endswith(b"\n")
            except (ValueError, KeyError, TypeError):
                continue  # half a line or no text, from a crash in the middle of writing it
            if kept:
                yield line


def _open_events(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError(
            "tensorboard=True, but TensorBoard is not installed; pip install tensorboard"
        ) from None
    return SummaryWriter(str(folder / _EVENTS), purge_step=step + 1)


def _line(record: dict[str, Any]) -> str:
    if record["kind"] == "validation" and "nll" in record:
        return (
            f"step {record['step']}  validation NLL {_slashed(record['nll'], '.4f')}"
            f"  {record['nats_per_image']:.1f} nats an image  ({record['images']} images)"
        )
    if record["kind"] == "validation":
        return (
            f"step {record['step']}  validation PSNR {_slashed(record['psnr'], '.2f')} dB"
            f"  MSE {_slashed(record['mse'], '.3e')}  ({record['tiles']} tiles)"
        )
    if "nll" in record:
        return _summary(record)
    return (
        f"{_summary(record)}  usage {_slashed(record['usage'], '.1f')} %"
        f"  perplexity {_slashed(record['perplexity'], '.1f')}"
    )


def _summary(record: dict[str, Any]) -> str:
    eta = datetime.timedelta(seconds=round(record["eta_seconds"]))
    if "nll" in record:
        figure = f"NLL {_slashed(record['nll'], '.4f')}"
    else:
        figure = f"PSNR {record['psnr']:.2f} dB"
    return (
        f"step {record['step']}/{record['total_steps']}  epoch {record['epoch']:.2f}"
        f"  loss {record['loss']:.5f}  {figure}  lr {record['lr']:.1e}"
        f"  {record['steps_per_second']:.2f} it/s  ETA {eta}"
    )


def _slashed(values: list[float], style: str) -> str:
    return "/".join(format(value, style) for value in values)


def _entry(values: list[float] | None, m: int, style: str) -> str:
    return format(values[m], style) if values is not None and m < len(values) else "-"
