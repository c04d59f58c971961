"""The GPU benchmarks rehearsed on the CPU: every row, the files, and what happens on failures."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import sys
import time
import warnings
from pathlib import Path

import peers
import pytest
import torch
from device import run, suites
from device.book import Book
from device.exact import exact_codes
from device.rows import OURS, REHEARSAL, Case, Row, run_row
from device.timing import DeviceTimer, RehearsalTimer, Timing, rehearsed_device
from parity import assert_close
from test_benchmark_results import test_schema as check_schema

from msvq_fast.ops import local_attention, nearest_code

DEVICE = rehearsed_device()
ROWS = suites.all_rows()


def distinct_rows() -> list[Row]:
    """One row for each thing that is timed and each name, whatever the shape."""
    found: dict[tuple[str, ...], Row] = {}
    for row in ROWS:
        title = row.group.split(",")[0].rstrip("0123456789²k +")
        found.setdefault((row.suite, title, row.name), row)
    return list(found.values())


@pytest.mark.parametrize("row", distinct_rows(), ids=lambda row: row.id)
def test_every_row_is_built_checked_and_timed(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what peers warn of is theirs
        outcome = run_row(row, REHEARSAL, RehearsalTimer(), DEVICE)
    if "missing" in outcome:
        assert outcome["missing"]["kind"] == "skipped", outcome
        assert row.name != OURS
        pytest.skip(outcome["missing"]["reason"])
    result = outcome["result"]
    assert result["median_s"] > 0 and result["extra"]["floor_s"] > 0
    if row.name == OURS and row.suite in ("vector_quantize", "local_attention"):
        assert result["extra"]["backends"] == {row.suite: "triton"}
    if row.suite == "vector_quantize" and "step" not in row.group:
        assert result["extra"]["of"] == 32


def test_flex_attention_sees_the_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    grids, kernels = [(4, 4), (8, 8)], [3, 5]
    q, *rest = (torch.randn(2, 2, n, 16) for n in (64, 16, 64, 16, 64))
    keys, values = rest[:2], rest[2:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # uncompiled is slow, it says
        got = peers.flex_attention(q, keys, values, grids, kernels)()
    want = local_attention(q, keys, values, grids=grids, kernels=kernels, backend="reference")
    assert_close("value", got, want, ulps=64)


def test_rows_have_one_identity_and_files_of_their_own() -> None:
    assert len({row.id for row in ROWS}) == len(ROWS)
    ops = {
        "vector_quantize",
        "gaussian_blur",
        "multiscale_loss",
        "local_attention",
        "conv_bias_relu",
        "upsample_image",
    }
    assert {row.suite for row in ROWS} == ops | {"training"}
    assert [row.rank for row in ROWS] == sorted(row.rank for row in ROWS)


def test_exact_codes_are_the_definition() -> None:
    codebook = torch.randn(40, 8)
    codebook[7] = codebook[3]
    z = torch.cat([codebook, torch.randn(300, 8), (codebook[1:] + codebook[:-1]) / 2])
    assert torch.equal(exact_codes(z, codebook), nearest_code(z, codebook, backend="reference"))
    assert not exact_codes(z, codebook[:1]).any()


class StubDevice:
    """A device whose kernels take the milliseconds that are put in ``clock``."""

    def __init__(self) -> None:
        self.clock, self.peak, self.pauses = 0.0, 0, []

    def Event(self, enable_timing: bool) -> StubEvent:  # noqa: N802
        return StubEvent(self)

    def synchronize(self) -> None: ...

    def reset_peak_memory_stats(self) -> None:
        self.peak = 100

    def memory_allocated(self) -> int:
        return 100

    def max_memory_allocated(self) -> int:
        return self.peak

    def _sleep(self, cycles: int) -> None:
        self.pauses.append(cycles)
        self.clock += 1000.0


class StubEvent:
    def __init__(self, device: StubDevice) -> None:
        self.device = device

    def record(self) -> None:
        self.at = self.device.clock

    def elapsed_time(self, end: StubEvent) -> float:
        return end.at - self.at


def test_device_timer_counts_kernels_alone() -> None:
    device = StubDevice()

    def kernel() -> None:
        device.clock += 2.0
        device.peak = max(device.peak, 612)

    timing = DeviceTimer(cuda=device, device="cpu").time(kernel)
    assert timing.peak_bytes == 512
    assert 7 <= len(timing.seconds) == len(device.pauses)
    assert timing.seconds == pytest.approx([0.002] * len(timing.seconds))
    assert timing.summary()["iqr_s"] == pytest.approx(0.0)


def row(name: str, build, suite: str = "vector_quantize") -> Row:  # type: ignore[no-untyped-def]
    return Row(suite, "group", name, build)


def test_failures_become_reasons() -> None:
    def broken(bench):  # type: ignore[no-untyped-def]
        raise RuntimeError("two\nlines")

    def absent(bench):  # type: ignore[no-untyped-def]
        pytest.importorskip("no_such_peer")

    def wrong(bench):  # type: ignore[no-untyped-def]
        def check():  # type: ignore[no-untyped-def]
            raise AssertionError("3 of 4 codes are not the nearest")

        return Case(lambda: None, check)

    kinds = {}
    for name, build in {"broken": broken, "absent": absent, "wrong": wrong}.items():
        missing = run_row(row(name, build), REHEARSAL, RehearsalTimer(), DEVICE)["missing"]
        kinds[name] = missing["kind"]
        assert "\n" not in missing["reason"]
    assert kinds == {"broken": "error", "absent": "skipped", "wrong": "error"}


def measured(name: str) -> dict[str, object]:
    timing = Timing([1.0, 2.0, 3.0], 1.0, 5)
    extra = {"peak_bytes": 5, "wall_s": 1.0}
    return {"result": {"group": "group", "name": name, **timing.summary(), "extra": extra}}


DESCRIBED = {
    "cpu": "CPU", "cores": 1, "threads": 1, "isa": "none", "gpu": "Some GPU 9", "ceilings": {},
}  # fmt: skip


def book(folder: Path, **changes: object) -> Book:
    options = {"device": "cuda", "commit": "abc", "resume": True, **changes}
    opened = Book(folder, **options)  # type: ignore[arg-type]
    opened.open(DESCRIBED, ["vector_quantize"])
    return opened


def test_file_is_complete_after_every_row(tmp_path: Path) -> None:
    first = book(tmp_path)
    path = tmp_path / "vector_quantize--some-gpu-9--cuda.json"
    for name in ("a", "b"):
        first.add("vector_quantize", measured(name))
        check_schema(path)
    missing = {"group": "group", "name": "b", "kind": "error", "reason": "why"}
    first.add("vector_quantize", {"missing": missing})  # takes the place of the measured one
    record = json.loads(path.read_text())
    assert [r["name"] for r in record["results"]] == ["a"] and record["missing"] == [missing]
    assert book(tmp_path).has("vector_quantize", "group", "a")
    assert not book(tmp_path).has("vector_quantize", "group", "b")
    assert not book(tmp_path, commit="other").has("vector_quantize", "group", "a")
    assert not book(tmp_path, resume=False).has("vector_quantize", "group", "a")


WORKER = """
import json, os, sys, time
sys.stdin.readline()
say = lambda **event: print("@row " + json.dumps(event), flush=True)
say(machine=json.loads(os.environ["DESCRIBED"]))
print("a line of somebody else", flush=True)
for row in json.loads(sys.stdin.readline()):
    name = row.split(" | ")[2]
    say(start=row)
    if name == "dies":
        os._exit(41)
    if name == "hangs":
        time.sleep(600)
    extra = {"peak_bytes": 0, "wall_s": 1.0}
    result = {"group": "group", "name": name, "median_s": 1.0, "iqr_s": 0.0, "rounds": 2}
    say(row=row, outcome={"result": {**result, "extra": extra}})
    if name == "poisons":
        os._exit(42)
"""


def test_dead_and_hanging_workers_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DESCRIBED", json.dumps(DESCRIBED))
    monkeypatch.setattr(run, "ROW_LIMIT_S", 1.0)
    monkeypatch.setattr(run, "LEAST_ROW_LIMIT_S", 1.0)
    names = ("fine", "dies", "hangs", "poisons", "last", "kept")
    rows = [row(name, None) for name in names]
    opened = book(tmp_path)
    opened.add("vector_quantize", measured("kept"))
    job = run.Run(opened, rows, until=time.time() + 30, rehearse=True)
    assert job.finish([sys.executable, "-c", WORKER]) == 0
    record = json.loads((tmp_path / "vector_quantize--some-gpu-9--cuda.json").read_text())
    assert [r["name"] for r in record["results"]] == ["kept", "fine", "poisons", "last"]
    reasons = {m["name"]: m["reason"] for m in record["missing"]}
    assert reasons == {"dies": "the process ended with 41", "hangs": "not done after 1 s"}
    assert "a line of somebody else" in capfd.readouterr().out
    nothing = run.Run(book(tmp_path), rows[:1], until=time.time() + 30, rehearse=True)
    assert nothing.finish([sys.executable, "-c", "raise SystemExit(3)"]) == 1


def test_command_rehearses_through_its_worker(tmp_path: Path) -> None:
    only = ["--only", "pyramid of two blurs, 8x3x1024x1024 k 31, float32, NCHW | msvq_fast"]
    arguments = ["--rehearse", "--out", str(tmp_path), *only, "--commit", "abc"]
    assert run.main(arguments) == 0
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert path.stem.endswith("--rehearsal") and record["commit"] == "abc"
    assert record["machine"]["ceilings"]["name"] == "rehearsal"
    assert [r["name"] for r in record["results"]] == [OURS]


def test_rows_out_of_time_are_dropped(tmp_path: Path, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    from device import worker

    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "0"))
    quick = dataclasses.replace(ROWS[0], seconds=5.0)
    monkeypatch.setattr(suites, "select", lambda ids: [quick])
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps([quick.id]) + "\n"))
    worker.work({"until": time.time() + 4, "rehearse": True})
    described, dropped = (
        json.loads(line.removeprefix("@row ")) for line in capsys.readouterr().out.splitlines()
    )
    assert "machine" in described and dropped["outcome"]["missing"]["kind"] == "dropped"


@pytest.mark.parametrize("arguments", [["--rehearse"], ["--resum"]])
def test_bad_options_end_with_two(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        run.main(arguments)
    assert error.value.code == 2
