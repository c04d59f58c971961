"""How many latents get a code that is not the nearest, ours and everybody's; no time is taken.

python benchmarks/mismatches.py [DIR]    writes a result file, by default where README's lie
"""

from __future__ import annotations

import datetime
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import machine
import peers
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


def count() -> list[dict[str, Any]]:
    """Wrong codes of every way on every data set; the truth is float64's."""
    results = []
    for data, size in ((data, size) for data in DATA for size in SIZES):
        z, codebook = make(data, size)
        want = nearest_code(z, codebook, backend="reference")
        for name, way in WAYS.items():
            wrong = int((way(z, codebook)() != want).sum())
            group = f"{data}, K {size}"
            results.append({"group": group, "name": name, "wrong_codes": wrong, "of": N})
    return results


def main() -> int:
    described = machine.describe_machine()
    record = {
        "schema": machine.SCHEMA,
        "suite": "mismatches",
        "commit": machine.commit(),
        "date": datetime.date.today().isoformat(),
        "device": "cpu",
        "machine": described,
        "versions": machine.versions(),
        "data": DATA,
        "results": count(),
        "missing": MISSING,
    }
    default = Path(__file__).parent / "results" / "0.1.0"
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    path = folder / f"mismatches--{machine.slug(described['cpu'])}--cpu.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
