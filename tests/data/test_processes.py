"""A dataset in other processes, as a DataLoader that does not fork needs it."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch

from msvq_fast.data import ImageDataset, list_images


def test_a_dataset_is_pickled_without_its_decoded_images(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"")
    paths = [tmp_path / "broken.png", *list_images("builtin:photos", split="val")]
    dataset = ImageDataset(paths, size=32, resize=64, repeat=2)
    samples = [dataset.get(1, index) for index in range(len(dataset))]
    content = pickle.dumps(dataset)
    assert len(content) < 32 * 32 * 3, "no image is in it"
    other = pickle.loads(content)
    assert other.skipped == dataset.skipped != {}
    for index, sample in enumerate(samples):
        assert torch.equal(other.get(1, index), sample)
