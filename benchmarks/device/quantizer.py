"""The quantizer: search alone, with z_q, loss and statistics, and the training step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import floors
import peers
import pytest
import torch
import torch.nn.functional as F
from device.exact import exact_codes
from device.rows import OURS, Bench, Case, Cost, Row, bound, relative_error
from torch import Tensor

from msvq_fast.ops import ema_update_, nearest_code, vector_quantize
from msvq_fast.ops.vector_quantize.op import OP

D = 64
N = 2**20
DECAY = 0.99
TRITON = f"{OURS} triton"  # where the CUDA kernel for Hopper is the default
# latents, codes, whether in half precision, rank
SHAPES = [(N, 1024, False, 0), (N, 256, False, 0), (N, 1024, True, 0), (N // 4, 8192, False, 3)]


class Latents:
    """Latents around the codes, as in training, and an upstream gradient."""

    def __init__(self, bench: Bench, n: int, k: int, half: bool) -> None:
        n, k = bench.size(n, 32), bench.size(k, 8)
        dtype = bench.half if half else torch.float32
        self.codebook = torch.randn(k, D, device=bench.device)
        noise = torch.randn(n, D, device=bench.device)
        index = torch.randint(k, (n,), device=bench.device)
        self.z = (self.codebook[index] + 0.7 * noise).to(dtype)
        self.n, self.k, self.backend = n, k, bench.backend
        self.itemsize = self.z.element_size()

    def image(self) -> Tensor:
        """The same latents as ``(16, D, rows)``: NCHW."""
        return self.z.view(16, -1, D).transpose(1, 2).contiguous()

    def wrong(self, codes: Tensor, ours: bool) -> dict[str, Any]:
        """Mismatches against float64; none is allowed to ours."""
        wrong = int((codes.reshape(-1) != exact_codes(self.z.detach(), self.codebook)).sum())
        if ours:
            assert wrong == 0, f"{wrong} of {self.n} codes are not the nearest"
        return {"wrong_codes": wrong, "of": self.n}


def choose(data: Latents, name: str) -> None:
    """The backend that the row's name asks for."""
    if name == TRITON:
        if OP.pick(data.z, data.codebook, backend=data.backend) == "triton":
            pytest.skip("Triton's kernel is the default here")
        data.backend = "triton"


def search(bench: Bench, n: int, k: int, half: bool, name: str) -> Case:
    data = Latents(bench, n, k, half)
    z, codebook = data.z, data.codebook
    choose(data, name)
    if name.startswith(OURS):
        dim = 1 if "NCHW" in name else -1
        latents = data.image() if dim == 1 else z
        find = lambda: nearest_code(latents, codebook, dim=dim, backend=data.backend)  # noqa: E731
    else:
        find = PEER_SEARCH[name](z, codebook)
    cost = Cost(*floors.search_cost(data.n, data.k, D, data.itemsize))
    return Case(find, lambda: data.wrong(find(), name.startswith(OURS)), cost)


def plain_search(z: Tensor, codebook: Tensor) -> Tensor:
    """Expanded distances in the latents' dtype, the N x K matrix and its argmin."""
    codebook = codebook.to(z.dtype)
    return (codebook.square().sum(1) - 2 * z @ codebook.t()).argmin(1)


def compiled_search(z: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    compiled = torch.compile(plain_search)
    return lambda: compiled(z, codebook)


PEER_SEARCH: dict[str, Callable[[Tensor, Tensor], Callable[[], Tensor]]] = {
    "torch.compile": compiled_search,
    "torch eager": lambda z, codebook: partial(plain_search, z, codebook),
    "torch cdist": lambda z, codebook: peers.cdist_search(z, codebook.to(z.dtype)),
    "flash-kmeans": peers.flash_kmeans_search,
}


def quantize(bench: Bench, n: int, k: int, half: bool, name: str) -> Case:
    """Codes, z_q, the loss and the statistics."""
    data = Latents(bench, n, k, half)
    z, codebook = data.z, data.codebook
    choose(data, name)
    dim = 1 if "NCHW" in name else -1
    latents = data.image() if dim == 1 else z

    def run() -> Any:
        return vector_quantize(latents, codebook, dim=dim, backend=data.backend)

    def check() -> dict[str, Any]:
        out = run()
        found = data.wrong(out.codes, True)
        codes = out.codes.reshape(-1)
        z_q = out.z_q.movedim(dim, -1).reshape(-1, D)
        assert torch.equal(z_q, codebook[codes].to(z.dtype)), "z_q is not the code"
        assert torch.equal(out.code_counts, torch.bincount(codes, minlength=data.k)), "counts"
        sums = torch.zeros(data.k, D, dtype=torch.float64, device=z.device)
        sums.index_add_(0, codes, z.double())
        loss = 0.25 * (z.double() - codebook.double()[codes]).square().mean()
        errors = {
            "loss_error": relative_error(out.commitment_loss, loss),
            "sums_error": relative_error(out.code_sums, sums),
        }
        assert max(errors.values()) < 1e-5, errors
        return {**found, **errors}

    cost = Cost(*floors.quantize_cost(data.n, data.k, D, data.itemsize))
    return Case(run, check, cost)


def step(bench: Bench, n: int, k: int, half: bool, name: str) -> Case:
    """Forward, backward and the update of the codebook."""
    data = Latents(bench, n, k, half)
    z, codebook = data.z.requires_grad_(), data.codebook
    moved, flops = floors.quantize_cost(data.n, data.k, D, data.itemsize)
    moved += data.n * (3 * D * data.itemsize + 8) + 4 * data.k * D * 4  # the backward, the update
    upstream = torch.randn_like(z)
    # On the device beforehand: a copy from the host would make it wait inside the step.
    one = torch.ones((), device=z.device)
    mass, total = torch.ones(data.k, device=z.device), codebook.clone()
    forward, update = plain_quantize, plain_update
    if name == "torch.compile":
        forward, update = torch.compile(plain_quantize), torch.compile(plain_update)

    def ours() -> Tensor:
        out = vector_quantize(z, codebook, backend=data.backend)
        (grad,) = torch.autograd.grad([out.z_q, out.commitment_loss], z, [upstream, one])
        counts, sums = out.code_counts, out.code_sums
        ema_update_(codebook, mass, total, counts, sums, decay=DECAY, backend=data.backend)
        return grad

    def plain() -> Tensor:
        z_q, loss, codes = forward(z, codebook)
        (grad,) = torch.autograd.grad([z_q, loss], z, [upstream, one])
        update(z, codes, codebook, mass, total)
        return grad

    run: Callable[[], Tensor] = ours if name == OURS else plain
    if name == "vector-quantize-pytorch":
        run = peers.vector_quantize_pytorch_step(z, codebook, upstream)

    def check() -> dict[str, Any]:
        before = codebook.double()
        codes = exact_codes(z.detach(), codebook)
        grad = run()
        rows = z.detach().double()
        want = upstream.double() + 0.5 / z.numel() * (rows - before[codes])
        counts = torch.bincount(codes, minlength=data.k).double()
        sums = torch.zeros_like(before).index_add_(0, codes, rows)
        moved_to = (DECAY * before + (1 - DECAY) * sums) / (DECAY + (1 - DECAY) * counts)[:, None]
        moved_to = torch.where(counts[:, None] > 0, moved_to, before)
        limit = 1e-5 if z.dtype == torch.float32 else 1e-2
        errors = {"grad_error": relative_error(grad, want)}
        if name != "vector-quantize-pytorch":  # which has a codebook of its own
            errors["codebook_error"] = relative_error(codebook, moved_to)
        if name == OURS:
            assert errors["grad_error"] < limit and errors["codebook_error"] < 1e-5, errors
        return errors

    return Case(run, check, Cost(moved, flops))


PEER_STEPS = ("torch.compile", "torch eager", "vector-quantize-pytorch")


def plain_quantize(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What people write: a distance matrix, the straight-through trick."""
    with torch.no_grad():
        codes = plain_search(z, codebook)
    vectors = F.embedding(codes, codebook).to(z.dtype)
    loss = 0.25 * F.mse_loss(z.float(), vectors.float())
    return z + (vectors - z).detach(), loss, codes


@torch.no_grad()
def plain_update(z: Tensor, codes: Tensor, codebook: Tensor, mass: Tensor, total: Tensor) -> None:
    """And one-hot statistics."""
    hits = F.one_hot(codes, len(codebook)).to(z.dtype)  # (N, K)
    mass.mul_(DECAY).add_(hits.sum(0), alpha=1 - DECAY)
    total.mul_(DECAY).add_((hits.t() @ z).float(), alpha=1 - DECAY)
    codebook.copy_(total / mass[:, None])


def rows() -> list[Row]:
    found = []
    for n, k, half, rank in SHAPES:
        label = f"N {n} K {k} D {D} {'half' if half else 'float32'}"
        names = {OURS: rank, TRITON: rank + 1, f"{OURS} NCHW": rank}
        groups: list[tuple[str, Any, dict[str, int]]] = [
            ("nearest code", search, names | dict.fromkeys(PEER_SEARCH, rank + 1)),
            ("with z_q, loss and statistics", quantize, names),
            ("training step", step, {OURS: rank} | dict.fromkeys(PEER_STEPS, rank + 1)),
        ]
        for title, build, ranks in groups:
            for name, row_rank in ranks.items():
                run = bound(build, n, k, half, name)
                found.append(Row("vector_quantize", f"{title}, {label}", name, run, row_rank, 6.0))
    return found
