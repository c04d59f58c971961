from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from msvq_fast.data import list_images, list_labelled_images
from msvq_fast.ops.checks import InputError


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def write(root: Path, *names: str) -> Path:
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(seed))
    return root


def shard(path: Path, **members: bytes) -> str:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return f"wds:{path}"


def labels(uri: str | Path, split: str = "all") -> list[str]:
    found = list_labelled_images(uri, split=split)
    assert [str(image) for image, _ in found] == list(map(str, list_images(uri, split=split)))
    return [label for _, label in found]


def test_of_files_the_first_folder(tmp_path: Path) -> None:
    names = ("cat/1.png", "dog/a/2.png", "dog/3.png")
    assert labels(write(tmp_path / "plain", *names)) == ["cat", "dog", "dog"]
    parts = [f"{part}/{name}" for part in ("train", "val") for name in names[part == "val" :]]
    split = write(tmp_path / "split", *parts)
    assert labels(split, "train") == ["cat", "dog", "dog"] and labels(split, "val") == ["dog"] * 2


@pytest.mark.parametrize("val", ["val", "validation"])
def test_a_split_is_no_class(tmp_path: Path, val: str) -> None:
    root = write(
        tmp_path, "train/cat/1.png", "train/dog/a/2.png", f"{val}/cat/3.png", "test/dog/4.png"
    )
    assert labels(root) == ["dog", "cat", "dog", "cat"]
    assert labels(root, "train") == ["cat", "dog"] and labels(root, "val") == ["cat"]
    write(root, f"{val}/5.png")
    with pytest.raises(InputError, match=rf"has no class for '{val}/5\.png'"):
        list_labelled_images(root, split="all")


@pytest.mark.parametrize("only", ["train", "val", "test"])
def test_a_split_is_no_class_where_it_is_all_there_is(tmp_path: Path, only: str) -> None:
    root = write(tmp_path, *(f"{only}/{kind}/{i}.png" for kind in ("cat", "dog") for i in range(3)))
    if only == "train":
        (root / "test").mkdir()  # of no image, as it often is
    assert labels(root) == ["cat"] * 3 + ["dog"] * 3
    if only == "train":
        assert sorted(labels(root, "train") + labels(root, "val")) == labels(root)


@pytest.mark.parametrize("only", ["val", "test"])
def test_classes_of_what_is_held_out_alone(tmp_path: Path, only: str) -> None:
    root = write(tmp_path, f"{only}/cat/1.png", f"{only}/train/2.png", f"{only}/train/3.png")
    assert labels(root, "val") == labels(root) == ["cat", "train", "train"]
    write(root, "validation/cat/4.png")
    assert len(labels(root)) == 4 and "train" in labels(root) and only not in labels(root)
    only_one = write(tmp_path / "one", f"{only}/val/1.png", f"{only}/val/2.png")
    assert labels(only_one, "val") == labels(only_one) == ["val", "val"]


def test_a_class_may_be_called_as_a_split(tmp_path: Path) -> None:
    assert labels(write(tmp_path, "plane/1.png", "train/2.png")) == ["plane", "train"]


def test_a_file_outside_all_folders_has_none(tmp_path: Path) -> None:
    root = write(tmp_path, "cat/1.png", "2.png")
    with pytest.raises(InputError, match=r"has no class for '2\.png'; expected a folder for each"):
        list_labelled_images(root, split="all")


def test_of_members_the_text_beside_them_or_their_folder(tmp_path: Path) -> None:
    members = {
        "1.cls": b"207\n",
        "1.png": picture(1),
        "cat/2.png": picture(2),
        "cat/3.seg.png": picture(3),
        "cat/3.png": picture(3),
        "cat/3.cls": "höhle".encode(),
        "4.png": picture(4),
        "4.cls": b"1",
    }
    uri = shard(tmp_path / "a.tar", **members)
    assert labels(uri) == ["207", "1", "cat", "höhle"]
    uri = shard(tmp_path / "b.tar", **{"5.png": picture(5), "5.cls": b"", "6.cls": b"3"})
    assert list_images(uri, split="all")
    with pytest.raises(InputError, match=r"has no class for 'b\.tar/5\.png'"):
        list_labelled_images(uri, split="all")


@pytest.fixture
def hf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


def test_of_rows_the_name_in_the_column_of_classes(hf: Any, tmp_path: Path) -> None:
    def rows(numbers: list[int], **more: list[int]) -> Any:
        cells = [{"bytes": picture(n), "path": None} for n in range(len(numbers))]
        dataset = hf.Dataset.from_dict({"picture": cells, "kind": numbers, **more})
        for column in ("kind", *more):
            dataset = dataset.cast_column(column, hf.ClassLabel(names=["tench, a fish", "hen"]))
        return dataset.cast_column("picture", hf.Image())

    for name, dataset in {
        "good": rows([1, 0, 1]),
        "unknown": rows([1, -1, 0]),
        "two": rows([1, 0, 1], other=[0, 0, 0]),
    }.items():
        dataset.save_to_disk(tmp_path / name)
    assert labels(f"hf:{tmp_path / 'good'}") == ["hen", "tench, a fish", "hen"]
    for name, row in (("unknown", 1), ("two", 0)):
        with pytest.raises(InputError, match=f"has no class for 'all/0000000{row}'"):
            list_labelled_images(f"hf:{tmp_path / name}", split="all")
