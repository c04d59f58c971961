"""A folder of small pictures and a model that takes a step on them in milliseconds."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from msvq_fast.cli import main

SMALL_MODEL = [
    "--model.resolution=16",
    "--model.latents=[2,4]",
    "--model.width=8",
    "--model.code_dim=4",
    "--model.num_codes=8",
    "--model.num_residual_blocks=1",
    "--model.codebook_init=uniform",
    "--model.restart_below=0",
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads cost such small models more than they give, much more on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten smooth pictures of 24 x 28 pixels for training, two for validation."""
    root = tmp_path_factory.mktemp("pictures")
    y, x = np.mgrid[0:24, 0:28]
    for number in range(12):
        folder = root / ("train" if number < 10 else "val")
        folder.mkdir(exist_ok=True)
        waves = [np.sin(x * (0.1 + 0.05 * number) + c + y * 0.07 * number) for c in range(3)]
        pixels = (127.5 + 120 * np.stack(waves, -1)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="session")
def shards(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same pictures in the same order in three shards."""
    root = tmp_path_factory.mktemp("shards")
    for split in ("train", "val"):
        files = sorted((pictures / split).iterdir(), key=lambda path: path.name)
        for start in range(0, len(files), 6):
            with tarfile.open(root / f"{split}-{start // 6:03d}.tar", "w") as tar:
                for file in files[start : start + 6]:
                    tar.add(file, arcname=file.name)
    return f"wds:{root}/*.tar"


@pytest.fixture
def train(pictures: Path) -> Callable[..., int]:
    """``train(out, "--steps=3", ...)``: the exit code of ``msvq train`` on the small model."""

    def run(out: Path, *options: str) -> int:
        return main(train_arguments(pictures, out, *options))

    return run


@pytest.fixture
def train_command(pictures: Path) -> Callable[..., list[str]]:
    """The arguments that ``train`` passes, for another process."""
    return lambda out, *options: train_arguments(pictures, out, *options)


@pytest.fixture
def read_metrics() -> Callable[[Path], list[dict[str, Any]]]:
    """Lines of ``metrics.jsonl`` without the figures that a clock decides."""

    def read(out: Path) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        clock = ("steps_per_second", "images_per_second", "eta_seconds")
        return [{k: v for k, v in line.items() if k not in clock} for line in lines]

    return read


def train_arguments(pictures: Path, out: Path, *options: str) -> list[str]:
    # Ten pictures twice, four at a time: five steps an epoch.
    settings = ["--batch_size=4", "--repeat=2", "--workers=0", "--log_every=2", "--device=cpu"]
    folders = [f"--data={pictures}", f"--out={out}"]
    return ["train", *folders, *SMALL_MODEL, *settings, *options]
