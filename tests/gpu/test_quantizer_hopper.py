"""The quantizer's kernel for Hopper where it was made for; on the host it is tested everywhere."""

from __future__ import annotations

import pytest
import torch
from latent_cases import KINDS, latents
from torch._dynamo.testing import CompileCounter

from msvq_fast.ops import nearest_code, vector_quantize
from msvq_fast.ops.vector_quantize.op import OP

native_hopper = pytest.importorskip(
    "msvq_fast.ops.vector_quantize.native_hopper", exc_type=ImportError
)


@pytest.fixture(autouse=True)
def supported(device: str) -> None:
    if "native" not in OP.kernels:
        pytest.skip(OP.missing["native"])
    reason = OP.why_not("native", torch.zeros(1, 64, device=device), torch.zeros(1, 64))
    if reason is not None:
        pytest.skip(reason)


def test_what_is_picked(device: str) -> None:
    codebook = torch.zeros(8, 64, device=device)
    rows, apart = torch.zeros(65537, 64, device=device), torch.zeros(64, 65537, device=device)
    assert OP.pick(rows, codebook, 1) == OP.pick(apart[:, 1:], codebook, 0) == "native"
    assert OP.pick(apart, codebook, 0) == OP.pick(rows[:, :32], codebook[:, :32], 1) == "triton"


@pytest.mark.parametrize("name", ["nearest_code", "vector_quantize"])
def test_the_ops_are_registered_well(device: str, name: str) -> None:
    z, codebook = (t.to(device) for t in latents("normal", 100, 8))
    op = getattr(native_hopper, name)
    torch.library.opcheck(op, (z, codebook, 1) + ((0.25,) if name == "vector_quantize" else ()))


def test_compiles_once_without_a_break(device: str) -> None:
    graphs = CompileCounter()
    compiled = torch.compile(
        lambda z, codebook: vector_quantize(z, codebook)[:3],
        fullgraph=True, dynamic=True, backend=graphs,
    )  # fmt: skip
    for count in (100, 3000, 70_000):
        z, codebook = (t.to(device) for t in latents("normal", count, 64))
        want = vector_quantize(z, codebook, backend="native")
        got = compiled(z, codebook)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=False))
    assert graphs.frame_count == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_codes", [1, 2, 63, 256, 1000, 1024])
def test_codes_equal_brute_force(device: str, kind: str, num_codes: int) -> None:
    z, codebook = latents(kind, 3000, num_codes)
    got = nearest_code(z.to(device), codebook.to(device), backend="native")
    want = nearest_code(z, codebook, backend="reference")
    assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 63, 64, 8449, 200_003])
@pytest.mark.parametrize("num_codes", [256, 512])
def test_sizes_and_types(device: str, dtype: torch.dtype, count: int, num_codes: int) -> None:
    z, codebook = (t.to(device) for t in latents("trained", count, num_codes))
    z = z.to(dtype)
    got = vector_quantize(z, codebook, backend="native")
    want = vector_quantize(z, codebook, backend="reference")
    assert torch.equal(got.codes, want.codes) and torch.equal(got.z_q, want.z_q)
    assert torch.equal(got.code_counts, want.code_counts)
    torch.testing.assert_close(got.commitment_loss, want.commitment_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(got.code_sums, want.code_sums, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("kind", ["normal", "init", "halfway"])
@pytest.mark.parametrize("num_codes", [256, 1024])
def test_the_same_bits_again(device: str, kind: str, num_codes: int) -> None:
    z, codebook = (t.to(device) for t in latents(kind, 100_000, num_codes))
    want = vector_quantize(z, codebook, backend="native")
    for _ in range(5):
        got = vector_quantize(z, codebook, backend="native")
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_waits_for_nothing_and_is_captured(device: str) -> None:
    z, codebook = (t.to(device) for t in latents("normal", 5000, 256))
    want = vector_quantize(z, codebook, backend="native")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = vector_quantize(z, codebook, backend="native")
    for _ in range(3):
        graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
