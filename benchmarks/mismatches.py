"""How many latents get a code that is not the nearest, ours and everybody's; no time is taken.

python benchmarks/mismatches.py [DIR]    writes a result file, by default where README's lie
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import machine
import peers
import pytest
import torch
from torch import Tensor

from msvq_fast.ops import nearest_code

N, D = 8192, 64
SIZES = (256, 1024, 8192)
DATA = {
    "normal": "N(0, 1), both",
    "init": "codes U(±1/K), latents N(0, 1)",
    "offset": "N(0, 1) + 5, both",
}
WAYS = {
    "msvq_fast": lambda z, codebook: lambda: nearest_code(z, codebook, backend="native"),
    "torch addmm": peers.addmm_search,
    "torch expanded": peers.expanded_search,
    "torch cdist": peers.cdist_search,
    "vector-quantize-pytorch": peers.vector_quantize_pytorch_search,
    "faiss IndexFlatL2": peers.faiss_search,
    "expanded, TF32 emulated": peers.tf32_search,
    "expanded, bfloat16 autocast": partial(peers.expanded_search, autocast=True),
}
MISSING = [
    {
        "kind": "skipped",
        "group": "all",
        "name": "flash-kmeans",
        "reason": "its kernels run on a GPU only; the row of TF32 emulates their arithmetic",
    }
]


def make(data: str, size: int) -> tuple[Tensor, Tensor]:
    """Latents ``(N, D)`` and codes ``(size, D)``."""
    generator = torch.Generator().manual_seed(size)
    z, codebook = torch.randn(N, D, generator=generator), torch.randn(size, D, generator=generator)
    if data == "init":
        codebook = (torch.rand(size, D, generator=generator) * 2 - 1) / size
    elif data == "offset":
        z, codebook = z + 5, codebook + 5
    return z, codebook


def count(ways: dict[str, Any]) -> list[dict[str, Any]]:
    """Wrong codes of every way on every data set; the truth is float64's."""
    results = []
    for data, size in ((data, size) for data in DATA for size in SIZES):
        z, codebook = make(data, size)
        want = nearest_code(z, codebook, backend="reference")
        for name, way in ways.items():
            wrong = int((way(z, codebook)() != want).sum())
            group = f"{data}, K {size}"
            results.append({"group": group, "name": name, "wrong_codes": wrong, "of": N})
    return results


def installed() -> dict[str, Any]:
    """The ways without those whose package is missing, which is said."""
    found = {}
    for name, way in WAYS.items():
        try:
            way(torch.zeros(1, D), torch.zeros(1, D))
        except pytest.skip.Exception as reason:
            print(f"without {name}: {reason}", file=sys.stderr)
        else:
            found[name] = way
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", metavar="DIR", nargs="?", type=Path, default=machine.RESULTS)
    folder = parser.parse_args().folder
    if not folder.is_dir():
        parser.error(f"{folder} is no folder")
    described = machine.describe_machine()
    found = {"data": DATA, "results": count(installed()), "missing": MISSING}
    record = machine.record("mismatches", described, machine.commit(), **found)
    machine.write(machine.path(folder, "mismatches", described), record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
