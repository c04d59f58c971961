"""Images into code grids on disk, in shards; killed at any moment it goes on where it was."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msvq_fast.data import (
    ImageDataset,
    ImagePath,
    ImageReadError,
    StoredImage,
    evaluation_tiles,
    list_images,
    list_labelled_images,
    read_ahead,
    relative_names,
    to_float,
)
from msvq_fast.models import MSVQVAE, VQVAE2, weights_digest
from msvq_fast.ops.checks import InputError, check_at_least
from msvq_fast.training.checkpoint import find_model
from msvq_fast.training.config import TokenizeConfig
from msvq_fast.training.distributed import choose_device, require_one_process
from msvq_fast.training.inference import fitting_size, inference_mode, load_model
from msvq_fast.training.progress import counting, only_writer
from msvq_fast.training.results import check_writable
from msvq_fast.training.tokens import INDEX, read_index, read_shard, write_index, write_shard

_MOST_CODES = 2**16  # of uint16


def run_tokenize(config: TokenizeConfig) -> Path:
    """``msvq tokenize``: write the codes of every image of a split.

    A shard ends with the last crop of a file and starts a new batch, so that a run that was killed
    and started again writes the same bytes as one that was not.

    Returns:
        The folder with ``tokens.json`` and the shards.

    Raises:
        InputError: For a bad checkpoint, data, setting or folder, a folder of other tokens, or
            several processes.
    """
    require_one_process("tokenize", "start it without torchrun")
    check_at_least(
        1, batch_size=config.batch_size, shard_size=config.shard_size, repeat=config.repeat
    )
    check_at_least(0, workers=config.workers)
    if config.crop != "random" and (config.repeat != 1 or config.flip):
        raise InputError(f"crop={config.crop} has no repeat and no flip; they are of crop=random")
    device = choose_device(config.device)
    folder = find_model(config.checkpoint)
    model = load_model(folder, device)
    size = fitting_size(config.size, model)
    if model.config.num_codes > _MOST_CODES:
        raise InputError(f"num_codes={model.config.num_codes}; 16 bits hold {_MOST_CODES} codes")
    files, labels = _list(config)
    classes = sorted(set(labels), key=_by_value)
    names = relative_names(files)
    out = Path(config.out)
    check_writable(out)
    settings = {
        **{name: getattr(config, name) for name in _DECISIVE},
        "size": size,
        "weights_sha256": weights_digest(folder),
        "files_sha256": _digest(files, names),
    }
    if labels:
        settings["labels_sha256"] = _sha256(labels)
    number_of = {name: number for number, name in enumerate(classes)}
    numbers = [number_of[label] for label in labels] if labels else [None] * len(files)
    with only_writer(out, "out"):
        index = _start(out, settings, model, len(files), classes)
        if not index["complete"]:
            with inference_mode(model), counting("files", len(files)) as progress:
                start = time.perf_counter()
                described = list(zip(files, names, numbers, strict=True))
                for images in _write_shards(
                    model, config, size, described, out, index, device, progress
                ):
                    if progress is None:
                        rate = images / (time.perf_counter() - start)
                        print(
                            f"{index['files_done']}/{len(files)} files, {_images(index)} images"
                            f"  {rate:.1f} images/s",
                            flush=True,
                        )
    if not index["shards"]:
        reason = next(iter(index["skipped"].values()))
        raise InputError(f"none of the {len(files)} images can be read; {reason}")
    for reason in index["skipped"].values():
        print(f"skipped: {reason}")
    print(f"wrote {_images(index)} images in {len(index['shards'])} shards into {out}")
    return out


# With the weights and the files they decide every byte.
_DECISIVE = ("split", "resize", "crop", "repeat", "flip", "seed", "batch_size", "shard_size")


def _list(config: TokenizeConfig) -> tuple[list[ImagePath], list[str]]:
    """The images and, where they are asked for, their classes."""
    if not config.labels:
        return list_images(config.data, split=config.split), []
    labelled = list_labelled_images(config.data, split=config.split)
    return [image for image, _ in labelled], [label for _, label in labelled]


def _by_value(name: str) -> tuple[int, str]:
    """Sort key: names that are numbers in the order of these, after all others."""
    return (int(name) if name.isdecimal() else -1), name


def _start(
    out: Path,
    settings: dict[str, Any],
    model: MSVQVAE | VQVAE2,
    files: int,
    classes: Sequence[str],
) -> dict[str, Any]:
    """The index to go on from, its shards verified, or a new one."""
    found = read_index(out)
    if found is None:
        grids: list[tuple[int, int]] = []
        for side in model.config.latents:
            cells = side * settings["size"] // model.config.resolution
            grids.append((cells, cells))
        return {
            "model": type(model).__name__,
            "model_config": dataclasses.asdict(model.config),
            "num_codes": model.config.num_codes,
            "grids": grids,
            **({"classes": list(classes)} if classes else {}),
            "settings": settings,
            "files": files,
            "files_done": 0,
            "skipped": {},
            "shards": [],
            "complete": False,
        }
    before = found["settings"]
    changed = [
        "data has other images now"
        if name == "files_sha256"
        else f"{name} is {before.get(name)} there and {settings.get(name)} here"
        for name in before | settings
        if before.get(name) != settings.get(name)
    ]
    if changed:
        raise InputError(
            f"{out / INDEX} is of other tokens: {'; '.join(changed)}; give what is there, or "
            "choose another out"
        )
    for shard in found["shards"]:
        read_shard(out, shard)
    if found["files_done"]:
        print(f"going on after {found['files_done']} of {files} files")
    return found


def _write_shards(
    model: MSVQVAE | VQVAE2,
    config: TokenizeConfig,
    size: int,
    files: Sequence[tuple[ImagePath, str, int | None]],
    out: Path,
    index: dict[str, Any],
    device: torch.device,
    progress: Callable[[int], None] | None,
) -> Iterator[int]:
    """Write what is missing; yields the images written so far after every shard.

    Args:
        model: What encodes.
        config: Settings.
        size: Side of the crops in pixels.
        files: Images, their names and the numbers of their classes.
        out: Folder.
        index: Brought up to date with every shard.
        device: Of the model.
        progress: Called with the number of files read after every file.
    """
    written = 0
    waiting: list[Tensor] = []
    crops: list[str] = []
    labels: list[int] = []
    batches: list[list[Tensor]] = []

    def encode() -> None:
        x = to_float(torch.stack(waiting).to(device))
        batches.append([codes.cpu() for codes in model.encode(x)])
        waiting.clear()

    def read(number: int) -> Iterator[tuple[str, Tensor]] | ImageReadError:
        found = _crops(files[number][0], number, size, config)
        try:  # only the first one waits for the file: a list of all may take more memory than it
            return itertools.chain([next(found)], found)
        except ImageReadError as error:
            return error

    numbers = range(index["files_done"], len(files))
    for number, found in zip(numbers, read_ahead(read, numbers, config.workers), strict=True):
        _, name, label = files[number]
        try:
            if isinstance(found, ImageReadError):
                raise found
            for suffix, crop in found:
                crops.append(name + suffix)
                if label is not None:
                    labels.append(label)
                waiting.append(crop)
                if len(waiting) == config.batch_size:
                    encode()
        except ImageReadError as error:
            index["skipped"][name] = str(error)
        if progress is not None:
            progress(number + 1)
        last = number + 1 == len(files)
        if not last and len(crops) < config.shard_size:
            continue
        if waiting:
            encode()
        if crops:
            codes = [torch.cat(grids) for grids in zip(*batches, strict=True)]
            shard = write_shard(out, len(index["shards"]), crops, codes, labels or None)
            index["shards"].append(shard)
        index["files_done"] = number + 1
        index["complete"] = last
        if index["shards"]:  # else no file could be read, and the next run tries all of them again
            write_index(out, index)
        written += len(crops)
        crops.clear()
        labels.clear()
        batches.clear()
        yield written


def _crops(
    path: ImagePath, number: int, size: int, config: TokenizeConfig
) -> Iterator[tuple[str, Tensor]]:
    """Suffixes of the names and crops ``(3, size, size)`` uint8 of a file."""
    if config.crop != "random":
        (whole,) = relative_names([path])
        tiles = evaluation_tiles([path], size=size, resize=config.resize, crop=config.crop)
        for name, tile in tiles:
            yield name[len(whole) :], tile
        return
    dataset = ImageDataset(
        [path],
        size=size,
        resize=config.resize,
        flip=config.flip,
        seed=config.seed,
        repeat=config.repeat,
    )
    for index in range(config.repeat):
        try:
            # The file's number in place of the epoch: files do not share their crops' places.
            crop = dataset.get(number, index)
        except InputError:
            raise ImageReadError(dataset.skipped[str(path)]) from None
        yield f":{index}", crop


def _digest(files: Sequence[ImagePath], names: Sequence[str]) -> str:
    """Of the names and, since rows have only numbers for names, the sizes of stored images."""
    lines = [
        f"{name} {file.size}" if isinstance(file, StoredImage) else name
        for file, name in zip(files, names, strict=True)
    ]
    return _sha256(lines)


def _sha256(lines: Sequence[str]) -> str:
    # File names may hold bytes that are no UTF-8.
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


def _images(index: dict[str, Any]) -> int:
    return sum(shard["images"] for shard in index["shards"])
