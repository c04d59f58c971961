"""Local attention, own grid and a coarser one, beside dense attention and gathered windows."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import machine
import peers
import pytest
import torch
from parity import assert_close

from msvq_fast.ops import local_attention

# own grid, its kernel, coarse grid, its kernel, head width, dtype; 8 heads, batch 1
MAIN = (64, 5, 32, 3, 32, torch.float32)
SHAPES = [
    MAIN,
    (64, 9, 32, 3, 32, torch.float32),
    (64, 5, 32, 3, 64, torch.float32),
    (64, 5, 32, 3, 32, torch.bfloat16),
    (8, 5, 4, 3, 32, torch.float32),
]
GROWTH = [(side, 5, side // 2, 3, 32, torch.float32) for side in (32, 64, 128, 256)]
PEERS = {
    "SDPA with mask": peers.sdpa_masked_attention,
    "gathered windows": peers.gathered_attention,
}
# On a CPU it has no backward.
FORWARD_PEERS = {**PEERS, "FlexAttention": peers.flex_attention}


class Case:
    def __init__(self, shape, heads: int = 8, *, gradients: bool = True) -> None:
        own, own_kernel, coarse, coarse_kernel, width, dtype = shape
        self.grids = [(coarse, coarse), (own, own)]
        self.kernels = [coarse_kernel, own_kernel]
        sizes = [h * w for h, w in self.grids]
        self.q, *rest = (
            torch.randn(1, heads, n, width).to(dtype).requires_grad_(gradients)
            for n in (sizes[-1], *sizes, *sizes)
        )
        self.keys, self.values = rest[:2], rest[2:]
        self.leaves = [self.q, *rest]
        self.upstream = torch.randn_like(self.q)
        label = str(dtype).removeprefix("torch.")
        self.name = f"{own}² k{own_kernel} + {coarse}² k{coarse_kernel}, d {width}, {label}"

    def ours(self) -> torch.Tensor:
        return local_attention(
            self.q,
            self.keys,
            self.values,
            grids=self.grids,
            kernels=self.kernels,
            backend="native",
        )

    def attend(self, name: str) -> peers.Attention:
        if name == "native":
            return self.ours
        return FORWARD_PEERS[name](self.q, self.keys, self.values, self.grids, self.kernels)

    def truth(self) -> list[torch.Tensor]:
        """Value and gradients of the first head, in float64."""
        gradients = self.q.requires_grad
        leaves = [x.detach()[:, :1].double().requires_grad_(gradients) for x in self.leaves]
        out = local_attention(
            leaves[0],
            leaves[1:3],
            leaves[3:],
            grids=self.grids,
            kernels=self.kernels,
            backend="reference",
        )
        if not gradients:
            return [out]
        return [out, *torch.autograd.grad(out, leaves, self.upstream[:, :1].double())]

    def with_gradients(self, function: peers.Attention) -> list[torch.Tensor]:
        out = function()
        if not out.requires_grad:
            return [out]
        return [out, *torch.autograd.grad(out, self.leaves, self.upstream)]


def assert_same(case: Case, function: peers.Attention) -> None:
    """The value, and the gradients of a case that has them."""
    names = ["value", "grad_q", "grad_k0", "grad_k1", "grad_v0", "grad_v1"]
    for name, got, want in zip(names, case.with_gradients(function), case.truth(), strict=False):
        # The dense sums have thousands of terms; bfloat16 peers round between their steps.
        ulps = 64 if got.dtype == torch.float32 else 16
        assert_close(name, got[:, :1], want, ulps=ulps)


@pytest.mark.parametrize("name", ["native", *FORWARD_PEERS])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(measure: peers.Measure, shape, name: str) -> None:
    case = Case(shape, gradients=False)
    function = case.attend(name)
    assert_same(case, function)
    with torch.no_grad():
        measure(f"forward {case.name}", name, function, rounds=9, warmup=2)


@pytest.mark.parametrize("name", ["native", *PEERS])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(measure: peers.Measure, shape, name: str) -> None:
    case = Case(shape)
    function = case.attend(name)
    assert_same(case, function)
    measure(
        f"forward + backward {case.name}",
        name,
        lambda: case.with_gradients(function),
        rounds=7,
        warmup=1,
    )


def added_peak(shape) -> int:
    """Bytes of one forward and backward beyond its inputs, in a process of its own."""
    torch.set_num_threads(2)
    small, case = Case((8, *shape[1:2], 4, *shape[3:])), Case(shape)
    small.with_gradients(small.ours)  # what libraries load once
    machine.forget_peak()
    before = machine.status_bytes("VmRSS")
    case.with_gradients(case.ours)
    return machine.status_bytes("VmHWM") - before


@pytest.mark.parametrize("shape", GROWTH, ids=str)
def test_growth(measure: peers.Measure, shape) -> None:
    """Time and memory from 32² to 256² tokens: linear in the tokens."""
    case = Case(shape)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        peak = pool.submit(added_peak, shape).result()
    measure(
        "growth, forward + backward",
        f"native {case.name}",
        lambda: case.with_gradients(case.ours),
        rounds=7,
        input_bytes=sum(t.numel() * t.element_size() for t in case.leaves),
        added_peak_bytes=peak,
    )
