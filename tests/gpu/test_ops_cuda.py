"""Every op on CUDA tensors against its reference in float64, and what only a GPU shows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from parity import assert_close
from torch import Tensor

from msvq_fast.ops import (
    InputError,
    gaussian_blur,
    gaussian_pyramid,
    nearest_code,
    vector_quantize,
)
from msvq_fast.ops.gaussian_blur.op import BORDERS
from msvq_fast.ops.gaussian_blur.op import OP as BLUR
from msvq_fast.ops.vector_quantize.op import OP as QUANTIZE

BACKENDS = ["reference", "native", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def need(op, backend: str, *tensors: object) -> None:  # type: ignore[no-untyped-def]
    if op.missing.get(backend):
        pytest.skip(op.missing[backend])
    if op.why_not(backend, *tensors):
        pytest.skip(op.why_not(backend, *tensors))


@pytest.fixture
def no_synchronisation(device: str) -> Iterator[None]:
    """Any wait of the host for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def latents(device: str, k: int = 257, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    codebook = torch.randn(k, 64)
    z = codebook[torch.randint(k, (2, 33, 31))] + 0.7 * torch.randn(2, 33, 31, 64)
    return z.movedim(-1, 1).contiguous().to(device, dtype), codebook.to(device)


def brute_force(z: Tensor, codebook: Tensor) -> Tensor:
    rows = z.movedim(1, -1).double().cpu()
    return torch.cdist(rows.flatten(0, -2), codebook.double().cpu()).argmin(1).view(rows.shape[:-1])


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["NCHW", "channels_last", "strided"])
@pytest.mark.parametrize("k", [1, 257, 1024])
def test_codes_are_exact(device: str, backend: str, dtype: torch.dtype, layout: str, k) -> None:
    z, codebook = latents(device, k, dtype)
    if layout == "channels_last":
        z = z.to(memory_format=torch.channels_last)
    elif layout == "strided":
        z = z[..., ::2]
    need(QUANTIZE, backend, z, codebook)
    got = nearest_code(z, codebook, dim=1, backend=backend)
    assert torch.equal(got.cpu(), brute_force(z, codebook))


@every_backend
def test_rows_far_longer_than_the_codes(device: str, backend: str) -> None:
    """Beyond float16 scores are infinite, and NaN with a number in their bits."""
    codebook = torch.tensor([1.0, 2.0] + 6 * [-1.0])[:, None].to(device)
    z = torch.tensor([1e6, -1e6, 1e12, float("inf"), float("nan"), 0.9])[:, None].to(device)
    need(QUANTIZE, backend, z, codebook)
    got = nearest_code(z, codebook, backend=backend)
    assert got.tolist() == [1, 2, 1, 0, 0, 0]


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantizer_values_and_gradients(device: str, backend: str, dtype: torch.dtype) -> None:
    z, codebook = latents(device, dtype=dtype)
    need(QUANTIZE, backend, z, codebook)
    z.requires_grad_()
    out = vector_quantize(z, codebook, dim=1, backend=backend)
    truth = z.detach().cpu().double().requires_grad_()
    want = vector_quantize(truth, codebook.cpu().double(), dim=1, backend="reference")
    upstream = torch.randn(z.shape).to(dtype)
    (out.z_q * upstream.to(device)).float().sum().add(out.commitment_loss * 5).backward()
    (want.z_q * upstream.double()).sum().add(want.commitment_loss * 5).backward()
    assert torch.equal(out.codes.cpu(), want.codes)
    assert torch.equal(out.code_counts.cpu(), want.code_counts)
    assert_close("z_q", out.z_q.detach().cpu(), want.z_q.detach())
    assert_close("loss", out.commitment_loss.detach().cpu(), want.commitment_loss.detach(), ulps=64)
    assert_close("sums", out.code_sums.cpu(), want.code_sums, ulps=64)
    assert z.grad is not None and truth.grad is not None
    assert_close("grad", z.grad.cpu(), truth.grad)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_quantizer_repeats_bit_for_bit(device: str, backend: str) -> None:
    z, codebook = latents(device)
    need(QUANTIZE, backend, z, codebook)
    first, *others = (vector_quantize(z, codebook, dim=1, backend=backend) for _ in range(5))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_quantizer_waits_for_nothing_and_is_captured(
    device: str, request: pytest.FixtureRequest
) -> None:
    z, codebook = latents(device)
    need(QUANTIZE, "triton", z, codebook)
    want = vector_quantize(z, codebook, dim=1, backend="triton")  # compiles
    request.getfixturevalue("no_synchronisation")
    vector_quantize(z, codebook, dim=1, backend="triton")
    torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = vector_quantize(z, codebook, dim=1, backend="triton")
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def blur_or_skip(x: Tensor, size: int, border: str, backend: str) -> Tensor:
    if BLUR.missing.get(backend):
        pytest.skip(BLUR.missing[backend])
    try:
        return gaussian_blur(x, size, border=border, backend=backend)
    except InputError as error:
        if "cannot run" not in str(error):
            raise
        pytest.skip(str(error))


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("size", [7, 9, 31, 45])  # 9: no radius of the paper
def test_blur(  # type: ignore[no-untyped-def]
    device: str, backend: str, dtype: torch.dtype, layout, border: str, size: int
) -> None:
    x = torch.randn(2, 3, 70, 45).to(device, dtype).to(memory_format=layout)
    x.requires_grad_()
    out = blur_or_skip(x, size, border, backend)
    truth = x.detach().cpu().double().requires_grad_()
    want = gaussian_blur(truth, size, border=border, backend="reference")
    upstream = torch.randn(x.shape).to(dtype)
    out.backward(upstream.to(device))
    want.backward(upstream.double())
    assert x.grad is not None and truth.grad is not None
    assert_close("value", out.detach().cpu(), want.detach(), ulps=16)
    assert_close("grad", x.grad.cpu(), truth.grad, ulps=16)


@every_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("border", BORDERS)
def test_blur_of_bytes(device: str, backend: str, layout, border: str) -> None:  # type: ignore[no-untyped-def]
    x = torch.randint(0, 256, (2, 3, 70, 45), dtype=torch.uint8).to(memory_format=layout)
    out = blur_or_skip(x.to(device), 31, border, backend)
    want = gaussian_blur(x.double(), 31, border=border, backend="reference")
    assert out.dtype == torch.uint8
    assert (out.cpu().double() - want).abs().max() <= 0.5 + 1e-3


def blur_for_hopper(device: str):  # type: ignore[no-untyped-def]
    native = BLUR.kernels.get("native")
    if native is None or not hasattr(native._C, "gaussian_pyramid_hopper"):
        pytest.skip("no extension with kernels for Hopper")
    if torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("the kernel is for Hopper")
    return native


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("border", BORDERS)
def test_blur_on_tensor_cores(
    device: str, dtype: torch.dtype, border: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    native = blur_for_hopper(device)
    others = []
    for shape, size in (((2, 3, 1024, 1024), 31), ((1, 2, 75, 141), 29), ((3, 1, 9, 130), 33)):
        x = torch.rand(shape).to(device, dtype)
        if size == 33:  # off a boundary of pairs
            x = x.new_zeros(x.numel() + 1)[1:].view(shape).copy_(x)
        x[-1, 0, 3, 70] = float("inf")
        monkeypatch.setattr(native, "TENSOR_CORES", True)
        out = gaussian_blur(x, size, border=border, backend="native")
        for _ in range(3):
            assert torch.equal(out, gaussian_blur(x, size, border=border, backend="native"))
        monkeypatch.setattr(native, "TENSOR_CORES", False)
        plain = gaussian_blur(x, size, border=border, backend="native")
        assert torch.equal(out.isfinite(), plain.isfinite())
        others.append(torch.equal(out, plain))
        clean = x.nan_to_num(posinf=0).double()
        want = gaussian_blur(clean, size, border=border, backend="reference")
        away = plain.isfinite()
        assert_close("value", out[away].cpu(), want[away].cpu(), ulps=16)
    assert not all(others), "the other kernel ran"


@pytest.mark.parametrize("border", ["reflect", "symmetric", "circular"])
def test_pyramid_on_tensor_cores(device: str, border: str, monkeypatch: pytest.MonkeyPatch) -> None:
    native = blur_for_hopper(device)
    for shape, size in (((2, 3, 1024, 1024), 31), ((1, 2, 80, 288), 29), ((3, 1, 16, 128), 33)):
        x = torch.rand(shape).to(device)
        x[-1, 0, 3, 70] = float("inf")
        monkeypatch.setattr(native, "TENSOR_CORES", True)
        levels = gaussian_pyramid(x, 4, kernel_size=size, border=border)
        assert levels[-1] is x
        again = gaussian_pyramid(x, 4, kernel_size=size, border=border)
        assert all(torch.equal(a, b) for a, b in zip(levels, again, strict=True))
        monkeypatch.setattr(native, "TENSOR_CORES", False)
        others = gaussian_pyramid(x, 4, kernel_size=size, border=border)
        assert not torch.equal(levels[1], others[1]), "the other kernel ran"
        clean = x.nan_to_num(posinf=0).double()
        want = gaussian_pyramid(clean, 4, kernel_size=size, border=border, backend="reference")
        for level, other, truth in zip(levels, others, want, strict=True):
            away = other.isfinite()
            assert torch.equal(level.isfinite(), away)
            assert_close("value", level[away].cpu(), truth[away].cpu(), ulps=16)


def test_pyramid_with_a_gradient(device: str) -> None:
    x = torch.rand(1, 1, 64, 128).to(device).requires_grad_()
    truth = x.detach().cpu().double().requires_grad_()
    sum(level.square().sum() for level in gaussian_pyramid(x, 3, kernel_size=31)).backward()
    want = gaussian_pyramid(truth, 3, kernel_size=31, backend="reference")
    sum(level.square().sum() for level in want).backward()
    assert_close("grad", x.grad.cpu(), truth.grad, ulps=64)


def test_pyramid_compiles_without_a_break(device: str) -> None:
    compiled = torch.compile(
        lambda x: gaussian_pyramid(x, 3, kernel_size=31), fullgraph=True, backend="aot_eager"
    )
    for shape in ((1, 1, 64, 128), (2, 1, 50, 40)):  # the second is blurred once, then again
        x = torch.rand(shape).to(device)
        want = gaussian_pyramid(x, 3, kernel_size=31)
        assert all(torch.equal(a, b) for a, b in zip(compiled(x), want, strict=True))
