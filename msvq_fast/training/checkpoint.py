"""Checkpoints of a run: folders that are complete or not there, and how to find and check them.

``OUT/checkpoints/step_00000123/`` holds ``model.safetensors`` and ``config.json`` (a saved model
as any other), ``optimizer.pt`` (the optimiser and the log window) and ``state.json`` (where the run
stands, its configuration, and length and CRC-32 of the other files).
"""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from msvq_fast import __version__
from msvq_fast.models import MSVQVAE, VQVAE2
from msvq_fast.ops.checks import InputError
from msvq_fast.priors import Prior

CHECKPOINTS, STATE, OPTIMIZER = "checkpoints", "state.json", "optimizer.pt"
VERSIONS = {
    "msvq_fast": __version__,
    "torch": torch.__version__,
    "python": platform.python_version(),
}
_PREFIX = "step_"
_CANNOT_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)  # of a file system
_CHUNK = 1 << 20  # bytes


class CorruptCheckpointError(InputError):
    """A checkpoint with a missing, truncated or altered file; the message names the file."""


def checkpoint_path(out: Path, step: int) -> Path:
    """Return the folder of the checkpoint after ``step`` optimiser steps."""
    return out / CHECKPOINTS / f"{_PREFIX}{step:08d}"


def list_checkpoints(out: Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first; they may still be corrupt."""
    found = (out / CHECKPOINTS).glob(f"{_PREFIX}*")
    steps = {path: path.name[len(_PREFIX) :] for path in found}
    # By number: the names of a hundred million steps and more are longer.
    return sorted((p for p, step in steps.items() if step.isdecimal()), key=lambda p: int(steps[p]))


def save_checkpoint(
    out: Path,
    *,
    model: MSVQVAE | VQVAE2 | Prior,
    optimizer: dict[str, Any],
    state: dict[str, Any],
) -> Path:
    """Write a checkpoint so that a crash at any moment leaves it whole or absent.

    Args:
        out: Folder of the run.
        model: Saved by its ``save_pretrained``.
        optimizer: Tensors and plain values for ``optimizer.pt``.
        state: Plain values for ``state.json``; ``state["step"]`` names the folder.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: If it cannot be written; older checkpoints are untouched.
    """
    final = checkpoint_path(out, state["step"])
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.{os.getpid()}")
    for stale in final.parent.glob(f".{_PREFIX}*"):  # of a process that was killed while saving
        shutil.rmtree(stale, ignore_errors=True)
    try:
        temporary.mkdir()
        model.save_pretrained(temporary)
        with (temporary / OPTIMIZER).open("wb") as file:
            torch.save(optimizer, file)
        files = {path.name: _fingerprint(path) for path in sorted(temporary.iterdir())}
        text = json.dumps({**state, "versions": VERSIONS, "files": files}, indent=1)
        (temporary / STATE).write_text(text + "\n", encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            _sync(path)
        temporary.rename(final)
        _sync(final.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if reason := _write_failure(error):
            raise OSError(f"cannot write checkpoint {final}: {reason}") from error
        raise
    return final


def prune_checkpoints(out: Path, *, keep_last: int, best_step: int | None) -> None:
    """Delete all but the newest ``keep_last`` checkpoints and that of ``best_step``."""
    keep = set(list_checkpoints(out)[-keep_last:])
    if best_step is not None:
        keep.add(checkpoint_path(out, best_step))
    for path in list_checkpoints(out):
        if path not in keep:
            shutil.rmtree(path, ignore_errors=True)


def read_state(path: Path) -> dict[str, Any]:
    """Read and check the ``state.json`` of a checkpoint.

    Raises:
        CorruptCheckpointError: If it is missing, no JSON or lacks a field.
    """
    file = path / STATE
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(state, dict):
            raise ValueError("no JSON object")
        missing = [k for k in ("step", "config", "model_config", "files") if k not in state]
        if missing:
            raise ValueError(f"no field {missing[0]!r}")
        files = state["files"]
        tables = [state["config"], state["model_config"], files, *dict(files).values()]
        best = state.get("best")
        steps = [state["step"], *([] if best is None else [best["step"]])]
        if not all(isinstance(table, dict) for table in tables):
            raise TypeError("config, model_config or files is no table")
        if not all(type(step) is int and step >= 0 for step in steps):
            raise TypeError("a step is no number of steps")
    except FileNotFoundError:
        raise CorruptCheckpointError(f"{file} is missing: {path} is no checkpoint") from None
    except (ValueError, TypeError, KeyError, RecursionError) as error:  # also JSON's and UTF-8's
        raise CorruptCheckpointError(f"{file} is corrupt: {error}") from None
    return state


def verify(path: Path, state: dict[str, Any]) -> None:
    """Compare every file of a checkpoint with the length and CRC-32 in its state.

    Raises:
        CorruptCheckpointError: For the first file that is missing, truncated or altered.
    """
    for name, expected in state["files"].items():
        file = path / name
        if not file.is_file():
            raise CorruptCheckpointError(f"{file} is missing")
        if file.stat().st_size != expected.get("bytes"):
            raise CorruptCheckpointError(
                f"{file} is corrupt: {file.stat().st_size} bytes, written were "
                f"{expected.get('bytes')}"
            )
        if _fingerprint(file) != expected:
            raise CorruptCheckpointError(f"{file} is corrupt: its checksum does not match")


def load_optimizer(path: Path) -> dict[str, Any]:
    """Load ``optimizer.pt`` of a verified checkpoint, tensors only, into the host's memory.

    An optimizer takes to its device what belongs there. Numbers of steps may not: read from a GPU
    they would wait for it once for every parameter and step.

    Raises:
        CorruptCheckpointError: If it holds what only code could make, or nothing of the kind.
    """
    try:
        return torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch meets odd pickles with exceptions of any kind
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CorruptCheckpointError(f"{path / OPTIMIZER} cannot be loaded: {reason}") from None


def find_model(path: str | Path) -> Path:
    """Return the folder to load a model from.

    Args:
        path: A run (its best checkpoint by validation PSNR, else its last), a checkpoint, or a
            folder of ``save_pretrained``.

    Raises:
        InputError: If there is no model there, or the checkpoint is corrupt.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} does not exist; give a run, a checkpoint or a saved model")
    checkpoints = list_checkpoints(path)
    if not checkpoints:
        if not (path / "model.safetensors").is_file():
            raise InputError(f"{path} holds no checkpoint and no saved model")
        if (path / STATE).is_file():
            verify(path, read_state(path))
        return path
    best = read_state(checkpoints[-1]).get("best")
    chosen = checkpoint_path(path, best["step"]) if best else checkpoints[-1]
    if not chosen.is_dir():
        chosen = checkpoints[-1]
    verify(chosen, read_state(chosen))
    return chosen


def checkpoints_to_resume(source: Path) -> Iterator[Path]:
    """Yield the checkpoint ``source`` itself, or those of the run ``source``, newest first."""
    if (source / STATE).is_file() or source.name.startswith(_PREFIX):
        yield source
    else:
        yield from reversed(list_checkpoints(source))


def _write_failure(error: BaseException) -> str | None:
    """What the disk said, if that is behind ``error``."""
    # torch raises a RuntimeError of its own over the file's error, safetensors a type of its own.
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (OSError, SafetensorError)):
            return getattr(cause, "strerror", None) or str(cause)
        cause = cause.__context__
    return None


def _fingerprint(path: Path) -> dict[str, int]:
    crc, length = 0, 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
            length += len(chunk)
    return {"bytes": length, "crc32": crc}


def _sync(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut.

    Raises:
        OSError: If the disk has lost a file; some systems cannot sync one, or open a folder.
    """
    folder = path.is_dir()
    try:
        # Windows syncs only what may be written.
        descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not folder and error.errno not in _CANNOT_SYNC:
            raise
