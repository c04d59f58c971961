"""Keep finished comparisons of ``msvq compare`` as a result file.

python benchmarks/training/record_compare.py --data "what the images are" --commit HASH OUT...
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import machine  # noqa: E402  benchmarks/ is a folder of scripts, not a package

# Of a run: what was measured, and with what; not the paths of this machine.
_KEPT = ("preset", "seed", "reconstructions", "codebooks", "reconstructed_set", "seconds")
_PATHS = ("data", "pictures", "lpips_weights", "inception_weights", "efflite0_weights")


def main() -> int:
    """Write ``<suite>--<machine>--<device>.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", nargs="+", type=Path, help="folders of msvq compare")
    parser.add_argument("--data", required=True, help="the images, in words")
    parser.add_argument("--suite", default="compare", choices=("compare", "robustness"))
    parser.add_argument("--commit", default=machine.commit(), help="that trained and judged")
    arguments = parser.parse_args()
    records = [json.loads((out / "comparison.json").read_text("utf-8")) for out in arguments.out]
    devices = {run["settings"]["device"].split()[0] for r in records for run in r["runs"]}
    device = devices.pop()
    described = machine.describe_machine()
    if device == "cuda":
        described |= machine.describe_gpu()
    found = {"data": arguments.data, "comparisons": [_without_paths(record) for record in records]}
    path = machine.path(machine.RESULTS, arguments.suite, described, device)
    machine.write(
        path, machine.record(arguments.suite, described, arguments.commit, device, **found)
    )
    print(f"wrote {path}")
    return 0


def _without_paths(record: dict[str, Any]) -> dict[str, Any]:
    settings = {k: v for k, v in record["settings"].items() if k not in _PATHS}
    runs = [
        {**{key: run[key] for key in _KEPT}, "weights_sha256": run["settings"]["weights_sha256"]}
        for run in record["runs"]
    ]
    return {**record, "settings": settings, "runs": runs}


if __name__ == "__main__":
    sys.exit(main())
