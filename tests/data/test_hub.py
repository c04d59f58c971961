from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from msvq_fast.data import (
    ImageDataset,
    ImageReadError,
    batches,
    list_images,
    read_image,
    relative_names,
)
from msvq_fast.data.hub import RowImage
from msvq_fast.ops.checks import InputError


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"needs datasets, .*: pip install 'msvq-fast\[hf\]'"):
        list_images("hf:owner/name", split="train")


@pytest.fixture
def hf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The library, offline, with its cache in the test's folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


def photo(seed: int, side: int = 20) -> bytes:
    """A JPEG that a camera held on its side."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side + 4, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", exif=exif)
    return content.getvalue()


def split_of(hf: Any, contents: list[bytes | None], **more: list[Any]) -> Any:
    cells = [None if c is None else {"bytes": c, "path": "same.jpg"} for c in contents]
    dataset = hf.Dataset.from_dict({"label": list(range(len(cells))), "picture": cells, **more})
    for column in ("picture", *more):
        dataset = dataset.cast_column(column, hf.Image())
    return dataset


def save(hf: Any, root: Path, **parts: list[bytes | None]) -> Path:
    """A folder as on the hub: a parquet file for each split."""
    for part, contents in parts.items():
        (root / "data").mkdir(parents=True, exist_ok=True)
        split_of(hf, contents).to_parquet(root / f"data/{part}-00000-of-00001.parquet")
    return root


def names(uri: str, split: str) -> list[str]:
    return relative_names(list_images(uri, split=split))


def test_pixels_and_batches_are_those_of_the_files(hf: Any, tmp_path: Path) -> None:
    contents = [photo(seed) for seed in range(7)]
    uri = f"hf:{save(hf, tmp_path / 'set', train=contents, test=contents[:2])}"
    files = []
    for number, content in enumerate(contents):
        files.append(tmp_path / f"{number}.jpg")
        files[-1].write_bytes(content)
    rows = list_images(uri, split="train")
    assert [str(row) for row in rows[:2]] == [f"{uri}/train/00000000", f"{uri}/train/00000001"]
    for row, file in zip(rows, files, strict=True):
        assert row.read() == file.read_bytes()
        assert row.size == file.stat().st_size
        assert read_image(row).shape == (3, 24, 20)  # upright
        assert torch.equal(read_image(row), read_image(file))
    options = {"batch_size": 4, "seed": 1, "epoch": 2}
    of_rows, of_files = (ImageDataset(p, size=16, repeat=5, cache_bytes=0) for p in (rows, files))
    expected = torch.stack(list(batches(of_files, **options)))
    for workers in (0, 4):
        found = list(batches(of_rows, **options, workers=workers))
        assert torch.equal(torch.stack(found), expected)


@pytest.mark.parametrize("val", ["validation", "val", "test"])
def test_its_own_splits_are_taken(hf: Any, tmp_path: Path, val: str) -> None:
    content = photo(0)
    others = {"test": [content] * 3} if val != "test" else {}
    parts = {"train": [content] * 4, val: [content] * 2, **others}
    dataset = hf.DatasetDict({part: split_of(hf, rows) for part, rows in parts.items()})
    dataset.save_to_disk(tmp_path / "set")
    uri = f"hf:{tmp_path / 'set'}"
    assert names(uri, "train") == [f"train/{row:08d}" for row in range(4)]
    assert names(uri, "val") == [f"{val}/{row:08d}" for row in range(2)]
    assert len(names(uri, "all")) == sum(map(len, parts.values()))
    only = names(f"{uri}:train", "train"), names(f"{uri}:train", "val")
    assert len(only[1]) == 1 and sorted(only[0] + only[1]) == names(uri, "train")
    with pytest.raises(InputError, match=rf"no such split; expected '{uri}:train', '{uri}:{val}'"):
        list_images(f"{uri}:valid", split="all")


@pytest.mark.parametrize("only", ["train", "test"])
def test_a_single_split_is_split_by_hash(hf: Any, tmp_path: Path, only: str) -> None:
    uri = f"hf:{save(hf, tmp_path / 'set', **{only: [photo(0)] * 100})}"
    train, val = names(uri, "train"), names(uri, "val")
    assert 2 <= len(val) <= 25
    assert sorted(train + val) == names(uri, "all") == [f"{only}/{row:08d}" for row in range(100)]
    split_of(hf, [photo(0)] * 200).save_to_disk(tmp_path / "more")
    longer = [name.partition("/")[2] for name in names(f"hf:{tmp_path / 'more'}", "all")]
    assert longer == [f"{row:08d}" for row in range(200)]


def test_one_of_several_configurations(hf: Any, tmp_path: Path) -> None:
    root = tmp_path / "set"
    for config, seed in (("small", 1), ("large", 2)):
        save(hf, root / config, train=[photo(seed)] * seed)
    files = "".join(
        f"- config_name: {c}\n  data_files: {c}/data/*.parquet\n" for c in ("small", "large")
    )
    (root / "README.md").write_text(f"---\nconfigs:\n{files}---\n")
    with pytest.raises(
        InputError, match=rf"\['small', 'large'\].*; choose one by hf:{root}@CONFIG"
    ):
        list_images(f"hf:{root}", split="all")
    assert [row.read() for row in list_images(f"hf:{root}@large", split="all")] == [photo(2)] * 2
    assert [row.read() for row in list_images(f"hf:{root}@small:train", split="all")] == [photo(1)]
    with pytest.raises(InputError, match=rf"hf:{root}@huge' cannot be loaded: .*huge"):
        list_images(f"hf:{root}@huge", split="all")
    root.rename(root.with_name("set@large"))
    assert len(list_images(f"hf:{root}@large@small", split="all")) == 1
    uri = f"hf:{save(hf, tmp_path / 'me@home', train=[photo(3)])}"  # a folder, no configuration
    assert [row.read() for row in list_images(uri, split="all")] == [photo(3)]


def test_what_stops_the_library_while_it_reads_is_named(hf: Any, tmp_path: Path) -> None:
    data = save(hf, tmp_path / "set", train=[photo(0)]) / "data"
    (data / "train-00001-of-00001.parquet").write_bytes(b"half a file")
    with pytest.raises(InputError, match=r"cannot be loaded: An error occurred .*: Parquet magic"):
        list_images(f"hf:{tmp_path / 'set'}", split="all")


def test_a_folder_of_image_files_is_read_from_them(hf: Any, tmp_path: Path) -> None:
    (tmp_path / "set/train").mkdir(parents=True)
    (tmp_path / "set/train/a.jpg").write_bytes(photo(3))
    (tmp_path / "set/train/b.jpg").write_bytes(photo(4))
    rows = list_images(f"hf:{tmp_path / 'set'}", split="all")
    assert [row.read() for row in rows] == [photo(3), photo(4)]


def test_rows_without_a_readable_image_are_skipped(hf: Any, tmp_path: Path) -> None:
    save(hf, tmp_path / "set", train=[photo(0), None, b"", b"no image", photo(1)])
    uri = f"hf:{tmp_path / 'set'}"
    dataset = ImageDataset(list_images(uri, split="all"), size=8, crop="center", flip=False)
    clean = [dataset.get(0, 0), dataset.get(0, 4)]
    assert all(torch.equal(dataset.get(0, row), clean[1]) for row in (1, 2, 3))
    reasons = ["the row has no image", "the file is empty", "not an image of a known format"]
    assert dataset.skipped == {
        f"{uri}/train/{row:08d}": f"cannot read image '{uri}/train/{row:08d}': {reason}"
        for row, reason in enumerate(reasons, 1)
    }


def test_a_row_may_name_no_pipe_or_device(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, reason in (("no", "No such file"), (".", "not a reg"), ("pipe", "not a reg")):
        cell = {"bytes": None, "path": str(tmp_path / name)}
        row = RowImage(tmp_path, "0", None, None, [{"image": cell}], "image")
        with pytest.raises(ImageReadError, match=reason):
            read_image(row)


def test_columns_that_do_not_decide(hf: Any, tmp_path: Path) -> None:
    split_of(hf, [photo(0)], mask=[None]).save_to_disk(tmp_path / "two")
    with pytest.raises(InputError, match="has 2 image columns; expected one among label, picture"):
        list_images(f"hf:{tmp_path / 'two'}", split="all")
    hf.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "none")
    with pytest.raises(InputError, match="has 0 image columns; expected one among text"):
        list_images(f"hf:{tmp_path / 'none'}", split="all")


def test_a_dataset_that_is_not_there(hf: Any, tmp_path: Path) -> None:
    for name in ("owner/none", str(tmp_path / "nowhere"), str(tmp_path)):
        with pytest.raises(InputError, match=rf"data 'hf:{name}' cannot be loaded: ") as error:
            list_images(f"hf:{name}", split="all")
        assert "\n" not in str(error.value)
