"""One way to time, and one format of result files.

``pytest benchmarks/ --benchmark-only`` prints a table per group; ``--save-results=DIR`` also writes
one JSON file per suite, which README's tables are made from. With a space in place of ``=`` pytest
would take a folder that exists for a place of tests, and another configuration with it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from msvq_fast.training.allocator import keep_freed_memory

WARMUP_S, ROUNDS_S = 0.2, 0.5

_results: dict[str, list[dict[str, Any]]] = {}
_commit = machine.commit()  # of what is measured: the first result file makes the tree dirty


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--save-results", metavar="DIR", help="write one JSON file per suite here")


def pytest_configure(config: pytest.Config) -> None:
    # As the package's commands do. Otherwise the tests before decide whether a peer's temporaries
    # are mapped anew in every call, which is most of its time.
    keep_freed_memory()
    folder = config.getoption("--save-results")
    if folder:
        try:  # now, not when everything has been timed
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise pytest.UsageError(f"--save-results: no folder can be made: {error}") from None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A peer's warnings are not errors here, as ours are in the tests."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def multiply_adds_per_second() -> float:
    """The most that torch reaches here in float32: the floor of compute-bound ops.

    A convolution beside the matrix product, which on some processors runs at half its rate.
    """
    a, x, weight = torch.randn(1024, 1024), torch.randn(1, 64, 128, 128), torch.randn(64, 64, 3, 3)
    work: dict[Callable[[], Tensor], int] = {
        lambda: a @ a: 1024**3,
        lambda: F.conv2d(x, weight, padding=1): 128**2 * 64 * 64 * 9,  # the border's are few
    }
    rates = []
    for function, multiply_adds in work.items():
        for _ in range(20):
            start = time.perf_counter()
            function()
            rates.append(multiply_adds / (time.perf_counter() - start))
    return max(rates)


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """``measure(group, name, function, rounds=15, warmup=3, **extra)`` times calls of ``function``.

    Wall time of single calls after a few that do not count; median and interquartile range. Both
    go on for some tenths of a second: the first calls of a process may find its threads on one
    processor, and a few quick ones are soon disturbed. With ``floor_s``, the time that the
    machine's limit allows, the result also has ``percent_of_floor``.
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
        if not benchmark.disabled:
            calls, start = 0, time.perf_counter()
            while calls < warmup or time.perf_counter() - start < WARMUP_S:
                function()
                calls += 1
            each = (time.perf_counter() - start) / calls
            rounds = max(rounds, min(int(ROUNDS_S / each), 200))
        benchmark.pedantic(function, rounds=rounds, iterations=1)
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
    for suite, results in _results.items():
        record = machine.record(suite, described, _commit, results=results)
        machine.write(machine.path(Path(folder), suite, described), record)
