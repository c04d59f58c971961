from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from msvq_fast.data import evaluation_tiles, read_ahead
from msvq_fast.ops import InputError


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_results_come_in_order(workers: int) -> None:
    def read(item: int) -> int:
        time.sleep(0.002 * (item % 3))  # later ones are done sooner
        return item * item

    assert list(read_ahead(read, range(20), workers)) == [i * i for i in range(20)]
    assert list(read_ahead(read, [], workers)) == []


def test_workers_read_at_once_and_not_further_ahead_than_they_are_many() -> None:
    together = threading.Barrier(3, timeout=30)
    begun: list[int] = []

    def read(item: int) -> int:
        begun.append(item)
        if item < 3:
            together.wait()
        return item

    results = read_ahead(read, range(50), 3)
    assert next(results) == 0
    time.sleep(0.05)
    assert max(begun) <= 4  # one more than the three workers wait for the caller
    assert list(results) == list(range(1, 50))


def test_an_error_comes_in_its_place_and_ends_the_reading() -> None:
    begun: list[int] = []

    def read(item: int) -> int:
        begun.append(item)
        return 1 // (item - 2)

    def taken() -> Iterator[int]:
        yield from read_ahead(read, range(100), 2)

    results = taken()
    assert [next(results), next(results)] == [-1, -1]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert len(begun) <= 6
    assert not [t for t in threading.enumerate() if t.name.startswith("image-reader")]


def test_tiles_do_not_depend_on_the_workers(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    files = [tmp_path / f"{i}.png" for i in range(7)]
    for i, file in enumerate(files):
        Image.fromarray(rng.integers(0, 256, (20 + i, 33, 3), np.uint8)).save(file)
    files[3].write_bytes(b"torn")
    read = []
    for workers in (0, 3):
        skipped: dict[str, str] = {}
        tiles = evaluation_tiles(files, size=8, crop="tiles", skipped=skipped, workers=workers)
        read.append((list(tiles), skipped))
    (alone, skipped_alone), (ahead, skipped_ahead) = read
    assert [name for name, _ in alone] == [name for name, _ in ahead]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(alone, ahead, strict=True))
    assert list(skipped_alone) == [str(files[3])] and skipped_alone == skipped_ahead
    with pytest.raises(InputError, match="workers=-1"):
        evaluation_tiles(files, size=8, workers=-1)
