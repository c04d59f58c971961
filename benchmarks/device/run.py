"""Time everything on the GPU at hand and write one JSON file per suite, complete at any moment.

python benchmarks/device/run.py --out DIR [--budget SECONDS] [--only TEXT] [--resume] [--rehearse]

A worker process runs the rows. A row that fails is recorded and the next one runs; where the
worker dies or hangs, the row is recorded and a new worker goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PATHS = [str(ROOT), str(ROOT / "benchmarks")]
sys.path[:0] = PATHS

from device.book import Book  # noqa: E402
from device.worker import MARK  # noqa: E402

START_LIMIT_S = 150.0  # imports, first use of the device, its ceilings
ROW_LIMIT_S = 90.0
LEAST_ROW_LIMIT_S = 10.0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "0.1.0")
    parser.add_argument("--budget", type=float, default=500.0, help="seconds in all")
    parser.add_argument("--only", action="append", help="rows whose name contains this; repeatable")
    parser.add_argument("--resume", action="store_true", help="keep this commit's rows in --out")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--commit", help="where git does not know it")
    parser.add_argument("--list", action="store_true", help="print the rows in their order")
    options = parser.parse_args(arguments)
    if options.rehearse and options.out == parser.get_default("out"):
        parser.error("--rehearse needs --out: its times are no results")
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
    import machine
    from device import suites

    rows = suites.all_rows()
    if options.only:
        rows = [row for row in rows if any(text in row.id for text in options.only)]
    if options.list:
        print("\n".join(f"{row.rank} {row.id}" for row in rows))
        return 0
    book = Book(
        options.out,
        device="rehearsal" if options.rehearse else "cuda",
        commit=options.commit or machine.commit(),
        resume=options.resume,
    )
    run = Run(book, rows, until=time.time() + options.budget, rehearse=options.rehearse)
    return run.finish()


class Run:
    def __init__(self, book: Book, rows: list[Any], *, until: float, rehearse: bool) -> None:
        self.book, self.until, self.rehearse = book, until, rehearse
        self.rows = {row.id: row for row in rows}
        self.left = list(self.rows)
        self.started = time.time()
        self.tally: dict[str, int] = {}

    def finish(self, worker: list[str] | None = None) -> int:
        """Start workers until no row is left; 0 unless none could start."""
        command = worker or [sys.executable, "-u", str(HERE / "worker.py")]
        useless = 0
        while self.left:
            before = len(self.left)
            fatal = self._one_worker(command)
            if fatal:
                print(fatal, file=sys.stderr)
                return 2
            useless = useless + 1 if len(self.left) == before else 0
            if useless == 2:
                print("the worker ended twice without a row", file=sys.stderr)
                return 1
        print(f"[{self._clock()}] " + ", ".join(f"{n} {kind}" for kind, n in self.tally.items()))
        return 0

    def _one_worker(self, command: list[str]) -> str | None:
        path = os.pathsep.join([*PATHS, os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        _send(process, {"until": self.until, "rehearse": self.rehearse})
        lines: queue.Queue[str | None] = queue.Queue()
        reader = threading.Thread(target=_read, args=(process, lines), daemon=True)
        reader.start()
        current, limit, reason = None, START_LIMIT_S, ""
        try:
            while True:
                try:
                    line = lines.get(timeout=limit)
                except queue.Empty:
                    reason = f"not done after {limit:.0f} s"
                    break
                if line is None:
                    reason = f"the process ended with {process.wait()}"
                    break
                if not line.startswith(MARK):
                    print(line, end="")
                    continue
                event = json.loads(line.removeprefix(MARK))
                if "fatal" in event:
                    return str(event["fatal"])
                if "machine" in event:
                    self._open(event["machine"])
                    _send(process, self.left)
                elif "start" in event:
                    current = event["start"]
                    remaining = self.until - time.time() + self.rows[current].seconds
                    limit = max(min(ROW_LIMIT_S, remaining), LEAST_ROW_LIMIT_S)
                elif "row" in event:
                    self._record(event["row"], event["outcome"])
                    current = None
        finally:
            process.kill()
            process.wait()
            reader.join(timeout=5)
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()  # type: ignore[union-attr]
        if reason == "the process ended with 0":
            return None
        if current is not None:
            row = self.rows[current]
            died = {"group": row.group, "name": row.name, "kind": "error", "reason": reason}
            self._record(current, {"missing": died})
        elif reason and self.left:
            print(f"[{self._clock()}] between rows: {reason}", file=sys.stderr)
        return None

    def _open(self, described: dict[str, Any]) -> None:
        self.book.open(described, sorted({row.suite for row in self.rows.values()}))
        has = self.book.has
        self.left = [i for i in self.left if not has((r := self.rows[i]).suite, r.group, r.name)]
        print(f"[{self._clock()}] {json.dumps(described)}", flush=True)

    def _record(self, row_id: str, outcome: dict[str, Any]) -> None:
        row = self.rows[row_id]
        self.left.remove(row_id)
        self.book.add(row.suite, outcome)
        kind, text = _describe(outcome)
        self.tally[kind] = self.tally.get(kind, 0) + 1
        done = len(self.rows) - len(self.left)
        print(f"[{self._clock()}] {done}/{len(self.rows)} {row_id}: {text}", flush=True)

    def _clock(self) -> str:
        return f"{time.time() - self.started:4.0f} s"


def _describe(outcome: dict[str, Any]) -> tuple[str, str]:
    if "missing" in outcome:
        missing = outcome["missing"]
        return missing["kind"], f"{missing['kind'].upper()} {missing['reason']}"
    result, extra = outcome["result"], outcome["result"]["extra"]
    text = f"{1e3 * result['median_s']:.4g} ms ± {1e3 * result['iqr_s']:.2g}"
    if "percent_of_floor" in extra:
        text += f", {extra['percent_of_floor']:.0f} % of floor"
    text += f", peak {extra['peak_bytes'] / 2**20:.0f} MiB"
    for key in ("wrong_codes", "images_per_s"):
        if key in extra:
            text += f", {key} {extra[key]:.4g}"
    if extra.get("backends"):
        text += ", " + " ".join(sorted(set(extra["backends"].values())))
    return "measured", text


def _send(process: subprocess.Popen[str], message: Any) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # its end is seen where its output is read
        process.stdin.write(json.dumps(message) + "\n")
        process.stdin.flush()


def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


if __name__ == "__main__":
    sys.exit(main())
