"""What a million images cost is counted on fewer: allocations per image, never seconds."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

import pytest
from PIL import Image

from msvq_fast.data import ImageDataset, batches, list_images

MANY = 2**17


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def peak_bytes(work: Callable[[], Any]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("batch_size", [1, 32])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_costs_its_order_and_no_more(image: Path, batch_size: int, workers: int) -> None:
    """Cut into batches at once, a million images wait for minutes at the start of every epoch."""
    dataset = ImageDataset([image] * MANY, size=8)
    options: dict[str, Any] = {"batch_size": batch_size, "workers": workers}
    stream = batches(dataset, seed=0, epoch=0, **options)
    next(stream)  # imports, threads and the image
    stream.close()

    def first_batch() -> None:
        again = batches(dataset, seed=0, epoch=1, **options)
        next(again)
        again.close()

    assert peak_bytes(first_batch) < 28 * MANY  # draws, their order, and a copy to sort them


def test_a_dataset_keeps_the_paths_it_is_given(image: Path) -> None:
    dataset = ImageDataset([image, str(image)], size=8)
    assert dataset.paths[0] is image and dataset.paths[1] == image


def test_only_the_images_of_the_split_become_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(200):
        (tmp_path / f"{number}.png").touch()
    joined: list[str] = []
    join = PurePath.__truediv__

    def counting(self: PurePath, name: str) -> PurePath:
        joined.append(name)
        return join(self, name)

    monkeypatch.setattr(PurePath, "__truediv__", counting)
    found = list_images(tmp_path, split="val")
    assert 0 < len(found) < 50
    assert [name for name in joined if name.endswith(".png")] == [path.name for path in found]
