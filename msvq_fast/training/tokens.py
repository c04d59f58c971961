"""Code grids on disk: shards of uint16 safetensors and an index that says what made them."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from msvq_fast.ops import InputError

INDEX = "tokens.json"
_SCHEMA = 1
_NAMES, _LABELS = "names", "labels"
_FIELDS = {"settings": dict, "num_codes": int, "grids": list, "files": int, "files_done": int}
_FIELDS |= {"shards": list, "complete": bool}
_MOST = 2**31 - 1


@dataclass(frozen=True)
class Tokens:
    """Everything that a folder of tokens holds.

    Attributes:
        folder: Where.
        index: ``tokens.json``: model, its hash, settings, shards.
        codes: Per scale uint16 ``(images, h_m, w_m)``, coarse to fine.
        labels: Numbers of the images' classes ``(images,)`` int64, or None.
    """

    folder: Path
    index: dict[str, Any]
    codes: list[Tensor]
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.codes[0])

    @property
    def num_codes(self) -> int:
        """K, codes of every scale."""
        return int(self.index["num_codes"])

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """``(h, w)`` per scale, coarse to fine."""
        return tuple((h, w) for h, w in self.index["grids"])

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes by their numbers; empty where images have none."""
        return tuple(self.index.get("classes", ()))

    def numbered_as(self, classes: Sequence[str]) -> Tokens:
        """The same tokens with the labels' numbers of other tokens.

        Raises:
            InputError: Unless all classes here are among ``classes``, or both have none.
        """
        if not classes and self.labels is None:
            return self
        numbers = {name: number for number, name in enumerate(classes)}
        unknown = [name for name in self.classes if name not in numbers]
        if unknown or self.labels is None or not classes:
            here, there = (
                f"{len(c)} classes" if c else "no classes" for c in (self.classes, classes)
            )
            first = f", {unknown[0]!r} not among them" if unknown and classes else ""
            raise InputError(
                f"{self.folder} has {here}; expected those of the tokens, {there}{first}"
            )
        moved = torch.tensor([numbers[name] for name in self.classes])[self.labels]
        return replace(self, index={**self.index, "classes": list(classes)}, labels=moved)

    def batch(self, rows: Tensor) -> list[Tensor]:
        """Codes of ``rows (B,)``: int64 ``(B, h_m, w_m)`` per scale."""
        # Gathered as signed numbers of the same bits: torch does not index uint16.
        return [c.view(torch.int16)[rows].view(torch.uint16).long() for c in self.codes]

    def names(self) -> list[str]:
        """Names of the crops in the order of the codes: a file's below the data, ``:``, which."""
        found: list[str] = []
        for shard in self.index["shards"]:
            with safe_open(self.folder / shard["file"], framework="pt") as file:
                found += json.loads(file.metadata()[_NAMES])
        return found


def load_tokens(folder: str | Path) -> Tokens:
    """Load a folder that ``msvq tokenize`` has finished.

    Raises:
        InputError: If it is missing, not finished or altered; the message names the file.
    """
    folder = Path(folder)
    index = read_index(folder)
    if index is None:
        raise InputError(f"{folder / INDEX} does not exist; expected a folder of msvq tokenize")
    if not index["complete"]:
        done, files = index["files_done"], index["files"]
        raise InputError(
            f"{folder} is not finished: {done} of {files} files; run the same msvq tokenize again"
        )
    count = sum(shard["images"] for shard in index["shards"])
    try:
        codes = [torch.empty(count, h, w, dtype=torch.uint16) for h, w in index["grids"]]
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{folder / INDEX}: no memory for {count} images: {reason}") from None
    labels = torch.empty(count, dtype=torch.int64) if "classes" in index else None
    first = 0
    for shard in index["shards"]:  # one at a time, or all would be in memory twice
        part = read_shard(folder, shard)
        _check_shard(part, index, shard, folder / shard["file"])
        last = first + shard["images"]
        for m, grids in enumerate(codes):
            grids[first:last] = part[f"codes_{m}"]
        if labels is not None:
            labels[first:last] = part[_LABELS]
        first = last
    return Tokens(folder, index, codes, labels)


def _check_shard(
    part: dict[str, Tensor], index: dict[str, Any], shard: dict[str, Any], path: Path
) -> None:
    """Raise `InputError` unless a shard holds what its index says: a GPU checks no code."""
    wanted = {
        f"codes_{m}": (torch.uint16, index["num_codes"], g) for m, g in enumerate(index["grids"])
    }
    if "classes" in index:
        wanted[_LABELS] = (torch.int32, len(index["classes"]), ())
    for name, (dtype, numbers, grid) in wanted.items():
        shape = (shard["images"], *grid)
        if name not in part or part[name].dtype != dtype or part[name].shape != shape:
            raise InputError(f"{path} holds no {name} of {dtype} {shape}, as {INDEX} says")
        low, high = part[name].to(torch.int32).aminmax()
        if not 0 <= low <= high < numbers:
            raise InputError(f"{path}: {name} spans [{low}, {high}]; expected 0 to {numbers - 1}")


def read_index(folder: Path) -> dict[str, Any] | None:
    """Read ``tokens.json``, None where there is none; `InputError` if it is not one."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["schema"] != _SCHEMA:
            raise ValueError(f"schema {index['schema']}; this version reads {_SCHEMA}")
        for key, kind in _FIELDS.items():
            if type(index[key]) is not kind:
                raise ValueError(f"{key} is no {kind.__name__}")
        counts = [index["num_codes"], *(side for grid in index["grids"] for side in grid)]
        counts += [shard["images"] for shard in index["shards"]]
        pairs = all(len(grid) == 2 for grid in index["grids"])
        bounded = all(type(n) is int and 0 < n <= _MOST for n in counts)
        if not pairs or not index["grids"] or not bounded:
            raise ValueError(f"num_codes, grids or images are no numbers of 1 to {_MOST}")
        for shard in index["shards"]:
            if not re.fullmatch(r"shard_\d+\.safetensors", shard["file"]):
                raise ValueError(f"shard {shard['file']!r}; expected a file beside it")
            shard["bytes"], shard["crc32"]
        if not all(isinstance(name, str) for name in index.get("classes", ())):
            raise ValueError("classes are no names")
        if index["complete"] and not index["shards"]:
            raise ValueError("it is complete without a shard")
        for key in ("weights_sha256", "size"):
            index["settings"][key]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is not an index of tokens: {error}") from None
    return dict(index)


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """Replace ``tokens.json`` as a whole."""
    text = json.dumps({"schema": _SCHEMA, **index}, indent=1) + "\n"
    _replace(folder / INDEX, text.encode())


def read_shard(folder: Path, shard: dict[str, Any]) -> dict[str, Tensor]:
    """Read a shard of the index; `InputError` if it is missing or altered."""
    path = folder / shard["file"]
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    if len(content) != shard["bytes"] or zlib.crc32(content) != shard["crc32"]:
        raise InputError(f"{path} is corrupt: its checksum does not match {INDEX}")
    try:
        return dict(load(content))
    except SafetensorError as error:
        raise InputError(f"{path} is no file of tensors: {error}") from None


def write_shard(
    folder: Path,
    number: int,
    names: Sequence[str],
    codes: Sequence[Tensor],
    labels: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Write a shard so that a crash leaves it whole or absent; returns its entry of the index.

    Args:
        folder: Where.
        number: Of the shard; an older file with this number is replaced.
        names: Of the images.
        codes: Per scale int64 ``(images, h_m, w_m)`` on the CPU, at most 65535.
        labels: Numbers of the images' classes.
    """
    tensors = {f"codes_{m}": c.to(torch.uint16).contiguous() for m, c in enumerate(codes)}
    if labels is not None:
        tensors[_LABELS] = torch.tensor(labels, dtype=torch.int32)
    content = save(tensors, metadata={_NAMES: json.dumps(list(names))})
    name = f"shard_{number:05d}.safetensors"
    _replace(folder / name, content)
    crc = zlib.crc32(content)
    return {"file": name, "images": len(names), "bytes": len(content), "crc32": crc}


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")  # one writer per folder: the next replaces it
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
