"""How long a call keeps the device busy, how much memory it takes, and what the device can do."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from floors import H200, Device

FLUSH_BYTES = 256 * 2**20  # more than any second-level cache
CYCLES_PER_SECOND = 2e9  # of the multiprocessors, roughly: only the length of a pause
LONG_CALL_S = 5e-3  # no cache effect and no launch gap matters beyond


class Timing(NamedTuple):
    """Seconds on the device per call, wall seconds of calls back to back, bytes at the peak."""

    seconds: list[float]
    wall_s: float
    peak_bytes: int

    def summary(self) -> dict[str, Any]:
        quartiles = statistics.quantiles(self.seconds, n=4)
        return {
            "median_s": statistics.median(self.seconds),
            "iqr_s": quartiles[2] - quartiles[0],
            "rounds": len(self.seconds),
        }


class DeviceTimer:
    """Time by events, with a cold second-level cache and with the host ahead of the device.

    Before each call a buffer larger than the cache is overwritten and the device pauses for as long
    as the host needs to enqueue the call: the events then enclose kernels, not launch gaps. What
    the host costs shows in ``wall_s``.
    """

    def __init__(self, budget_s: float = 0.25, cuda: Any = torch.cuda, device: str = "cuda"):
        self.budget_s, self.cuda = budget_s, cuda
        self.flush = torch.empty(FLUSH_BYTES if device == "cuda" else 1, device=device).byte()

    def time(self, function: Callable[[], object]) -> Timing:
        cuda = self.cuda
        function()  # compiles
        cuda.synchronize()
        cuda.reset_peak_memory_stats()
        before = cuda.memory_allocated()
        function()
        cuda.synchronize()
        peak_bytes = max(cuda.max_memory_allocated() - before, 0)
        call_s = self._back_to_back(function, 2)
        wall_s = self._back_to_back(function, _between(3, 0.05 / call_s, 50))
        pause = 0 if wall_s > LONG_CALL_S else int(2 * wall_s * CYCLES_PER_SECOND)
        events = []
        for _ in range(_between(7, self.budget_s / wall_s, 100)):
            start, end = (cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            if pause:
                cuda._sleep(pause)
            start.record()
            function()
            end.record()
            events.append((start, end))
        cuda.synchronize()
        return Timing([a.elapsed_time(b) / 1e3 for a, b in events], wall_s, peak_bytes)

    def _back_to_back(self, function: Callable[[], object], calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        self.cuda.synchronize()
        return max((time.perf_counter() - start) / calls, 1e-7)


class RehearsalTimer:
    """Two calls on the host: its seconds say nothing and are never kept."""

    def time(self, function: Callable[[], object]) -> Timing:
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            function()
            seconds.append(max(time.perf_counter() - start, 1e-9))
        return Timing(seconds, seconds[-1], 0)


def measure_device(timer: DeviceTimer) -> Device:
    """Copy bandwidth, bytes read and written, and matrix products on random numbers."""
    source = torch.randn(2**30 // 4, device="cuda")
    target = torch.empty_like(source)
    copy = statistics.median(timer.time(lambda: target.copy_(source)).seconds)
    rates = []
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.randn(8192, 8192, device="cuda", dtype=dtype)
        b = torch.randn_like(a)
        seconds = statistics.median(timer.time(lambda a=a, b=b: a @ b).seconds)
        rates.append(2 * 8192**3 / seconds)
    return Device(torch.cuda.get_device_name(), 2 * 2**30 / copy, *rates)


def rehearsed_device() -> Device:
    return H200._replace(name="rehearsal")


def _between(low: int, value: float, high: int) -> int:
    return int(min(max(value, low), high))
