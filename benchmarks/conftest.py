"""One way to time, and one format of result files.

``pytest benchmarks/ --benchmark-only`` prints a table per group; ``--save-results DIR`` also writes
one JSON file per suite, which README's tables are made from.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

SCHEMA = 1
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "opencv-python-headless",
    "kornia",
    "faiss-cpu",
    "vector-quantize-pytorch",
)
_results: dict[str, list[dict[str, Any]]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--save-results", metavar="DIR", help="write one JSON file per suite here")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def multiply_adds_per_second() -> float:
    """The most that a float32 matrix product reaches here: the floor of compute-bound ops."""
    a, times = torch.randn(1024, 1024), []
    for _ in range(20):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 1024**3 / min(times)


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """``measure(group, name, function, rounds=15, warmup=3, **extra)`` times calls of ``function``.

    Wall time of single calls after a few that do not count; median and interquartile range. With
    ``floor_s``, the time that the machine's limit allows, the result also has ``percent_of_floor``.
    """

    def run(
        group: str,
        name: str,
        function: Callable[[], object],
        *,
        rounds: int = 15,
        warmup: int = 3,
        **extra: Any,
    ) -> None:
        benchmark.group = group
        benchmark.name = name
        benchmark.pedantic(function, rounds=rounds, iterations=1, warmup_rounds=warmup)
        if benchmark.disabled:
            return
        times = benchmark.stats.stats.sorted_data
        quartiles = statistics.quantiles(times, n=4)
        if "floor_s" in extra:
            extra["percent_of_floor"] = 100 * extra["floor_s"] / statistics.median(times)
        suite = request.path.stem.removeprefix("bench_")
        _results.setdefault(suite, []).append(
            {
                "group": group,
                "name": name,
                "median_s": statistics.median(times),
                "iqr_s": quartiles[2] - quartiles[0],
                "rounds": len(times),
                "extra": extra,
            }
        )

    return run


def pytest_sessionfinish(session: pytest.Session) -> None:
    folder = session.config.getoption("--save-results")
    if not folder:
        return
    machine = describe_machine()
    slug = re.sub(r"[^a-z0-9]+", "-", machine["cpu"].lower()).strip("-")
    Path(folder).mkdir(parents=True, exist_ok=True)
    for suite, results in _results.items():
        record = {
            "schema": SCHEMA,
            "suite": suite,
            "commit": _commit(),
            "date": datetime.date.today().isoformat(),
            "device": "cpu",
            "machine": machine,
            "versions": _versions(),
            "results": results,
        }
        path = Path(folder) / f"{suite}--{slug}--cpu.json"
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


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


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return done.stdout.strip() or "unknown"
