"""Crops of images in an order that depends on (seed, epoch, index) alone, and batches of them."""

from __future__ import annotations

import hashlib
import os
import struct
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msvq_fast.data.ahead import read_ahead
from msvq_fast.data.images import (
    ImagePath,
    ImageReadError,
    StoredImage,
    decode,
    lanczos,
    relative_names,
)
from msvq_fast.ops.checks import InputError, check_at_least, check_choice

_LOCK = threading.Lock()  # one for all: a dataset that holds its own cannot be pickled


class ImageDataset:
    """Square 8-bit crops of images.

    Sample ``index`` of epoch ``epoch`` is a function of ``(seed, epoch, index)`` and the files:
    it does not depend on what was read before, on threads or on ranks. Decoded images are kept in
    this process's memory up to ``cache_bytes``, so that a few large photographs with many crops
    are decoded once. With ``resize``, JPEG files are decoded at reduced size where that leaves at
    least twice the wanted one. Thread-safe.

    A file that cannot be read is replaced by the next one of ``paths`` that can and is noted in
    ``skipped``. Unless its content is at fault it is tried again the next time.

    Args:
        paths: files or stored images, as ``list_images`` gives them; sample ``index`` is a crop
            of ``paths[index % len(paths)]``.
        size: side of the crops in pixels.
        resize: short side in pixels to which images are resized before the crop. Default:
            ``size`` for ``crop="center"``; for ``crop="random"`` the native size, enlarged only
            where it is below ``size``.
        crop: ``"random"`` or ``"center"``.
        flip: mirror left-right with probability 1/2.
        seed: of crops and flips.
        repeat: crops of each image per epoch; ``len(dataset) == len(paths) * repeat``.
        cache_bytes: memory for decoded images; 0 decodes every time.

    Attributes:
        skipped: unreadable files met so far and why, ``{path: reason}``.

    Raises:
        InputError: no paths, or an option out of its range.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str] | StoredImage],
        *,
        size: int,
        resize: int | None = None,
        crop: str = "random",
        flip: bool = True,
        seed: int = 0,
        repeat: int = 1,
        cache_bytes: int = 2**30,
    ) -> None:
        check_choice("crop", crop, ("random", "center"))
        _check_sizes(paths, size, resize)
        check_at_least(1, repeat=repeat)
        self.paths = _image_paths(paths)
        self.size = size
        self.resize = size if resize is None and crop == "center" else resize
        self.crop = crop
        self.flip = flip
        self.seed = seed
        self.repeat = repeat
        self.cache_bytes = cache_bytes
        self.skipped: dict[str, str] = {}
        self._corrupt: set[str] = set()
        self._cache: dict[int, NDArray[np.uint8]] = {}
        self._cached_bytes = 0

    def __getstate__(self) -> dict[str, object]:
        """For a copy, as in another process: the decoded images stay here."""
        return {**self.__dict__, "_cache": {}, "_cached_bytes": 0}

    def __len__(self) -> int:
        return len(self.paths) * self.repeat

    def get(self, epoch: int, index: int) -> Tensor:
        """Sample ``index`` (0 <= index < len) of ``epoch``: uint8 ``(3, size, size)``.

        Raises:
            InputError: none of the files can be read.
        """
        out = np.zeros((3, self.size, self.size), np.uint8)
        self.write(epoch, index, out)
        return torch.from_numpy(out)

    def write(self, epoch: int, index: int, out: NDArray[np.uint8]) -> None:
        """Write what ``get`` returns into ``out``, a ``(3, size, size)`` array."""
        if not 0 <= index < len(self):
            raise InputError(f"index={index}; expected 0 <= index < {len(self)}")
        image = self._readable_image(index % len(self.paths))
        room_y, room_x = (side - self.size for side in image.shape[:2])
        draws = _random_words(b"crop", self.seed, epoch, index)
        if self.crop == "random":  # floor(u * (room + 1)) with u = draw / 2^64
            top, left = draws[0] * (room_y + 1) >> 64, draws[1] * (room_x + 1) >> 64
        else:
            top, left = room_y // 2, room_x // 2
        tile = image[top : top + self.size, left : left + self.size]
        if self.flip and draws[2] & 1:
            tile = tile[:, ::-1]
        out[...] = tile.transpose(2, 0, 1)

    def _readable_image(self, first: int) -> NDArray[np.uint8]:
        count = len(self.paths)
        failed: dict[str, str] = {}
        try:
            for position in range(first, first + count):
                path = str(self.paths[position % count])
                if path in self._corrupt:
                    continue
                try:
                    return self._image(position % count)
                except ImageReadError as error:
                    failed[path] = str(error)
                    if not error.may_pass:
                        self._corrupt.add(path)
        finally:
            if failed:
                with _LOCK:  # a new dict: the caller may be iterating over the old one
                    self.skipped = {**self.skipped, **failed}
        raise InputError(
            f"none of the {count} images can be read; {self.skipped[str(self.paths[first])]}"
        )

    def _image(self, position: int) -> NDArray[np.uint8]:
        cached = self._cache.get(position)
        if cached is not None:
            return cached
        image = _load(self.paths[position], self.size, self.resize, reduced=True)
        with _LOCK:
            # Filled until full, never evicted: in a random order every image is equally likely
            # next, and an eviction would only trade one hit for another.
            fits = self._cached_bytes + image.nbytes <= self.cache_bytes
            if fits and position not in self._cache:
                self._cache[position] = image
                self._cached_bytes += image.nbytes
        return image


def epoch_order(length: int, *, seed: int, epoch: int) -> Tensor:
    """The order of an epoch: an int64 permutation ``(length,)`` given by (seed, epoch) alone.

    The same with every version of torch and numpy and on every machine.
    """
    words = _random_words(b"order", seed, epoch, 0)
    key = np.array(words[:2], dtype=np.uint64)
    draws = np.random.Philox(key=key).random_raw(length)
    return torch.from_numpy(np.argsort(draws, kind="stable").astype(np.int64))


def batches_per_epoch(
    length: int, *, batch_size: int, world_size: int = 1, drop_last: bool = True
) -> int:
    """How many batches ``batches`` yields on each rank for a dataset of ``length`` samples."""
    full, rest = divmod(length, batch_size * world_size)
    return full + (not drop_last and rest >= world_size)


def batches(
    dataset: ImageDataset,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    start_batch: int = 0,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    drop_last: bool = True,
) -> Iterator[Tensor]:
    """The batches of one rank in one epoch: uint8 ``(B, 3, size, size)`` on the CPU.

    Batch ``b`` of all ranks together is ``epoch_order(...)[b * B * world_size :][: B *
    world_size]``, rank 0 first: training on one rank with ``B * world_size`` sees the same
    samples step by step. Ranks are disjoint and all have equally many batches of equal sizes.

    Args:
        dataset: what the samples are taken from.
        batch_size: ``B``, per rank.
        seed: of the order (crops and flips follow ``dataset.seed``).
        epoch: numbered from 0; each has another order and other crops.
        start_batch: the first batch to yield; the rest of the epoch is what it would have been.
        rank: this process, ``0 <= rank < world_size``.
        world_size: number of processes that share the epoch.
        workers: threads that decode ahead; 0 decodes in the caller. The batches are the same.
        drop_last: leave out the last incomplete batch. Otherwise it is shared evenly by the
            ranks, without the up to ``world_size - 1`` samples that do not go round.

    Raises:
        InputError: an option out of its range, an epoch shorter than one batch, or (while
            iterating) no readable image.
    """
    check_at_least(1, batch_size=batch_size, world_size=world_size)
    check_at_least(0, workers=workers)
    if not 0 <= rank < world_size:
        raise InputError(f"rank={rank}; expected 0 <= rank < world_size = {world_size}")
    count = batches_per_epoch(
        len(dataset), batch_size=batch_size, world_size=world_size, drop_last=drop_last
    )
    if count == 0:
        raise InputError(
            f"an epoch has {len(dataset)} samples, too few for one batch of batch_size="
            f"{batch_size} on world_size={world_size}; lower batch_size or raise repeat"
        )
    if not 0 <= start_batch <= count:
        raise InputError(f"start_batch={start_batch}; expected 0 <= start_batch <= {count}")
    order = epoch_order(len(dataset), seed=seed, epoch=epoch).numpy()
    group = batch_size * world_size

    def plan() -> Iterator[list[int]]:
        for start in range(start_batch * group, count * group, group):
            share = min(batch_size, (len(order) - start) // world_size)
            first = start + rank * share
            yield order[first : first + share].tolist()

    return _read_batches(dataset, plan(), batch_size, epoch, workers)


def _read_batches(
    dataset: ImageDataset, plan: Iterator[list[int]], batch_size: int, epoch: int, workers: int
) -> Iterator[Tensor]:
    def allocate(indices: list[int]) -> NDArray[np.uint8]:
        return np.zeros((len(indices), 3, dataset.size, dataset.size), np.uint8)

    if workers == 0:
        for indices in plan:
            batch = allocate(indices)
            for slot, index in zip(batch, indices, strict=True):
                dataset.write(epoch, index, slot)
            yield torch.from_numpy(batch)
        return

    # Threads, not processes: decoding releases the GIL, the cache is shared, nothing is pickled.
    pool = ThreadPoolExecutor(workers, thread_name_prefix="image-loader")
    ahead: deque[tuple[NDArray[np.uint8], list[Future[None]]]] = deque()

    def finished() -> Tensor:
        batch, reads = ahead.popleft()
        for read in reads:
            read.result()
        return torch.from_numpy(batch)

    try:
        # Two batches ahead, more where a batch is too small to occupy all workers.
        depth = 2 + workers // batch_size
        for indices in plan:
            if len(ahead) == depth:
                yield finished()
            batch = allocate(indices)
            reads = [
                pool.submit(dataset.write, epoch, index, slot)
                for slot, index in zip(batch, indices, strict=True)
            ]
            ahead.append((batch, reads))
        while ahead:
            yield finished()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def evaluation_tiles(
    paths: Sequence[str | os.PathLike[str] | StoredImage],
    *,
    size: int,
    resize: int | None = None,
    crop: str = "center",
    limit: int | None = None,
    skipped: dict[str, str] | None = None,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> Iterator[tuple[str, Tensor]]:
    """Fixed tiles to evaluate on, in a fixed order, always decoded at full size.

    Args:
        paths: files or stored images.
        size: side of the tiles in pixels.
        resize: short side in pixels to which images are resized first. Default: ``size`` for
            ``crop="center"``; for ``crop="tiles"`` the native size, enlarged only where it is
            below ``size``.
        crop: ``"center"``, one central tile per image, or ``"tiles"``, all non-overlapping
            tiles of a grid centred on the image, row by row.
        limit: at most this many images, evenly spread over ``paths``.
        skipped: filled with ``{path: reason}`` for unreadable files, which are left out. Without
            it the first unreadable file raises.
        rank: this process, ``0 <= rank < world_size``, which takes every ``world_size``-th file.
        world_size: number of processes that share the files.
        workers: threads that decode ahead; 0 decodes in the caller. The tiles are the same.

    Yields:
        ``(name, tile)``: the path below the images' common folder, with ``:row,column`` appended
        for ``"tiles"``, and uint8 ``(3, size, size)``.

    Raises:
        InputError: an option out of its range, or (while iterating) an unreadable file; with
            ``skipped`` only when no file can be read (by one process; several may differ).
    """
    check_choice("crop", crop, ("center", "tiles"))
    check_at_least(0, workers=workers)
    _check_sizes(paths, size, resize)
    files = _image_paths(paths)
    if limit is not None:
        check_at_least(1, limit=limit)
        count = min(limit, len(files))
        files = [files[i * len(files) // count] for i in range(count)]
    resize = size if resize is None and crop == "center" else resize
    named = list(zip(relative_names(files), files, strict=True))[rank::world_size]
    return _read_tiles(named, size, resize, crop, skipped, world_size, workers)


def _read_tiles(
    named: list[tuple[str, ImagePath]],
    size: int,
    resize: int | None,
    crop: str,
    skipped: dict[str, str] | None,
    world_size: int,
    workers: int,
) -> Iterator[tuple[str, Tensor]]:
    def load(file: ImagePath) -> NDArray[np.uint8] | ImageReadError:
        try:
            return _load(file, size, resize, reduced=False)
        except ImageReadError as error:
            return error

    failures = 0
    images = read_ahead(load, [file for _, file in named], workers)
    for (name, file), image in zip(named, images, strict=True):
        if isinstance(image, ImageReadError):
            if skipped is None:
                raise image
            skipped[str(file)] = str(image)
            failures += 1
            if failures == len(named) and world_size == 1:
                raise InputError(f"none of the {failures} images can be read; {image}") from None
            continue
        height, width = image.shape[:2]
        rows, columns = (1, 1) if crop == "center" else (height // size, width // size)
        top, left = (height - rows * size) // 2, (width - columns * size) // 2
        for row in range(rows):
            for column in range(columns):
                y, x = top + row * size, left + column * size
                tile = image[y : y + size, x : x + size].transpose(2, 0, 1).copy()
                label = name if crop == "center" else f"{name}:{row},{column}"
                yield label, torch.from_numpy(tile)


def _load(path: ImagePath, size: int, resize: int | None, *, reduced: bool) -> NDArray[np.uint8]:
    """``(H, W, 3)`` with short side ``resize``, or at least ``size`` where that is None."""
    # Twice the final size leaves the filtering to Lanczos and the JPEG decoder a quick shrink.
    draft = 2 * resize if reduced and resize is not None else None
    image = decode(path, min_side=draft)
    try:
        return lanczos(image, resize if resize is not None else max(size, min(image.shape[:2])))
    except ImageReadError as error:
        raise ImageReadError(f"cannot use image {str(path)!r}: {error}") from None


def _image_paths(paths: Sequence[str | os.PathLike[str] | StoredImage]) -> list[ImagePath]:
    # A path is kept as it is: a copy of each would double what a million of them take.
    return [path if isinstance(path, (Path, StoredImage)) else Path(path) for path in paths]


def _random_words(purpose: bytes, seed: int, epoch: int, index: int) -> tuple[int, int, int]:
    """Three uniform 64-bit integers that depend on the arguments alone."""
    counter = struct.pack("<3Q", *(value % 2**64 for value in (seed, epoch, index)))
    digest = hashlib.blake2b(counter, digest_size=24, person=purpose).digest()
    a, b, c = struct.unpack("<3Q", digest)
    return a, b, c


def _check_sizes(paths: Sequence[object], size: int, resize: int | None) -> None:
    if not paths:
        raise InputError("paths is empty; expected at least one image")
    check_at_least(1, size=size)
    if resize is not None and resize < size:
        raise InputError(f"resize={resize}; expected at least size = {size}")
