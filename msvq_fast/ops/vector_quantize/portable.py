"""Nearest codes in operators that every runtime has, for graphs that leave PyTorch.

A kernel cannot leave. `torch.onnx.export` makes a graph of the definition of `nearest_code`, which
passes over N x K numbers three times for every d; one float64 matrix product takes its place here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def nearest_rows(rows: Tensor, codebook: Tensor) -> Tensor:
    """Codes ``(N,)`` int64 of latents ``(N, D)``, both finite: the largest ``z.e - |e|²/2``.

    Distances that differ by less than the product's own rounding in float64 count as equal, so
    that the lowest of equal codes wins, as in `nearest_code`. An N x K tensor is made.
    """
    z, codes = rows.double(), codebook.double()
    scores = z @ codes.t() - codes.square().sum(1) / 2  # (N, K)
    longest = codes.square().sum(1).sqrt().amax(0)
    length = z.square().sum(1, keepdim=True).sqrt()
    slack = (codebook.shape[1] + 2) * torch.finfo(torch.float64).eps * longest * (length + longest)
    best = scores.amax(1, keepdim=True)
    # As integers: ONNX's ArgMax takes no booleans. The first of equal entries is taken.
    return (scores >= best - slack).to(torch.int32).argmax(1)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """What ``ExportedProgram.run_decompositions`` puts in place of the reference's operators."""
    return {
        torch.ops.msvq_fast.nearest_code_reference.default: nearest_rows,
        torch.ops.msvq_fast.codebook_copy.default: torch.clone,
    }
