"""The blur's CUDA kernels run on the host over a model of the block and its barriers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from msvq_fast.ops.gaussian_blur.op import BORDERS, OP
from tests.ops.blur_cases import assert_blur_close, dense_blur, taps

pytestmark = pytest.mark.skipif("native" not in OP.kernels, reason=OP.missing.get("native", ""))
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def on_host(
    x: Tensor, taps_y: list[float], taps_x: list[float], border: str, adjoint: bool = False,
    *, blocks: int = 1, reversed_threads: bool = False,
) -> Tensor:  # fmt: skip
    native = OP.kernels["native"]
    out = torch.empty_like(x)
    batch, channels, height, width = x.shape
    nchw = x.is_contiguous()
    native._C.gaussian_blur_cuda_on_host(
        x.data_ptr(),
        out.data_ptr(),
        native.IMAGE_TYPES[x.dtype],
        (batch * channels if nchw else batch, height, width, 1 if nchw else channels),
        taps_y,
        taps_x,
        native.BORDERS[border],
        adjoint,
        blocks,
        reversed_threads,
    )
    return out


def check(
    x: Tensor, taps_y: list[float], taps_x: list[float], border: str, adjoint: bool, blocks: int
) -> None:
    """Equal to the dense operator, and the same bits whatever the order of the threads."""
    got = on_host(x, taps_y, taps_x, border, adjoint, blocks=blocks)
    edge = len(taps_y) if adjoint and border == "replicate" else 1
    ulps = 16 if x.dtype in (torch.float16, torch.bfloat16) or len(taps_y) > 45 else 4
    want = dense_blur(x, taps_y, taps_x, border, adjoint)
    assert_blur_close(got, want, x * edge, ulps=ulps)
    other = on_host(x, taps_y, taps_x, border, adjoint, blocks=blocks, reversed_threads=True)
    assert torch.equal(got, other)


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("kernel_size", [1, 3, 7, 11, 15, 21, 31, 45, 129])
def test_equals_dense_operator(kernel_size: int, border: str) -> None:
    for shape in ((2, 3, 1, 1), (1, 2, 7, 2), (1, 1, 40, 141), (1, 5, 33, 16)):
        for layout in LAYOUTS:
            x = torch.randn(shape).to(memory_format=layout)
            for adjoint in (False, True):
                check(x, taps(kernel_size), taps(kernel_size), border, adjoint, blocks=8)


@pytest.mark.parametrize("border", BORDERS)
def test_sizes_differ_by_axis(border: str) -> None:
    x = torch.randn(1, 3, 19, 70)
    for sizes in ((1, 31), (45, 3), (31, 45)):
        for adjoint in (False, True):
            check(x, taps(sizes[0]), taps(sizes[1]), border, adjoint, blocks=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kernel_size", [5, 31])
def test_low_precision_rounds_once(dtype: torch.dtype, kernel_size: int) -> None:
    for layout in LAYOUTS:
        x = torch.randn(1, 3, 21, 135).to(dtype).to(memory_format=layout)
        for border in BORDERS:
            for adjoint in (False, True):
                check(x, taps(kernel_size), taps(kernel_size), border, adjoint, blocks=4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel_size", [5, 15, 31])
def test_uint8_rounds_half_to_even(kernel_size: int, layout: torch.memory_format) -> None:
    x = torch.randint(0, 256, (1, 3, 21, 135), dtype=torch.uint8).to(memory_format=layout)
    for border in BORDERS:
        got = on_host(x, taps(kernel_size), taps(kernel_size), border)
        exact = dense_blur(x, taps(kernel_size), taps(kernel_size), border)
        assert (got.double() - exact).abs().max() <= 0.5 + 1e-4
    ties = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 1, 256)
    assert torch.equal(on_host(ties, [0.5], [1.0], "reflect"), (ties / 2).round().byte())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel_size", [11, 31, 45])
def test_strips_away_from_every_edge(kernel_size: int, dtype: torch.dtype) -> None:
    for shape, layout in (((1, 1, 131, 1004), LAYOUTS[0]), ((1, 3, 100, 349), LAYOUTS[1])):
        x = torch.randn(shape).to(dtype).to(memory_format=layout)
        for border in BORDERS:
            for adjoint in (False, True):
                check(x, taps(kernel_size), taps(kernel_size), border, adjoint, blocks=4)


@pytest.mark.parametrize("blocks", [1, 16, 1000])
@pytest.mark.parametrize("kernel_size", [9, 15])
def test_the_cut_into_tasks_changes_no_bit(kernel_size: int, blocks: int) -> None:
    x = torch.randn(2, 1, 150, 130)
    for border in BORDERS:
        for adjoint in (False, True):
            whole = on_host(x, taps(kernel_size), taps(kernel_size), border, adjoint)
            cut = on_host(x, taps(kernel_size), taps(kernel_size), border, adjoint, blocks=blocks)
            assert torch.equal(whole, cut)


def test_a_bad_pixel_stays_in_its_window() -> None:
    for kernel_size in (9, 15):
        x = torch.zeros(1, 1, 60, 150)
        x[0, 0, 30, 70] = float("inf")
        radius = kernel_size // 2
        inside = on_host(x, taps(kernel_size), taps(kernel_size), "reflect").isinf()
        assert int(inside.sum()) == kernel_size**2
        rows, columns = slice(30 - radius, 31 + radius), slice(70 - radius, 71 + radius)
        assert bool(inside[0, 0, rows, columns].all())


def test_says_why_a_cuda_tensor_cannot_be_blurred() -> None:
    native = OP.kernels["native"]
    with FakeTensorMode():
        x = torch.empty(1, 3, 8, 8, device="cuda")
    built = hasattr(native._C, "gaussian_blur_cuda")
    reason = native.unsupported(x, taps(15), taps(15), "reflect")
    assert reason is None if built else "built without CUDA" in reason
    if built:
        assert "129 taps" in native.unsupported(x, taps(131), taps(3), "reflect")
    assert "float64" in native.unsupported(x.double(), taps(3), taps(3), "reflect")
