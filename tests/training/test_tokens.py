from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from msvq_fast.ops import InputError
from msvq_fast.training.tokens import load_tokens, read_shard, write_index, write_shard

CODES = torch.arange(5 * 4).view(5, 1, 2, 2)  # of five shards with one image each


@pytest.fixture
def index(tmp_path: Path) -> dict[str, Any]:
    """The index of shards in the folder, which is written too."""
    shards = [write_shard(tmp_path, n, [f"{n}"], [grid], [n % 2]) for n, grid in enumerate(CODES)]
    settings = {"weights_sha256": "", "size": 8}
    index = {"settings": settings, "num_codes": 20, "grids": [[2, 2]], "classes": ["a", "b"]}
    index |= {"files": 5, "files_done": 5, "complete": True, "shards": shards}
    write_index(tmp_path, index)
    return index


def test_shards_are_loaded_one_at_a_time(
    index: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[weakref.ref[torch.Tensor]] = []

    def reading(folder: Path, shard: dict[str, object]) -> dict[str, torch.Tensor]:
        assert sum(part() is not None for part in read) <= 1  # the one before
        part = read_shard(folder, shard)
        read.append(weakref.ref(part["codes_0"]))
        return part

    monkeypatch.setattr("msvq_fast.training.tokens.read_shard", reading)
    loaded = load_tokens(tmp_path)
    assert torch.equal(loaded.batch(torch.arange(5))[0], CODES[:, 0])
    assert loaded.labels is not None and loaded.labels.tolist() == [0, 1, 0, 1, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_codes": 19}, r"spans \[16, 19\]; expected 0 to 18"),
        ({"num_codes": "many"}, "num_codes is no int"),
        ({"grids": [[2, 3]]}, "holds no codes_0 of torch.uint16"),
        ({"grids": [[2, 2], [2, 2]]}, "holds no codes_1"),
        ({"grids": [[10**9, 10**9]]}, "no memory for 5 images"),
        ({"grids": []}, "is not an index of tokens"),
        ({"classes": ["a"]}, r"labels spans \[1, 1\]; expected 0 to 0"),
        ({"shards": []}, "complete without a shard"),
        ({"settings": {}}, "is not an index of tokens"),
        ({"images": 9}, r"holds no codes_0 of torch.uint16 \(9, 2, 2\)"),
        ({"file": "/dev/zero"}, "expected a file beside it"),
        ({"file": "shard\0"}, "expected a file beside it"),
        ({"images": 10**30}, "no numbers of 1 to 2147483647"),
        ({"num_codes": 10**30}, "no numbers of 1 to 2147483647"),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_named(
    index: dict[str, Any], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    shards = index["shards"]
    if change.keys() <= shards[0].keys():
        change = {"shards": [{**shards[0], **change}, *shards[1:]]}
    write_index(tmp_path, {**index, **change})
    with pytest.raises(InputError, match=message):
        load_tokens(tmp_path)


@pytest.mark.parametrize("key", ["file", "images", "bytes", "crc32"])
def test_an_index_without_a_field_of_a_shard_is_named(
    index: dict[str, Any], tmp_path: Path, key: str
) -> None:
    del index["shards"][1][key]
    write_index(tmp_path, index)
    with pytest.raises(InputError, match=f"is not an index of tokens: '{key}'"):
        load_tokens(tmp_path)
