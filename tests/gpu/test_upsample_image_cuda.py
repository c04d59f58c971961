"""The last layer of a decoder on CUDA tensors: the definition in float64, and what a GPU shows."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from parity import assert_close
from torch import Tensor

from msvq_fast.ops import InputError, upsample_image
from msvq_fast.ops.upsample_image.op import OP

if "triton" in OP.missing:
    pytest.skip(OP.missing["triton"], allow_module_level=True)

HALF = [torch.bfloat16, torch.float16]
LAST = torch.channels_last


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> list[Tensor]:
    x = torch.randn(shape, device=device).to(dtype, memory_format=LAST)
    weight = torch.randn(shape[1], 3, 4, 4, device=device) * shape[1] ** -0.5
    return [x, weight.to(dtype), torch.randn(3, device=device).to(dtype)]


def with_gradients(tensors: list[Tensor], upstream: Tensor, backend: str | None) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = upsample_image(*leaves, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def compare(got: list[Tensor], want: list[Tensor]) -> None:
    # Sums of weight and bias over millions of pixels, in float32 and rounded.
    names, limits = ("value", "x", "weight", "bias"), (4, 4, 8, 8)
    for name, a, b, ulps in zip(names, got, want, limits, strict=True):
        assert_close(name, a, b, ulps=ulps)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 64, 512, 512),
        (2, 16, 1, 1),
        (3, 32, 7, 129),
        (2, 64, 33, 63),
        (2, 64, 5, 64),
        (1, 64, 64, 65),
        (2, 128, 31, 48),
        (2, 128, 9, 127),
    ],
)
def test_values_and_gradients(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors = inputs(shape, dtype, device)
    assert OP.pick(*tensors) == "triton"
    upstream = torch.randn(shape[0], 3, 2 * shape[2], 2 * shape[3], device=device).to(dtype)
    got = with_gradients(tensors, upstream, None)
    assert got[0].is_contiguous(memory_format=LAST) and got[1].is_contiguous(memory_format=LAST)
    truth = [t.double() for t in tensors]
    compare(got, with_gradients(truth, upstream.double(), "reference"))


@pytest.mark.parametrize("dtype", HALF)
def test_autocast(device: str, dtype: torch.dtype) -> None:
    leaves = [t.float().requires_grad_() for t in inputs((2, 64, 17, 40), dtype, device)]
    with torch.autocast("cuda", dtype):
        out = upsample_image(*leaves)
        assert OP.pick(leaves[0].to(dtype), *leaves[1:]) == "triton"
        plain = F.conv_transpose2d(*leaves, stride=2, padding=1)
    assert out.dtype == plain.dtype == dtype
    upstream = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, upstream)
    assert all(grad.dtype == torch.float32 for grad in grads)
    rounded = [t.detach().to(dtype).double() for t in leaves]
    want = with_gradients(rounded, upstream.double(), "reference")
    compare([out.detach(), *(g.to(dtype) for g in grads)], want)


def test_others_run_the_convolution_without_a_warning(device: str) -> None:
    x, weight, bias = inputs((1, 16, 4, 6), torch.bfloat16, device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for tensors in ((x.float(), weight.float(), bias.float()), (x.contiguous(), weight, bias)):
            assert OP.pick(*tensors) == "reference"
            want = F.conv_transpose2d(*tensors, stride=2, padding=1)
            assert torch.equal(upsample_image(*tensors), want)
    with pytest.raises(InputError, match="channels_last"):
        upsample_image(x.contiguous(), weight, bias, backend="triton")


@pytest.mark.parametrize("dtype", HALF)
def test_repeats_bit_for_bit(device: str, dtype: torch.dtype) -> None:
    tensors = inputs((4, 64, 200, 190), dtype, device)
    upstream = torch.randn(4, 3, 400, 380, device=device).to(dtype)
    first, *others = (with_gradients(tensors, upstream, "triton") for _ in range(4))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_second_derivative(device: str) -> None:
    tensors = [t.requires_grad_() for t in inputs((1, 16, 5, 6), torch.float16, device)]
    upstream = torch.randn(1, 3, 10, 12, device=device).half()
    (grad,) = torch.autograd.grad(
        upsample_image(*tensors, backend="triton"), tensors[0], upstream, create_graph=True
    )
    (got,) = torch.autograd.grad(grad.sum(), tensors[1])
    truth = [t.detach().double().requires_grad_() for t in tensors]
    (grad,) = torch.autograd.grad(
        upsample_image(*truth), truth[0], upstream.double(), create_graph=True
    )
    assert_close("second", got, torch.autograd.grad(grad.sum(), truth[1])[0], ulps=32)


def test_captured_in_a_graph(device: str) -> None:
    tensors = [t.requires_grad_() for t in inputs((1, 64, 20, 70), torch.bfloat16, device)]
    upstream = torch.randn(1, 3, 40, 140, device=device).bfloat16()

    def step() -> list[Tensor]:
        out = upsample_image(*tensors, backend="triton")
        return [out, *torch.autograd.grad(out, tensors, upstream)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        want = [t.detach().clone() for t in step()]  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_more_elements_than_32_bits_count(device: str) -> None:
    """2.2e9 features of 5 images; the last image is that of a call of its own."""
    if torch.cuda.mem_get_info()[0] < 14 << 30:
        pytest.skip("takes 14 GiB")
    size = (5, 64, 2600, 2650)
    x = torch.empty(size, device=device, dtype=torch.bfloat16, memory_format=LAST).zero_()
    x[-1].normal_()
    assert x.numel() > 2**31
    _, weight, bias = inputs((1, 64, 1, 1), torch.bfloat16, device)
    tensors = [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    out = upsample_image(*tensors, backend="triton")
    alone = [x.detach()[-1:].clone(memory_format=LAST), weight.detach(), bias.detach()]
    upstream = torch.zeros_like(out)
    upstream[-1].normal_()
    want = with_gradients(alone, upstream[-1:], "triton")
    assert torch.equal(out[-1:], want[0])
    grads = torch.autograd.grad(out, tensors, upstream)
    assert torch.equal(grads[0][-1:], want[1]) and not grads[0][:-1].any()
    for grad, right in zip(grads[1:], want[2:], strict=True):
        assert_close("sum", grad, right.double(), ulps=2)
