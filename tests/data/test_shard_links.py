from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from msvq_fast.data import (
    ImageDataset,
    ImageReadError,
    list_images,
    list_labelled_images,
    read_image,
)


def picture(path: Path, seed: int) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def pack(shard: Path, folder: Path, *names: str) -> str:
    with tarfile.open(shard, "w") as tar:
        for name in names:
            tar.add(folder / name, arcname=f"./{name}")
    return f"wds:{shard}"


def test_links_are_the_images_of_the_unpacked_folder(tmp_path: Path) -> None:
    folder = tmp_path / "x.tar"
    first, store = picture(folder / "cat/1.png", 1), picture(folder / "store.bin.png", 2)
    os.link(first, folder / "cat/2.png")
    os.link(store, folder / "3.png")
    (folder / "cat/4.png").symlink_to("../store.bin.png")
    (folder / "5.png").symlink_to("cat/9.png")  # which comes after it
    picture(folder / "cat/9.png", 9)
    names = ("store.bin.png", "cat/1.png", "cat/2.png", "3.png", "cat/4.png", "5.png", "cat/9.png")
    (tmp_path / "shards").mkdir()
    uri = pack(tmp_path / "shards/x.tar", folder, *names)
    with tarfile.open(tmp_path / "shards/x.tar") as tar:
        assert [info.islnk() for info in tar] == [False, False, True, True, False, False, False]
    store.rename(folder / ".store")  # no image by its name in a shard: two extensions
    (folder / "cat/4.png").unlink()
    (folder / "cat/4.png").symlink_to("../.store")
    stored, files = list_images(uri, split="all"), list_images(folder, split="all")
    assert [image.path.name for image in stored] == [path.name for path in files]
    for image, file in zip(stored, files, strict=True):
        assert torch.equal(read_image(image), read_image(file))


def test_a_linked_class_counts(tmp_path: Path) -> None:
    picture(tmp_path / "1.png", 1)
    picture(tmp_path / "2.png", 2)
    (tmp_path / "1.cls").write_text("7")
    os.link(tmp_path / "1.cls", tmp_path / "2.cls")
    uri = pack(tmp_path / "x.tar", tmp_path, "1.png", "1.cls", "2.png", "2.cls")
    assert [label for _, label in list_labelled_images(uri, split="all")] == ["7", "7"]


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        (tarfile.LNKTYPE, "absent.png"),
        (tarfile.SYMTYPE, "absent.png"),
        (tarfile.SYMTYPE, "/1.png"),
        (tarfile.SYMTYPE, "../1.png"),
        (tarfile.SYMTYPE, "2.png"),
    ],
)
def test_links_to_no_member_are_named(tmp_path: Path, kind: bytes, target: str) -> None:
    picture(tmp_path / "1.png", 1)
    uri = pack(tmp_path / "x.tar", tmp_path, "1.png")
    with tarfile.open(tmp_path / "x.tar", "a") as tar:
        info = tarfile.TarInfo("2.png")
        info.type, info.linkname = kind, target
        tar.addfile(info)
    images = list_images(uri, split="all")
    reason = f"2.png': a link to {target!r}, which is no file of the shard"
    with pytest.raises(ImageReadError, match=reason):
        read_image(images[1])
    dataset = ImageDataset(images, size=8)
    assert dataset.get(0, 0).shape == dataset.get(0, 1).shape
    assert list(dataset.skipped) == [str(images[1])]


def test_a_link_keeps_the_file_that_it_was_made_of(tmp_path: Path) -> None:
    shard = tmp_path / "x.tar"
    with tarfile.open(shard, "w") as tar:
        for name, content in (
            ("a.png", b"old"),
            ("b.png", None),
            ("c.png", None),
            ("a.png", b"new"),
        ):
            info = tarfile.TarInfo(name)
            if content is None:
                info.type = tarfile.LNKTYPE if name == "b.png" else tarfile.SYMTYPE
                info.linkname = "a.png"
            else:
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content or b""))
    assert [image.read() for image in list_images(f"wds:{shard}", split="all")] == [
        b"new",
        b"old",
        b"new",
    ]
