from __future__ import annotations

import gzip
import io
import os
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from msvq_fast.data import (
    ImageDataset,
    ImageReadError,
    StoredImage,
    batches,
    evaluation_tiles,
    list_images,
    read_image,
    relative_names,
)
from msvq_fast.data import shards as shards_module
from msvq_fast.ops.checks import InputError


def picture(seed: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (20 + seed, 24, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind)
    return content.getvalue()


def write(
    shard: Path, members: dict[str, bytes], *, format: int = tarfile.PAX_FORMAT, mtime: float = 0
) -> Path:
    shard.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(shard, "w", format=format) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), mtime
            tar.addfile(info, io.BytesIO(content))
    return shard


def unpack(root: Path, out: Path, *patterns: str) -> Path:
    """Every shard as a folder of its name."""
    for shard in sorted(path for pattern in patterns for path in root.glob(pattern)):
        with tarfile.open(shard) as tar:
            for info in tar:
                place = out / shard.relative_to(root) / info.name
                place.parent.mkdir(parents=True, exist_ok=True)
                content = tar.extractfile(info)
                assert content is not None
                place.write_bytes(content.read())
    return out


def paths(uri: str, split: str = "all") -> list[str]:
    return [str(image) for image in list_images(uri, split=split)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three shards of six, five and one pictures, with captions and classes."""
    for shard, count in enumerate((6, 5, 1)):
        members = {}
        for number in range(count):
            members[f"{shard}{number}.cls"] = b"7"
            members[f"{shard}{number}.png"] = picture(6 * shard + number)
        write(tmp_path / f"data/shard-{shard:03d}.tar", members)
    return tmp_path / "data"


# --- the same as the unpacked folder ---


@pytest.mark.parametrize("split", ["train", "val", "all"])
def test_a_shard_is_a_folder_of_its_members(root: Path, tmp_path: Path, split: str) -> None:
    folder = unpack(root, tmp_path / "folder", "*.tar")
    stored = list_images(f"wds:{root}/*.tar", split=split)
    files = list_images(folder, split=split)
    assert all(isinstance(image, StoredImage) for image in stored)
    assert [str(image) for image in stored] == [
        str(root / path.relative_to(folder)) for path in files if isinstance(path, Path)
    ]
    assert len(files) in {"train": (9, 10, 11), "val": (1, 2, 3), "all": (12,)}[split]
    for image, file in zip(stored, files, strict=True):
        assert torch.equal(read_image(image), read_image(file))


@pytest.mark.parametrize("workers", [0, 3])
def test_batches_are_those_of_the_folder(root: Path, tmp_path: Path, workers: int) -> None:
    folder = unpack(root, tmp_path / "folder", "*.tar")
    both = []
    for uri in (f"wds:{root}/*.tar", folder):
        dataset = ImageDataset(list_images(uri, split="train"), size=16, repeat=3, cache_bytes=0)
        options = {"batch_size": 4, "seed": 1, "epoch": 3}
        whole = list(batches(dataset, **options, workers=workers))
        rest = list(batches(dataset, **options, workers=workers, start_batch=2))
        assert torch.equal(torch.stack(rest), torch.stack(whole[2:]))
        both.append(torch.stack(whole))
    assert torch.equal(*both)


def test_ranks_partition_the_shards(root: Path) -> None:
    images = list_images(f"wds:{root}/*.tar", split="all")
    dataset = ImageDataset(images, size=20, crop="center", flip=False)
    seen = [
        sample.numpy().tobytes()
        for rank in range(2)
        for batch in batches(dataset, batch_size=3, seed=0, epoch=0, rank=rank, world_size=2)
        for sample in batch
    ]
    assert len(set(seen)) == 12
    assert sorted(seen) == sorted(dataset.get(0, i).numpy().tobytes() for i in range(12))
    names = [
        [name for name, _ in evaluation_tiles(images, size=20, rank=rank, world_size=2)]
        for rank in range(2)
    ]
    assert sorted(names[0] + names[1]) == relative_names(images)


def test_names_keep_their_shard(root: Path) -> None:
    images = list_images(f"wds:{root}/shard-001.tar", split="all")
    assert [name for name, _ in evaluation_tiles(images, size=8, limit=2)] == [
        "shard-001.tar/10.png",
        "shard-001.tar/12.png",
    ]
    tiles = evaluation_tiles(images[:1], size=16, crop="tiles")
    assert [name for name, _ in tiles] == ["shard-001.tar/10.png:0,0"]
    assert (images[0].stem, images[0].path.name) == ("10", "10.png")


def test_many_threads_read_one_shard(root: Path) -> None:
    images = list_images(f"wds:{root}/shard-000.tar", split="all")
    expected = [picture(number) for number in range(6)]
    wrong = []

    def work() -> None:
        for _ in range(50):
            wrong.extend(i for i, image in enumerate(images) if image.read() != expected[i])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- which shards, which members ---


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a-{000..002}.tar", ["a-000.tar", "a-001.tar", "a-002.tar"]),
        ("a-{8..11}.tar", ["a-8.tar", "a-9.tar", "a-10.tar", "a-11.tar"]),
        ("a-{0..10}.tar", [f"a-{i}.tar" for i in range(11)]),  # a lone 0 asks for no zeros
        ("a-{9..010}.tar", ["a-009.tar", "a-010.tar"]),
        ("{a,b}/x.tar", ["a/x.tar", "b/x.tar"]),
        ("{a-{0..1},b}-{x,y}.tar", [f"{p}-{q}.tar" for p in ("a-0", "a-1", "b") for q in "xy"]),
        ("plain.tar", ["plain.tar"]),
    ],
)
def test_braces(pattern: str, expected: list[str], tmp_path: Path) -> None:
    for name in expected:
        write(tmp_path / name, {"i.png": b""})
    found = paths(f"wds:{tmp_path}/{pattern}")
    assert found == sorted(str(tmp_path / name / "i.png") for name in expected)


def test_globs_and_relative_patterns(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(root / "deep/er/shard-9.tar", {"a.png": b""})
    assert len(paths(f"wds:{root}/shard-00[01].tar")) == 11
    assert len(paths(f"wds:{root}/**/*.tar")) == 13
    monkeypatch.setenv("HOME", str(root))
    assert len(paths("wds:~/shard-00[01].tar")) == 11
    monkeypatch.chdir(root)
    assert paths("wds:shard-002.tar") == ["shard-002.tar/20.png"]
    assert paths("wds:*.tar", "val") == [
        str(Path(path).relative_to(root)) for path in paths(f"wds:{root}/*.tar", "val")
    ]


@pytest.mark.parametrize(
    ("train", "val", "pattern"),
    [
        ("train/0.tar", "val/0.tar", "*/*.tar"),
        ("imagenet1k-train-0000.tar", "imagenet1k-validation-00.tar", "imagenet1k-*.tar"),
        ("x_Train_0.tar", "x_val0.tar", "{x_Train_0,x_val0,test-0}.tar"),
        ("x_train_0.tar", "test-0.tar", "{x_train_0,test-0,more-0}.tar"),
    ],
)
def test_shards_that_name_their_split(tmp_path: Path, train: str, val: str, pattern: str) -> None:
    for name in (train, val, "test/0.tar", "test-0.tar", "imagenet1k-test-0.tar", "more-0.tar"):
        write(tmp_path / name, {f"{i}.png": b"" for i in range(30)})
    uri = f"wds:{tmp_path}/{pattern}"
    assert paths(uri, "train") == sorted(f"{tmp_path}/{train}/{i}.png" for i in range(30))
    assert paths(uri, "val") == sorted(f"{tmp_path}/{val}/{i}.png" for i in range(30))
    assert len(paths(uri)) == 90


def test_splits_are_by_hash_unless_both_are_named(tmp_path: Path) -> None:
    for name in ("trainer-0.tar", "train-0.tar", "train-val-0.tar"):
        write(tmp_path / name, {f"{i}.png": b"" for i in range(60)})
    train, val = (paths(f"wds:{tmp_path}/*.tar", split) for split in ("train", "val"))
    assert sorted(train + val) == paths(f"wds:{tmp_path}/*.tar")
    assert 5 < len(val) < 40
    assert set(paths(f"wds:{tmp_path}/train-0.tar", "val")) < set(val)


def test_which_members_are_images(tmp_path: Path) -> None:
    images = ["a.jpg", "b.PNG", "./c.webp", "sub/d.jpeg", "/e.tiff"]
    others = ["a.txt", "a.seg.png", "a.json", "jpg", "._a.jpg", ".hidden/a.jpg", "../f.jpg"]
    shard = write(tmp_path / "x.tar", dict.fromkeys(images + others, b"1"))
    with tarfile.open(shard, "a") as tar:
        folder = tarfile.TarInfo("folder.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        again = tarfile.TarInfo("a.jpg")  # as an appended update
        again.size = 3
        tar.addfile(again, io.BytesIO(b"new"))
    found = list_images(f"wds:{shard}", split="all")
    names = sorted(["a.jpg", "b.PNG", "c.webp", "sub/d.jpeg", "e.tiff"])
    assert [str(image) for image in found] == [f"{shard}/{name}" for name in names]
    assert found[0].read() == b"new"


@pytest.mark.parametrize("mtime", [0, 1.5])  # a fraction costs a header more in pax
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_format_is_indexed_as_tarfile_does(
    tmp_path: Path, format: int, mtime: float
) -> None:
    names = [
        "a.png",
        "é 猫.png",
        "d" * 60 + "/" + "e" * 60 + ".png",
        "f" * 96 + ".png",
    ]
    if format != tarfile.USTAR_FORMAT:
        names += ["g" * 150 + ".png", "h" * 300 + "/i.png"]
    members = {name: bytes([i]) * (511 + i) for i, name in enumerate(names, 1)}
    members["empty.png"] = b""
    shard = write(tmp_path / "x.tar", members, format=format, mtime=mtime)
    found = list_images(f"wds:{shard}", split="all")
    assert {str(image): image.read() for image in found} == {
        f"{shard}/{name}": content for name, content in members.items()
    }


def test_a_shard_is_indexed_once_until_it_changes(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"wds:{root}/shard-000.tar"
    before = paths(uri)
    with monkeypatch.context() as patch:
        patch.setattr(shards_module.tarfile, "open", None)
        assert paths(uri) == before
    write(root / "shard-000.tar", {"new.png": picture(0)})
    assert paths(uri) == [f"{root}/shard-000.tar/new.png"]
    write(root / "shard-000.tar", {"old.png": picture(0)})  # as large, but later
    os.utime(root / "shard-000.tar", ns=(1, 1))
    assert paths(uri) == [f"{root}/shard-000.tar/old.png"]


# --- what is broken ---


def flip_byte(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_member_is_skipped_and_noted(tmp_path: Path, workers: int) -> None:
    members = {f"{i}.png": picture(i) for i in range(4)} | {"1.png": b"", "2.png": b"no image"}
    shard = write(tmp_path / "x.tar", members)
    images = list_images(f"wds:{shard}", split="all")
    dataset = ImageDataset(images, size=8, crop="center", flip=False)
    (batch,) = batches(dataset, batch_size=4, seed=0, epoch=0, workers=workers)
    assert len(batch) == 4
    assert dataset.skipped == {
        f"{shard}/1.png": f"cannot read image '{shard}/1.png': the file is empty",
        f"{shard}/2.png": f"cannot read image '{shard}/2.png': not an image of a known format",
    }
    skipped: dict[str, str] = {}
    names = [name for name, _ in evaluation_tiles(images, size=8, skipped=skipped)]
    assert names == ["x.tar/0.png", "x.tar/3.png"] and skipped == dataset.skipped


def test_a_shard_that_shrinks_or_goes_away_while_in_use(root: Path) -> None:
    images = list_images(f"wds:{root}/shard-000.tar", split="all")
    shard = root / "shard-000.tar"
    with open(shard, "r+b") as file:
        file.truncate(images[5].offset + 10)
    assert read_image(images[4]).shape == (3, 24, 24)
    early = images[5].size - 10
    with pytest.raises(ImageReadError, match=rf"05\.png': the shard ends {early} bytes too early"):
        read_image(images[5])
    shard.unlink()
    with pytest.raises(ImageReadError, match=r"shard-000\.tar/00\.png': No such file"):
        read_image(images[0])


def cut_in_a_member(content: bytes) -> bytes:
    return content[:2000]


def cut_in_a_header(content: bytes) -> bytes:
    return content[: content.index(b"02.png") + 100]


def cut_between_members(content: bytes) -> bytes:
    return content[: content.index(b"02.png")]


def break_a_header(content: bytes) -> bytes:
    return flip_byte(content, content.index(b"02.png") + 1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (cut_in_a_member, "is not a whole tar file: unexpected end of data"),
        (cut_in_a_header, "is not a whole tar file: no end mark at byte"),
        (cut_between_members, "is not a whole tar file: no end mark at byte"),
        (break_a_header, "is not a whole tar file: a broken header at byte"),
        (lambda content: b"", "is not a whole tar file: empty file"),
        (lambda content: b"text " * 500, "is not a whole tar file: "),
        (gzip.compress, r"is compressed \(gzip\), .*; uncompress it"),
        (lambda content: b"\x28\xb5\x2f\xfd" + content, r"is compressed \(zstd\)"),
    ],
)
def test_broken_shards_are_named(root: Path, change: Callable[[bytes], bytes], reason: str) -> None:
    shard = root / "shard-000.tar"
    shard.write_bytes(change(shard.read_bytes()))
    with pytest.raises(InputError, match=rf"shard '{shard}' {reason}") as error:
        list_images(f"wds:{root}/*.tar", split="train")
    assert "\n" not in str(error.value)


def header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    fields = name.ljust(124, b"\0") + size.ljust(24, b"\0") + 8 * b" " + kind
    return (fields[:148] + b"%07o\0" % sum(fields) + kind).ljust(512, b"\0")


def test_headers_that_mislead_are_named(tmp_path: Path) -> None:
    shard = write(tmp_path / "x.tar", {"0.png": picture(0)})
    long_name = header(b"././@LongLink", b"1", b"L") + b"x".ljust(512, b"\0")
    for added in (
        header(b"1.png", b"-1"),
        header(b"1.png", b"-1000"),  # its end is its beginning
        header(b"1.png", b"\x80" + (2**70).to_bytes(11, "big")),
        header(b"p", b"32", b"x") + b"26 GNU.sparse.size=nonsense\n".ljust(512, b"\0"),
        2000 * long_name,
    ):
        shard.write_bytes(header(b"0.txt", b"0") + added + bytes(1024))
        with pytest.raises(InputError, match=r"x\.tar' is not a whole tar file: ") as error:
            list_images(f"wds:{shard}", split="all")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("shard-{000..003}.tar", r"there is no shard '.*shard-003\.tar'"),
        ("none-*.tar", r"there is no shard '.*none-\*\.tar'"),
        ("dangling.tar", r"there is no shard '.*dangling\.tar'"),
        ("", r"is a folder; give its shards as 'wds:.*\*\.tar'"),
        ("shard-{000..00x}.tar", r"\{000\.\.00x\} is neither a range such as \{000\.\.009\}"),
        ("shard-{3..0}.tar", r"\{3\.\.0\} is neither a range"),
        ("shard-{000.tar", r"the brace '\{000\.tar' is not closed"),
        ("text.tar", r"has no image; looked for \.bmp"),
        ("one.tar", "has a single image and cannot be split"),
    ],
)
def test_bad_patterns(root: Path, pattern: str, reason: str) -> None:
    write(root / "text.tar", {"a.txt": b"text"})
    write(root / "one.tar", {"a.png": b""})
    (root / "dangling.tar").symlink_to(root / "nowhere.tar")
    with pytest.raises(InputError, match=reason) as error:
        list_images(f"wds:{root}/{pattern}", split="train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("place", ["https://host/{0..9}.tar", "s3://bucket/x.tar", "pipe:cat x"])
def test_shards_elsewhere_are_refused(place: str) -> None:
    with pytest.raises(InputError, match="is not on this machine; download the shards first"):
        list_images(f"wds:{place}", split="all")
