"""One way to time, and one format of result files.

``pytest benchmarks/ --benchmark-only`` prints a table per group; ``--save-results DIR`` also writes
one JSON file per suite, which README's tables are made from.
"""

from __future__ import annotations

import datetime
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import pytest
import torch

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
    described = machine.describe_machine()
    slug = machine.slug(described["cpu"])
    Path(folder).mkdir(parents=True, exist_ok=True)
    for suite, results in _results.items():
        record = {
            "schema": machine.SCHEMA,
            "suite": suite,
            "commit": machine.commit(),
            "date": datetime.date.today().isoformat(),
            "device": "cpu",
            "machine": described,
            "versions": machine.versions(),
            "results": results,
        }
        path = Path(folder) / f"{suite}--{slug}--cpu.json"
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
