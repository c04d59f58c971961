"""The blur for Hopper run on the host over a model of the block and its tensor cores."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from msvq_fast.ops.gaussian_blur.op import BORDERS, OP
from tests.ops.blur_cases import assert_blur_close, dense_blur, taps

pytestmark = pytest.mark.skipif(
    not hasattr(getattr(OP.kernels.get("native"), "_C", None), "gaussian_blur_hopper_on_host"),
    reason="the model of a block needs the C++ extension and glibc",
)
DTYPES = [torch.float16, torch.bfloat16]
ROUNDING = 1.01 * 2**-8  # of bfloat16


def on_host(
    x: Tensor, taps_y: list[float], taps_x: list[float] | None = None, border: str = "reflect",
    adjoint: bool = False, *, processors: int = 1, order: int = 0, out: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """None where the kernel does not take these images."""
    native = OP.kernels["native"]
    batch, channels, height, width = x.shape
    nchw = x.is_contiguous()
    if out is None:
        out = torch.full_like(x, 77 if x.dtype == torch.uint8 else math.nan)
    ran = native._C.gaussian_blur_hopper_on_host(
        x.data_ptr(),
        out.data_ptr(),
        native.IMAGE_TYPES[x.dtype],
        (batch * channels if nchw else batch, height, width, 1 if nchw else channels),
        taps_y,
        taps_y if taps_x is None else taps_x,
        native.BORDERS[border],
        adjoint,
        processors,
        order,
    )
    return out if ran else None


def check(x: Tensor, kernel_size: int, border: str, adjoint: bool = False) -> None:
    got = on_host(x, taps(kernel_size), border=border, adjoint=adjoint)
    assert got is not None
    want = dense_blur(x, taps(kernel_size), taps(kernel_size), border, adjoint)
    assert_blur_close(got, want, x, ulps=16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("kernel_size", [29, 31, 33])
def test_equals_dense_operator(kernel_size: int, border: str, dtype: torch.dtype) -> None:
    # Strips with every edge, cut off, odd; planes lower than a step, than the kernel, of one row.
    for shape in ((1, 1, 40, 256), (2, 1, 33, 141), (1, 1, 7, 98), (1, 1, 1, 130)):
        check(torch.randn(shape).to(dtype), kernel_size, border)


@pytest.mark.parametrize("border", ["symmetric", "circular", "constant"])
def test_the_adjoint_that_is_the_blur(border: str) -> None:
    check(torch.randn(1, 1, 40, 150).half(), 31, border, adjoint=True)


def test_strips_away_from_every_edge() -> None:
    for dtype in DTYPES:
        check(torch.randn(1, 1, 90, 520).to(dtype), 31, "reflect")


@pytest.mark.parametrize("dtype", DTYPES)
def test_neither_cut_nor_order_of_threads_changes_a_bit(dtype: torch.dtype) -> None:
    x = torch.randn(2, 1, 70, 200).to(dtype)
    x[1, 0, 20, 30] = x[1, 0, 69, 190] = math.inf
    want = on_host(x, taps(31))
    assert want is not None
    for processors, order in ((1, 1), (2, 2), (3, 3), (100, 5)):
        got = on_host(x, taps(31), processors=processors, order=order)
        assert got is not None and torch.equal(got, want)


def test_a_bad_pixel_leaves_later_streams_alone() -> None:
    x = torch.randn(3, 1, 160, 96).half()  # one block has a plane and the first steps of the next
    x[0, 0, 3, 3] = math.inf
    want, got = on_host(x, taps(29), processors=100), on_host(x, taps(29))
    assert want is not None and got is not None and torch.equal(got, want)


def test_more_steps_than_a_block_takes_in_one_go() -> None:
    x = torch.randn(1, 1, 16 * 65 + 3, 96).half()
    x[0, 0, 4, 5] = x[0, 0, -20, 60] = math.inf
    got = on_host(x, taps(29))
    assert got is not None
    inside = torch.zeros(x.shape, dtype=torch.bool)
    inside[..., :19, :20] = inside[..., -34:-5, 46:75] = True
    assert torch.equal(got.isinf(), inside)
    want = dense_blur(x.nan_to_num(posinf=0), taps(29), taps(29), "reflect")
    assert_blur_close(got[~inside], want[~inside], x[~x.isinf()], ulps=16)


def test_off_a_boundary_of_pairs() -> None:
    x = torch.randn(2 * 40 * 130 + 1).half()
    out = torch.full_like(x, math.nan)
    for from_one, to_one in ((True, False), (False, True)):
        source = x[1:] if from_one else x[:-1]
        target = out[1:] if to_one else out[:-1]
        image = source.view(2, 1, 40, 130)
        got = on_host(image, taps(31), out=target.view(2, 1, 40, 130))
        assert got is not None
        assert_blur_close(got, dense_blur(image, taps(31), taps(31), "reflect"), image, ulps=16)


@pytest.mark.parametrize("scale", [1e-37, 1e-20, 1e-3, 255.0, 1e15, 3e38])
def test_no_scale_loses_digits(scale: float) -> None:
    x = ((torch.rand(1, 1, 48, 130) + 0.1) * (scale / 1.1)).bfloat16()
    got = on_host(x, taps(31))
    assert got is not None
    want = dense_blur(x, taps(31), taps(31), "reflect")
    assert ((got.double() - want) / want).abs().max() < ROUNDING


def test_bright_and_dark_side_by_side() -> None:
    x = torch.rand(1, 1, 64, 160) + 0.5
    x[..., 80:] *= 2.0**-12
    x[..., 30:34, 120:124] *= 2.0**20
    x = x.bfloat16()
    got = on_host(x, taps(29))
    assert got is not None
    want = dense_blur(x, taps(29), taps(29), "reflect")
    assert ((got.double() - want) / want).abs().max() < ROUNDING


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_bad_pixel_stays_in_its_window(bad: float, dtype: torch.dtype) -> None:
    x = torch.rand(1, 1, 100, 300).to(dtype)
    x[0, 0, 50, 130] = x[0, 0, 3, 3] = bad
    got = on_host(x, taps(29))
    assert got is not None
    inside = torch.zeros(100, 300, dtype=torch.bool)
    inside[36:65, 116:145] = inside[:18, :18] = True
    assert torch.equal(~got[0, 0].isfinite(), inside)
    if not math.isnan(bad):
        assert bool((got[0, 0][inside] == bad).all())
    clean = torch.where(x.isfinite(), x, torch.zeros_like(x))
    want = dense_blur(clean, taps(29), taps(29), "reflect")
    outside = ~inside.expand(1, 1, 100, 300)
    assert_blur_close(got[outside], want[outside], clean, ulps=16)


def test_takes_what_it_is_for() -> None:
    x, wide = torch.rand(1, 3, 40, 128).half(), taps(31)
    assert on_host(x, wide) is not None and on_host(x.float(), wide) is None
    assert on_host(x, wide, taps(29)) is None
    assert on_host(x, taps(27)) is None and on_host(x, taps(35)) is None
    assert on_host(x.to(memory_format=torch.channels_last), wide) is None
    assert on_host((x * 255).byte(), wide) is None
    assert on_host(x[..., :90].contiguous(), wide) is None
    for border in ("reflect", "replicate"):
        assert on_host(x, wide, border=border, adjoint=True) is None
