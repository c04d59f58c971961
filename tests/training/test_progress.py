from __future__ import annotations

import json
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from msvq_fast.training.progress import MetricsFile


def test_every_number_is_a_scalar_of_its_kind_scale_and_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            calls.append((folder, purge_step))

        def add_scalar(self, *scalar: object) -> None:
            calls.append(scalar)

        def close(self) -> None:
            calls.append("closed")

    module = SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    metrics = MetricsFile(tmp_path, step=4, tensorboard=True)
    record = {"kind": "train", "step": 7, "loss": 0.5, "usage": [50.0, 100.0], "note": "none"}
    metrics.write(record)
    metrics.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == record
    assert calls == [
        (str(tmp_path / "tensorboard"), 5),
        ("train/loss", 0.5, 7),
        ("train/usage/0", 50.0, 7),
        ("train/usage/1", 100.0, 7),
        "closed",
    ]


def test_a_long_file_is_taken_over_line_by_line(tmp_path: Path) -> None:
    """Ten million steps leave half a gigabyte."""
    lines = [json.dumps({"step": step, "loss": "x" * 400}) + "\n" for step in range(1, 3001)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 3')
    tracemalloc.start()
    MetricsFile(tmp_path, step=2000, tensorboard=False).close()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines[:2000])
    assert peak < 200_000
