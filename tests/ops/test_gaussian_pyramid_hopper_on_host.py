"""Two blurs in one pass for Hopper, run on the host over a model of block and tensor cores."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from msvq_fast.ops.gaussian_blur.op import OP
from tests.ops.blur_cases import assert_blur_close, dense_blur, taps

pytestmark = pytest.mark.skipif(
    not hasattr(getattr(OP.kernels.get("native"), "_C", None), "gaussian_pyramid_on_host"),
    reason="the model of a block needs the C++ extension and glibc",
)
BORDERS = ["reflect", "symmetric", "circular"]  # that fold


def on_host(
    x: Tensor, kernel: list[float], border: str = "reflect", *, processors: int = 1, order: int = 0
) -> tuple[Tensor, Tensor] | None:
    """``x`` blurred once and twice; None where the kernel does not take these images."""
    native = OP.kernels["native"]
    once, twice = torch.full_like(x, math.nan), torch.full_like(x, math.nan)
    ran = native._C.gaussian_pyramid_on_host(
        x.data_ptr(),
        once.data_ptr(),
        twice.data_ptr(),
        native._TYPES[x.dtype],
        (x.shape[0] * x.shape[1], *x.shape[2:]),
        kernel,
        native._BORDERS[border],
        processors,
        order,
    )
    return (once, twice) if ran else None


def check(x: Tensor, kernel_size: int, border: str, processors: int = 1) -> None:
    kernel = taps(kernel_size)
    got = on_host(x, kernel, border, processors=processors)
    assert got is not None
    want = x
    for level in got:
        want = dense_blur(want, kernel, kernel, border)
        assert_blur_close(level, want, x, ulps=4)


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("kernel_size", [29, 31, 33])
def test_equals_dense_operator(kernel_size: int, border: str) -> None:
    # One strip; two, the second cut off; planes lower than a kernel, than a step of it.
    for shape in ((1, 1, 48, 256), (2, 1, 32, 272), (1, 1, 16, 96)):
        check(torch.randn(shape), kernel_size, border)


def test_strips_away_from_every_edge() -> None:
    check(torch.randn(1, 1, 112, 784), 31, "reflect", processors=3)


def test_neither_cut_nor_order_of_threads_changes_a_bit() -> None:
    x = torch.randn(2, 1, 80, 192)
    x[1, 0, 20, 30] = x[1, 0, 79, 180] = math.inf
    want = on_host(x, taps(31))
    assert want is not None
    for processors, order in ((1, 1), (2, 2), (3, 3), (100, 5)):
        got = on_host(x, taps(31), processors=processors, order=order)
        assert got is not None and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_bad_pixel_stays_in_its_windows(bad: float) -> None:
    x = torch.rand(1, 1, 96, 304)
    x[0, 0, 50, 130] = bad
    got = on_host(x, taps(29))
    assert got is not None
    want = torch.where(x.isfinite(), x, torch.zeros_like(x)).double()
    for reach, level in zip((14, 28), got, strict=True):
        inside = torch.zeros(96, 304, dtype=torch.bool)
        inside[50 - reach : 51 + reach, 130 - reach : 131 + reach] = True
        assert torch.equal(~level[0, 0].isfinite(), inside)
        want = dense_blur(want, taps(29), taps(29), "reflect")
        outside = ~inside.expand(1, 1, 96, 304)
        assert_blur_close(level[outside], want[outside], x[x.isfinite()], ulps=4)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 255.0, 1e15, 3e38])
def test_no_scale_loses_digits(scale: float) -> None:
    x = (torch.rand(1, 1, 48, 128) + 0.1) * (scale / 1.1)
    got = on_host(x, taps(31))
    assert got is not None
    want = x
    for level in got:
        want = dense_blur(want, taps(31), taps(31), "reflect")
        assert ((level.double() - want) / want).abs().max() < 8 * 2**-24


def test_takes_what_it_is_for() -> None:
    x, kernel = torch.rand(1, 2, 32, 128), taps(31)
    assert on_host(x, kernel) is not None
    assert on_host(x.half(), kernel) is None
    assert on_host(x, taps(27)) is None and on_host(x, taps(35)) is None
    assert on_host(x, kernel, "replicate") is None and on_host(x, kernel, "constant") is None
    assert on_host(x[..., :31, :].contiguous(), kernel) is None
    assert on_host(x[..., :120].contiguous(), kernel) is None
