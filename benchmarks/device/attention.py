"""Local attention, own grid and a coarser one: forward and backward beside dense attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import peers
import torch
from device.rows import OURS, Bench, Case, Cost, Row, bound, relative_error
from torch import Tensor

from msvq_fast.ops import local_attention

BATCH, HEADS, COARSE, COARSE_KERNEL = 16, 8, 32, 3
PEERS: dict[str, Callable[..., peers.Attention]] = {
    "SDPA with mask": peers.sdpa_masked_attention,
    "gathered windows": peers.gathered_attention,
    **{f"FlexAttention {b}": partial(peers.flex_attention, block=b) for b in (128, 256)},
}
# own grid, own kernel, head width, half precision: rank of ours, peers beside it
SHAPES: dict[tuple[int, int, int, bool], tuple[int, list[str]]] = {
    (64, 5, 64, True): (0, list(PEERS)),
    (64, 5, 32, True): (0, ["SDPA with mask", "FlexAttention 128"]),
    (128, 7, 64, True): (0, ["SDPA with mask", "FlexAttention 128"]),
    (128, 7, 32, True): (1, ["FlexAttention 128"]),
    (64, 5, 64, False): (1, ["SDPA with mask", "gathered windows"]),
    **{
        (own, kernel, width, True): (2, [])
        for own, kernel in ((64, 7), (64, 9), (128, 5), (128, 9))
        for width in (32, 64)
    },
}


class Problem:
    def __init__(self, bench: Bench, own: int, kernel: int, width: int, half: bool) -> None:
        width = bench.size(width, 16)
        own, coarse = bench.size(own, 8), bench.size(COARSE, 4)
        batch, heads = bench.size(BATCH, 1), bench.size(HEADS, 2)
        self.grids = [(coarse, coarse), (own, own)]
        self.kernels = [COARSE_KERNEL, kernel]
        sizes = [h * w for h, w in self.grids]
        dtype = bench.half if half else torch.float32
        self.q, *rest = (
            torch.randn(batch, heads, n, width, device=bench.device).to(dtype).requires_grad_()
            for n in (sizes[-1], *sizes, *sizes)
        )
        self.keys, self.values = rest[:2], rest[2:]
        self.leaves = [self.q, *rest]
        self.upstream = torch.randn_like(self.q)
        self.backend, self.half = bench.backend, half

    def attention(self, name: str) -> Callable[[], Tensor]:
        if name == OURS:
            return lambda: local_attention(
                self.q,
                self.keys,
                self.values,
                grids=self.grids,
                kernels=self.kernels,
                backend=self.backend,
            )
        return PEERS[name](self.q, self.keys, self.values, self.grids, self.kernels)

    def truth(self) -> list[Tensor]:
        """Value and gradients of the first head of the first image, in float64."""
        leaves = [x.detach()[:1, :1].double().requires_grad_() for x in self.leaves]
        out = local_attention(
            leaves[0],
            leaves[1:3],
            leaves[3:],
            grids=self.grids,
            kernels=self.kernels,
            backend="reference",
        )
        upstream = self.upstream[:1, :1].double()
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]

    def check(self, function: Callable[[], Tensor], ours: bool) -> dict[str, Any]:
        out = function()
        got = [out.detach(), *torch.autograd.grad(out, self.leaves, self.upstream)]
        errors = [relative_error(a[:1, :1], b) for a, b in zip(got, self.truth(), strict=True)]
        limit = 3e-2 if self.half else 1e-4
        assert max(errors) < limit or not ours, f"errors {errors}"
        return {"error": errors[0], "grad_error": max(errors[1:])}

    def cost(self, backward: bool) -> Cost:
        """Every tensor once; one more read of each input in the backward; two products a pair."""
        batch, heads, tokens, width = self.q.shape
        seen = sum(k.shape[2] for k in self.keys)
        entries = (4 * tokens + 4 * seen) if backward else (2 * tokens + 2 * seen)
        moved = batch * heads * (entries * width * self.q.element_size() + 4 * tokens)
        pairs = -tokens  # the own key is left out
        for (h, w), kernel in zip(self.grids, self.kernels, strict=True):
            ratio = self.grids[-1][0] // h
            pairs += (ratio * _pairs(h, kernel)) * (ratio * _pairs(w, kernel))
        flops = (5 if backward else 2) * 2 * batch * heads * pairs * width
        return Cost(moved, flops, 0) if self.half else Cost(moved, 0, flops)


def _pairs(size: int, kernel: int) -> int:
    """Cells and the cells of their windows along an axis."""
    reach = kernel // 2
    return sum(min(i + reach, size - 1) - max(i - reach, 0) + 1 for i in range(size))


def forward(bench: Bench, shape: tuple[Any, ...], name: str) -> Case:
    problem = Problem(bench, *shape)
    attend = problem.attention(name)

    def run() -> Tensor:
        with torch.no_grad():
            return attend()

    return Case(run, lambda: problem.check(attend, name == OURS), problem.cost(False))


def backward(bench: Bench, shape: tuple[Any, ...], name: str) -> Case:
    """The backward alone, over a graph that is kept."""
    problem = Problem(bench, *shape)
    attend = problem.attention(name)
    with torch._functorch.config.patch(donated_buffer=False):  # what torch.compile would reuse
        out = attend()

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, problem.leaves, problem.upstream, retain_graph=True)

    return Case(run, lambda: problem.check(attend, name == OURS), problem.cost(True))


def rows() -> list[Row]:
    found = []
    for shape, (rank, names) in SHAPES.items():
        own, kernel, width, half = shape
        label = (
            f"{own}² k{kernel} + {COARSE}² k{COARSE_KERNEL}, d {width}, "
            f"{'half' if half else 'float32'}"
        )
        for way, build in (("forward", forward), ("backward", backward)):
            for name in (OURS, *names):
                found.append(
                    Row(
                        "local_attention",
                        f"{way} {label}",
                        name,
                        bound(build, shape, name),
                        rank if name == OURS else rank + 1,
                        10.0 if "Flex" in name else 5.0,
                    )
                )
    return found
