from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

import msvq_fast.data
from msvq_fast.data import list_images, listing, read_image
from msvq_fast.ops.checks import InputError

PHOTOS = Path(msvq_fast.data.__file__).parent / "photos"


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def names_of(root: Path, split: str) -> list[str]:
    return [path.relative_to(root).as_posix() for path in list_images(root, split=split)]


# --- the built-in photographs ---


def test_builtin_photos_are_split_by_photo() -> None:
    train, val, every = (
        [path.stem for path in list_images("builtin:photos", split=split)]
        for split in ("train", "val", "all")
    )
    assert train == ["Picture_0B", "Wine", "aitzgorri", "life", "seeding", "sunset"]
    assert val == ["Picture_1A", "friends", "picosdeeuropa"]
    assert sorted(every) == sorted(train + val)


def test_builtin_photos_are_attributed_small_and_readable() -> None:
    attribution = (PHOTOS / "ATTRIBUTION.md").read_text(encoding="utf-8")
    paths = list_images("builtin:photos", split="all")
    for path in paths:
        relative = path.relative_to(PHOTOS).as_posix()
        (row,) = [line for line in attribution.splitlines() if f"`{relative}`" in line]
        assert "CC BY 4.0](https://" in row or "CC0 1.0](https://" in row
        with Image.open(path) as image:
            assert min(image.size) == 1024 and not image.getexif()
    assert attribution.count(".webp`") == len(paths)
    assert sum(path.stat().st_size for path in paths) < 3.3e6
    assert read_image(paths[0]).float().std() > 20


# --- listing ---


def test_folder_is_searched_in_a_fixed_order(tmp_path: Path) -> None:
    wanted = ["B.PNG", "a b.jpg", "a/é 猫.webp", "a/z.tiff", "c.jpeg"]
    touch(tmp_path, *reversed(wanted), "notes.txt", ".hidden.png", ".cache/x.png", "a/no_suffix")
    assert names_of(tmp_path, "all") == sorted(wanted)
    assert list_images(str(tmp_path), split="all") == list_images(tmp_path, split="all")


def test_train_and_val_folders_are_the_splits(tmp_path: Path) -> None:
    touch(tmp_path, "train/cat/1.png", "train/2.png", "val/cat/1.png", "test/1.png")
    assert names_of(tmp_path, "train") == ["train/2.png", "train/cat/1.png"]
    assert names_of(tmp_path, "val") == ["val/cat/1.png"]
    assert len(names_of(tmp_path, "all")) == 4


def test_validation_is_val_where_there_is_no_val(tmp_path: Path) -> None:
    for part in ("train", "validation"):
        touch(tmp_path / part, *(f"{i}.png" for i in range(5)))
    assert names_of(tmp_path, "train") == [f"train/{i}.png" for i in range(5)]
    assert names_of(tmp_path, "val") == [f"validation/{i}.png" for i in range(5)]
    touch(tmp_path, "val/4.png")
    assert names_of(tmp_path, "val") == ["val/4.png"]


def test_test_is_val_where_there_is_no_other_and_never_trained_on(tmp_path: Path) -> None:
    for part in ("train", "test"):
        touch(tmp_path / part, *(f"{i}.png" for i in range(5)))
    assert names_of(tmp_path, "train") == [f"train/{i}.png" for i in range(5)]
    assert names_of(tmp_path, "val") == [f"test/{i}.png" for i in range(5)]
    touch(tmp_path, "validation/4.png")
    assert names_of(tmp_path, "val") == ["validation/4.png"]


def test_more_than_one_held_out_part_alone(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{part}/{i}.png" for part in ("test", "validation") for i in range(5)))
    assert names_of(tmp_path, "val") == [f"validation/{i}.png" for i in range(5)]
    with pytest.raises(InputError, match=r"has images in validation/ and test/ alone, held out"):
        list_images(tmp_path, split="train")


def test_a_test_folder_without_images_is_no_part(tmp_path: Path) -> None:
    touch(tmp_path, "test/list.txt", *(f"train/{i}.png" for i in range(5)))
    assert len(names_of(tmp_path, "train")) + len(names_of(tmp_path, "val")) == 5
    touch(tmp_path, "val/list.txt")
    with pytest.raises(InputError, match=r"val' has no image"):
        list_images(tmp_path, split="val")


def test_a_folder_named_train_alone_is_split_by_file(tmp_path: Path) -> None:
    touch(tmp_path, "train/1.png", "train/2.png", "train/3.png")
    train, val = names_of(tmp_path, "train"), names_of(tmp_path, "val")
    assert train and val and len(train + val) == 3


@pytest.mark.parametrize("part", ["val", "validation", "test"])
def test_what_is_held_out_is_not_trained_on_where_train_is_missing(
    tmp_path: Path, part: str
) -> None:
    touch(tmp_path, f"{part}/cat/1.png", f"{part}/2.png", f"{part}/3.png")
    with pytest.raises(InputError, match=rf"has images in {part}/ alone, held out; expected"):
        list_images(tmp_path, split="train")
    assert names_of(tmp_path, "val") == names_of(tmp_path, "all")
    assert len(names_of(tmp_path, "val")) == 3
    assert "cat/1.png" in listing.list_named_images(tmp_path, split="val")  # as beside train/
    assert names_of(tmp_path / part, "train")
    touch(tmp_path, "plane/1.png")  # then it may be a class
    assert names_of(tmp_path, "train")


@pytest.mark.parametrize("count", [2, 3, 10, 400])
def test_hash_split_partitions_files(tmp_path: Path, count: int) -> None:
    touch(tmp_path, *(f"{i // 50}/{i}.png" for i in range(count)))
    train, val = names_of(tmp_path, "train"), names_of(tmp_path, "val")
    assert train and val
    assert sorted(train + val) == names_of(tmp_path, "all")
    if count == 400:
        assert 20 <= len(val) <= 60


def test_hash_split_stays_when_files_are_added_or_the_folder_moves(tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    touch(small, *(f"{i}.png" for i in range(100)))
    touch(large, *(f"{i}.png" for i in range(200)))
    assert set(names_of(small, "val")) < set(names_of(large, "val"))
    assert set(names_of(small, "train")) < set(names_of(large, "train"))
    # For good: another version would train on what was held out.
    assert names_of(small, "val") == [f"{i}.png" for i in (11, 26, 42, 44, 50, 61, 79, 92, 96, 97)]


def test_hash_split_does_not_depend_on_how_accents_are_stored(tmp_path: Path) -> None:
    names = [f"é{i}.png" for i in range(40)]
    touch(tmp_path / "composed", *names)
    touch(tmp_path / "apart", *(unicodedata.normalize("NFD", name) for name in names))
    composed, apart = (names_of(tmp_path / folder, "val") for folder in ("composed", "apart"))
    assert set(composed).isdisjoint(apart)
    assert [unicodedata.normalize("NFC", name) for name in apart] == composed


def test_hash_split_leaves_one_to_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "_VAL_SHARE", 1.0)  # as where all names happen to lie below it
    touch(tmp_path, *(f"{i}.png" for i in range(3)))
    assert len(names_of(tmp_path, "train")) == 1 and len(names_of(tmp_path, "val")) == 2


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    touch(tmp_path, "store/1.png", "data/0.png")
    (tmp_path / "data/more").symlink_to(tmp_path / "store")
    (tmp_path / "store/loop").symlink_to(tmp_path / "store")
    assert names_of(tmp_path / "data", "all") == ["0.png", "more/1.png"]


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("missing", ["does not exist", "missing"]),
        ("file.png", ["not a folder", "file.png"]),
        ("empty", ["no image", ".jpg", ".webp"]),
        ("halves", ["no image", os.path.join("halves", "val")]),
        ("one", ["single image", "'train' and 'val'"]),
        ("builtin:faces", ["builtin:faces", "'builtin:photos'"]),
        ("s3:bucket", ["not supported", "folder", "'builtin:photos'", "'wds:SHARDS'"]),
        ("C:missing", ["does not exist"]),
    ],
)
def test_bad_uri(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "file.png", "empty/readme.txt", "one/1.png", "halves/train/1.png")
    (tmp_path / "halves/val").mkdir()
    with pytest.raises(InputError) as error:
        list_images(uri, split="val")
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words)


def test_bad_split() -> None:
    with pytest.raises(InputError, match=r"split='test'; expected one of 'train', 'val', 'all'"):
        list_images("builtin:photos", split="test")
