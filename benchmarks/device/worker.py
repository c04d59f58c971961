"""The process that touches the device: rows in, one line of JSON per event out."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

MARK = "@row "


def say(**event: Any) -> None:
    print(MARK + json.dumps(event), flush=True)


def work(order: dict[str, Any]) -> int:
    """Describe the machine, read the rows' ids and run them until ``order["until"]``."""
    if order["rehearse"]:
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
    import machine
    import torch
    from device import suites
    from device.rows import REHEARSAL, Bench, clean_up, missing, run_row
    from device.timing import DeviceTimer, RehearsalTimer, measure_device, rehearsed_device

    described = machine.describe_machine()
    if order["rehearse"]:
        bench, timer, device = REHEARSAL, RehearsalTimer(), rehearsed_device()
    else:
        if not torch.cuda.is_available():
            say(fatal="no CUDA device; --rehearse runs tiny shapes on the CPU")
            return 2
        bench, timer = Bench(), DeviceTimer()
        device = measure_device(timer)
        described |= machine.describe_gpu()
    described["ceilings"] = {**device._asdict(), "name": device.name}
    say(machine=described)
    for row in suites.select(json.loads(sys.stdin.readline())):
        if time.time() + row.seconds > order["until"]:
            say(row=row.id, outcome=missing(row, "dropped", "out of time"))
            continue
        say(start=row.id)
        outcome = run_row(row, bench, timer, device)
        say(row=row.id, outcome=outcome)
        if "result" not in outcome or bench.device == "cuda":
            clean_up(bench)  # raises after an illegal access: the next process goes on
    return 0


if __name__ == "__main__":
    sys.exit(work(json.loads(sys.stdin.readline())))
