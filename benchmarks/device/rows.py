"""What a row of the table is, and the one way to run it: checked, timed, never fatal."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol
from unittest import mock

import torch
from device.timing import Timing
from floors import Device
from pytest import skip

from msvq_fast.ops.backend import Op

Function = Callable[[], object]
OURS = "msvq_fast"


class Bench(NamedTuple):
    """Where rows run: full sizes on a GPU, or tiny ones on the CPU to rehearse the code.

    ``backend`` is passed to the ops that have Triton kernels, so that a rehearsal runs those;
    ``half`` is the precision that Triton's interpreter can do.
    """

    device: str = "cuda"
    tiny: bool = False
    backend: str | None = None
    half: torch.dtype = torch.bfloat16

    def size(self, full: Any, tiny: Any) -> Any:
        return tiny if self.tiny else full


REHEARSAL = Bench("cpu", True, "triton", torch.float16)


class Cost(NamedTuple):
    """Least bytes moved; operations on half-precision matrix units and in float32."""

    moved_bytes: float
    flops: float = 0.0
    float32_flops: float = 0.0


@dataclass
class Case:
    """``function`` is timed after ``check``, which raises or returns more to record."""

    function: Function
    check: Callable[[], dict[str, Any]] = dict
    cost: Cost | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One line of a table. Rows of a low ``rank`` run first; ``seconds`` is a guess."""

    suite: str
    group: str
    name: str
    build: Callable[[Bench], Case]
    rank: int = 1
    seconds: float = 3.0

    @property
    def id(self) -> str:
        return f"{self.suite} | {self.group} | {self.name}"


def bound(build: Callable[..., Case], *arguments: Any) -> Callable[[Bench], Case]:
    """A row's builder: ``build(bench, *arguments)``."""
    return lambda bench: build(bench, *arguments)


class Timer(Protocol):
    def time(self, function: Function) -> Timing: ...


def run_row(row: Row, bench: Bench, timer: Timer, device: Device) -> dict[str, Any]:
    """``{"result": ...}`` or ``{"missing": ...}`` with the reason why there is none."""
    start = time.perf_counter()
    try:
        torch.manual_seed(0)
        backends: dict[str, str] = {}
        with mock.patch.object(Op, "pick", _recorder(backends)):
            case = row.build(bench)
            extra = {**case.extra, **case.check()}
        if row.name.startswith(OURS):
            extra["backends"] = backends
        timing = timer.time(case.function)
        summary = timing.summary()
        extra["wall_s"] = timing.wall_s
        extra.setdefault("peak_bytes", timing.peak_bytes)
        if case.cost is not None:
            extra["floor_s"] = device.floor(*case.cost)
            extra["percent_of_floor"] = 100 * extra["floor_s"] / summary["median_s"]
        if "images" in extra:
            extra["images_per_s"] = extra.pop("images") / summary["median_s"]
        extra["row_s"] = round(time.perf_counter() - start, 1)
        return {"result": {"group": row.group, "name": row.name, **summary, "extra": extra}}
    except (skip.Exception, ImportError) as reason:
        return missing(row, "skipped", _one_line(reason))
    except Exception as error:
        traceback.print_exc()
        return missing(row, "error", f"{type(error).__name__}: {_one_line(error)}")


def _recorder(backends: dict[str, str]) -> Callable[..., str]:
    """`Op.pick` that notes what it chose, except where the reference was asked for."""
    pick = Op.pick

    def record(op: Op, *args: Any, backend: str | None = None, **kwargs: Any) -> str:
        chosen = pick(op, *args, backend=backend, **kwargs)
        if backend != "reference":
            backends[op.name] = chosen
        return chosen

    return record


def missing(row: Row, kind: str, reason: str) -> dict[str, Any]:
    return {"missing": {"group": row.group, "name": row.name, "kind": kind, "reason": reason}}


def clean_up(bench: Bench) -> None:
    """Free what a row left. Raises where the device is beyond repair."""
    gc.collect()
    torch._dynamo.reset()
    if bench.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference over the largest magnitude of the float64 truth."""
    want = want.double()
    return float((got.double() - want).abs().max() / want.abs().max().clamp_min(1e-300))


def _one_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return " ".join(text.split())[:300]
