"""The blur against an independent dense operator in float64, its identities and its gradients."""

from __future__ import annotations

import math

import pytest
import torch
from parity import EPS
from torch import Tensor

from msvq_fast.ops import (
    default_sigma,
    gaussian_blur,
    gaussian_pyramid,
)
from msvq_fast.ops.gaussian_blur.op import BORDERS, OP
from tests.ops.blur_cases import assert_blur_close, dense_blur, native_blur, taps

NATIVE = "native" in OP.kernels
native_only = pytest.mark.skipif(not NATIVE, reason=OP.missing.get("native", ""))
BACKENDS = ["reference", pytest.param("native", marks=native_only)]
ISAS = OP.kernels["native"]._C.cpu_isas() if NATIVE else ["portable"]
KERNELS = (1, 3, 7, 11, 15, 21, 31, 45)
SHAPES = ((1, 3, 1, 1), (2, 1, 2, 7), (1, 2, 97, 3), (1, 3, 31, 16), (1, 1, 33, 64), (1, 1, 5, 97))


@native_only
@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("isa", ISAS)
def test_native_equals_dense_operator(isa: str, border: str) -> None:
    for kernel_size in KERNELS:
        taps_y, taps_x = taps(kernel_size), taps(max(kernel_size - 4, 1))
        for shape in SHAPES:
            for adjoint in (False, True):
                x = torch.randn(shape)
                want = dense_blur(x, taps_y, taps_x, border, adjoint)
                edge = len(taps_y) if adjoint and border == "replicate" else 1
                for layout in (torch.contiguous_format, torch.channels_last):
                    y = x.to(memory_format=layout)
                    got = native_blur(y, taps_y, taps_x, border, adjoint, isa)
                    assert_blur_close(got, want, x * edge)


@native_only
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("isa", ISAS)
def test_native_rounds_low_precision_once(isa: str, dtype: torch.dtype) -> None:
    for shape in ((1, 3, 33, 97), (2, 5, 17, 16)):
        x = torch.randn(shape).to(dtype)
        for border in BORDERS:
            for adjoint in (False, True):
                want = dense_blur(x, taps(7), taps(11), border, adjoint)
                for layout in (torch.contiguous_format, torch.channels_last):
                    y = x.to(memory_format=layout)
                    got = native_blur(y, taps(7), taps(11), border, adjoint, isa)
                    assert_blur_close(got, want, x, ulps=16)


@native_only
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("border", BORDERS)
def test_native_types_for_every_kernel_and_size(border: str, dtype: torch.dtype) -> None:
    for kernel_size in KERNELS:
        for shape in (*SHAPES, (1, 1, 192, 256)):
            x = (torch.rand(shape) * 255).to(dtype)
            got = native_blur(x, taps(kernel_size), taps(kernel_size), border, False, "")
            want = dense_blur(x, taps(kernel_size), taps(kernel_size), border)
            if dtype == torch.uint8:
                assert (got.double() - want).abs().max() <= 0.5 + 1e-4
            else:
                assert_blur_close(got, want, x, ulps=16)


@native_only
@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("length", [1, 2, 3, 7, 16, 31, 32, 33, 64, 97, 1024])
def test_every_length_along_and_across(length: int, border: str) -> None:
    for shape in ((1, 3, length, 5), (1, 3, 4, length)):
        image = torch.rand(shape) * 255
        for kernel_size in KERNELS:
            weights = taps(kernel_size)
            for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.uint8):
                x = image.to(dtype)
                want = dense_blur(x, weights, weights, border)
                for layout in (torch.contiguous_format, torch.channels_last):
                    y = x.to(memory_format=layout)
                    got = native_blur(y, weights, weights, border, False, "")
                    if dtype == torch.uint8:
                        assert (got.double() - want).abs().max() <= 0.5 + 1e-4
                    else:
                        assert_blur_close(got, want, x, ulps=4 if dtype == torch.float32 else 16)


@native_only
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("isa", ISAS)
def test_native_converts_every_value_like_torch(isa: str, dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = every.reshape(1, 1, 256, 256)
    got = native_blur(x, [1.0], [1.0], "reflect", False, isa)
    same = (got.view(torch.int16) == x.view(torch.int16)) | (got.isnan() & x.isnan())
    # 0 + -0 is +0
    assert bool((same | (x == 0)).all())
    # Rounding: halves of every finite value, which are ties where the value is subnormal.
    got = native_blur(x.nan_to_num(0, 0, 0), [0.5], [0.75], "reflect", False, isa)
    want = (x.nan_to_num(0, 0, 0).float() * 0.75 * 0.5).to(dtype)
    assert torch.equal(got, want)


@native_only
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_native_wide_image_many_channels(isa: str, layout: torch.memory_format) -> None:
    # Several strips, the last of one pixel where 1025 are wide.
    for shape in ((1, 2, 192, 256), (1, 1, 20, 2100), (1, 2, 40, 1025), (1, 70, 20, 33)):
        x = torch.randn(shape).to(memory_format=layout)
        for border in BORDERS:
            for adjoint in (False, True):
                got = native_blur(x, taps(21), taps(15), border, adjoint, isa)
                edge = 21 if adjoint and border == "replicate" else 1
                want = dense_blur(x, taps(21), taps(15), border, adjoint)
                assert_blur_close(got, want, x * edge)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("border", BORDERS)
def test_full_size_image(border: str, backend: str) -> None:
    x = torch.rand(1, 1, 1024, 1000) * 2 - 1
    want = dense_blur(x, taps(31, 5.0), taps(31, 5.0), border)
    assert_blur_close(gaussian_blur(x, 31, 5.0, border=border, backend=backend), want, x)


@native_only
@pytest.mark.skipif(len(ISAS) < 3, reason="one instruction set that fuses multiply-adds")
@pytest.mark.parametrize("size", [1, 3, 11, 15, 21, 25, 31, 45])
def test_results_do_not_depend_on_the_instruction_set(size: int) -> None:
    x = torch.randn(1, 2, 70, 83)
    for border in BORDERS:
        for adjoint in (False, True):
            a, b = (
                native_blur(x, taps(size), taps(size), border, adjoint, isa)
                for isa in ("avx2", "avx512")
            )
            assert torch.equal(a, b), (border, adjoint)


@native_only
@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_large_outputs_are_those_of_small_ones(border: str, layout: torch.memory_format) -> None:
    # Of 4 MiB and more, rows of whole lines of cache are stored past it. Two strips of columns, the
    # last tile of rows is of 5; one image is no more than 4 MiB.
    x = (
        torch.randn(3, 1, 693, 1072)
        if layout == torch.contiguous_format
        else torch.randn(2, 3, 309, 800)
    )
    x = x.to(memory_format=layout)
    for size in (1, 15, 31, 37):
        got = gaussian_blur(x, size, border=border, backend="native")
        for image, want in zip(got, x, strict=True):
            assert torch.equal(image, gaussian_blur(want[None], size, border=border)[0])


@native_only
def test_a_large_output_that_begins_within_a_line_of_cache() -> None:
    x, native = torch.randn(1, 1, 1040, 1024), OP.kernels["native"]
    want = gaussian_blur(x, 15, backend="native")
    for offset in (0, 1, 8):
        out = torch.empty(x.numel() + 16)
        to = out[offset : x.numel() + offset]
        size, weights = (1, 1040, 1024, 1), taps(15, default_sigma(15))
        native._C.gaussian_blur_cpu(
            x.data_ptr(), to.data_ptr(), 0, size, weights, weights, 0, False, 2
        )
        assert torch.equal(to, want.flatten())
        assert out[:offset].isnan().all() and out[x.numel() + offset :].isnan().all()


@pytest.mark.parametrize("border", BORDERS)
def test_reference_equals_dense_operator(border: str) -> None:
    for kernel_size in KERNELS:
        for shape in SHAPES:
            x = torch.randn(shape, dtype=torch.float64)
            sigmas = 0.2 * kernel_size + 0.3, 1.5
            got = gaussian_blur(x, (kernel_size, 5), sigmas, border=border, backend="reference")
            want = dense_blur(x, taps(kernel_size, sigmas[0]), taps(5, 1.5), border)
            assert (got - want).abs().max() <= 1e-14 * x.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("border", BORDERS)
def test_uint8_rounds_half_to_even(backend: str, border: str) -> None:
    x = torch.randint(0, 256, (2, 3, 33, 50), dtype=torch.uint8)
    got = gaussian_blur(x, 7, 1.4, border=border, backend=backend)
    exact = dense_blur(x, taps(7, 1.4), taps(7, 1.4), border)
    assert got.dtype == torch.uint8
    assert (got.double() - exact).abs().max() <= 0.5 + 1e-4
    # Taps (1, 2, 1)/4 along pixels 0, 2 repeated, and (1) across, give exact halves: 0.5 and 1.5.
    if border == "reflect":
        ties = torch.tensor([[0, 0, 2, 4, 4, 4, 6]], dtype=torch.uint8).reshape(1, 1, 1, 7)
        sigma = math.sqrt(1 / (2 * math.log(2)))
        got = gaussian_blur(ties, (1, 3), sigma, backend=backend)
        assert got.flatten().tolist()[1:6] == [0, 2, 4, 4, 4]


@native_only
@pytest.mark.parametrize("isa", ISAS)
def test_native_uint8_ties(isa: str) -> None:
    x = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 1, 256)
    got = native_blur(x, [0.5], [1.0], "reflect", False, isa)
    assert torch.equal(got, (x.float() / 2).round().to(torch.uint8))
    assert bool((native_blur(x, [2.0], [1.0], "reflect", False, isa)[..., 128:] == 255).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("border", ["reflect", "symmetric", "circular"])
@pytest.mark.parametrize("size", [1, 2, 5, 16, 64])
def test_two_blurs_are_one_with_composed_taps(backend: str, border: str, size: int) -> None:
    x = torch.randn(1, 1, size, size + 3)
    once = taps(15)
    composed = torch.nn.functional.conv1d(
        torch.tensor(once, dtype=torch.float64).view(1, 1, -1),
        torch.tensor(once, dtype=torch.float64).view(1, 1, -1),
        padding=14,
    )
    got = gaussian_pyramid(x, 3, kernel_size=15, sigma=2.8, border=border, backend=backend)
    weights = composed.flatten().tolist()
    assert got[2] is x
    assert_blur_close(got[0], dense_blur(x, weights, weights, border), x, ulps=8)


@native_only
@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("shape", [(1, 2, 40, 37), (2, 1, 3, 300), (1, 1, 1, 2)])
def test_adjoint_inner_product(border: str, shape: tuple[int, ...]) -> None:
    x, y = torch.randn(2, *shape).unbind()
    forward = native_blur(x, taps(31), taps(7), border, False, "")
    adjoint = native_blur(y, taps(31), taps(7), border, True, "")
    left, right = (forward.double() * y).sum(), (x.double() * adjoint).sum()
    assert abs(left - right) <= 1e-6 * x.norm() * y.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("border", ["reflect", "symmetric", "replicate", "circular"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
def test_constant_image_is_preserved(backend: str, border: str, dtype: torch.dtype) -> None:
    x = torch.full((1, 3, 20, 40), 200 if dtype == torch.uint8 else 0.7).to(dtype)
    got = gaussian_blur(x, 31, 5.0, border=border, backend=backend)
    if dtype == torch.float32:
        assert (got - x).abs().max() <= 4 * EPS[dtype]
    else:
        assert torch.equal(got, x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_taps_would_gain(backend: str) -> None:
    """torchvision builds its dense kernel in the image's dtype; the blur keeps float32 taps."""
    x = torch.rand(1, 1, 64, 48).bfloat16()
    offsets = torch.linspace(-15, 15, 31, dtype=x.dtype)
    theirs = torch.exp(-0.5 * (offsets / 5.0).square())
    theirs = theirs / theirs.sum()
    dense = theirs[:, None] * theirs
    assert abs(dense.double().sum() - 1) > 1e-3
    got = gaussian_blur(x, 31, 5.0, border="symmetric", backend=backend).double()
    exact = dense_blur(x, taps(31, 5.0), taps(31, 5.0), "symmetric")
    assert abs(got.mean() / exact.mean() - 1) < 1e-4  # what the rounding of each pixel leaves
    assert_blur_close(got.to(x.dtype), exact, x, ulps=16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_symmetric_border_preserves_the_mean(backend: str) -> None:
    x = torch.rand(1, 1, 37, 50)
    mean = gaussian_blur(x, 31, border="symmetric", backend=backend).double().mean()
    assert abs(mean - x.double().mean()) <= 1e-7
    assert abs(gaussian_blur(x, 31, backend=backend).double().mean() - x.double().mean()) > 1e-6


@pytest.mark.parametrize("border", BORDERS)
def test_reference_gradients_are_those_of_the_values(border: str) -> None:
    x = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    arguments = (lambda x: gaussian_blur(x, (7, 3), border=border, backend="reference")), (x,)
    assert torch.autograd.gradcheck(*arguments)
    assert torch.autograd.gradgradcheck(*arguments)


@native_only
@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_native_first_and_second_gradients(border: str, layout: torch.memory_format) -> None:
    values = torch.randn(2, 3, 9, 20).to(memory_format=layout)
    upstream, direction = torch.randn(2, 2, 3, 9, 20).unbind()

    def gradients(x: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
        x = x.detach().requires_grad_()
        up = upstream.to(x.dtype).requires_grad_()
        out = gaussian_blur(x, 11, border=border, backend=backend).square()
        (grad_x,) = torch.autograd.grad(out, x, up, create_graph=True)
        seconds = torch.autograd.grad(grad_x, (x, up), direction.to(x.dtype))
        return grad_x.detach(), *seconds

    for got, want in zip(
        gradients(values, "native"), gradients(values.double(), "reference"), strict=True
    ):
        assert (got.double() - want).abs().max() <= 4e-6 * want.abs().max()


@native_only
def test_results_do_not_depend_on_threads() -> None:
    before = torch.get_num_threads()
    images = [torch.randn(1, 3, 200, 300), torch.randn(1, 1, 900, 70).half()]
    images.append(images[0].to(memory_format=torch.channels_last))
    try:
        for border in ("reflect", "circular"):
            for x in images:
                x.requires_grad_()
                results = []
                for threads in (1, 2, 3, 3):
                    torch.set_num_threads(threads)
                    out = gaussian_blur(x, 31, border=border, backend="native")
                    results.append((out, *torch.autograd.grad(out, x, x)))
                for others in results[1:]:
                    assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))
    finally:
        torch.set_num_threads(before)


@native_only
def test_saves_nothing_for_the_backward() -> None:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        gaussian_blur(torch.rand(1, 1, 9, 9, requires_grad=True), 5, backend="native")
    assert saved == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_layout_of_the_input_is_kept(backend: str) -> None:
    x = torch.randn(2, 3, 16, 20)
    want = gaussian_blur(x, 5, backend=backend)
    last = gaussian_blur(x.to(memory_format=torch.channels_last), 5, backend=backend)
    assert last.is_contiguous(memory_format=torch.channels_last)
    strided = torch.randn(2, 3, 32, 40)[:, :, ::2, ::2].copy_(x)
    for got in (last, gaussian_blur(strided, 5, backend=backend)):
        assert (got - want).abs().max() <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 0, 8, 8)])
def test_empty_batch(backend: str, shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, requires_grad=True)
    out = gaussian_blur(x, 5, backend=backend)
    out.sum().backward()
    assert out.shape == shape and x.grad is not None


@native_only
@pytest.mark.parametrize("kernel_size, sigma", [(5, 1.1), (31, 5.0)])
def test_agrees_with_kornia(kernel_size: int, sigma: float) -> None:
    filters = pytest.importorskip("kornia.filters")
    x = torch.rand(1, 3, 96, 80)
    pairs = {"reflect": "reflect", "replicate": "replicate", "circular": "circular"}
    for ours, theirs in {**pairs, "constant": "constant"}.items():
        want = filters.gaussian_blur2d(x, (kernel_size,) * 2, (sigma,) * 2, border_type=theirs)
        assert (gaussian_blur(x, kernel_size, sigma, border=ours) - want).abs().max() <= 2e-6


@native_only
@pytest.mark.parametrize("kernel_size", [5, 31])
def test_agrees_with_opencv(kernel_size: int) -> None:
    cv2 = pytest.importorskip("cv2")
    x = torch.rand(1, 3, 96, 80)
    sigma = default_sigma(kernel_size, "opencv")
    image = x[0].permute(1, 2, 0).contiguous().numpy()
    borders = {"reflect": 4, "symmetric": 2, "replicate": 1, "constant": 0}
    for ours, theirs in borders.items():
        want = cv2.GaussianBlur(image, (kernel_size,) * 2, sigma, borderType=theirs)
        got = gaussian_blur(x, kernel_size, sigma, border=ours)[0].permute(1, 2, 0)
        assert (got - torch.from_numpy(want)).abs().max() <= 2e-6


@native_only
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_registration(layout: str) -> None:
    x = torch.randn(2, 3, 8, 8)
    x = x.transpose(2, 3) if layout == "transposed" else x
    x = x.to(memory_format=torch.channels_last) if layout == "channels_last" else x
    operation = torch.ops.msvq_fast.gaussian_blur_native.default
    torch.library.opcheck(operation, (x, taps(3), taps(5), "reflect", False))
