"""Two blurs in one pass for Hopper, run on the host over a model of block and tensor cores."""

from __future__ import annotations

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from msvq_fast.ops import gaussian_pyramid
from msvq_fast.ops.gaussian_blur.op import OP
from tests.ops.blur_cases import assert_blur_close, dense_blur, taps

pytestmark = pytest.mark.skipif(
    not hasattr(getattr(OP.kernels.get("native"), "_C", None), "gaussian_pyramid_on_host"),
    reason="the model of a block needs the C++ extension and glibc",
)
BORDERS = ["reflect", "symmetric", "circular"]  # that fold


def on_host(
    x: Tensor, kernel: list[float], border: str = "reflect", *, processors: int = 1, order: int = 0,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """``x`` blurred once and twice; None where the kernel does not take these images."""
    native = OP.kernels["native"]
    once, twice = out or (torch.full_like(x, math.nan), torch.full_like(x, math.nan))
    ran = native._C.gaussian_pyramid_on_host(
        x.data_ptr(),
        once.data_ptr(),
        twice.data_ptr(),
        native.IMAGE_TYPES[x.dtype],
        (x.shape[0] * x.shape[1], *x.shape[2:]),
        kernel,
        native.BORDERS[border],
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
    for shape in ((1, 1, 48, 256), (2, 1, 32, 288), (1, 1, 16, 96)):
        check(torch.randn(shape), kernel_size, border)


def test_strips_away_from_every_edge() -> None:
    check(torch.randn(1, 1, 112, 800), 31, "reflect", processors=3)


def test_neither_cut_nor_order_of_threads_changes_a_bit() -> None:
    x = torch.randn(2, 1, 80, 192)
    x[0, 0, 40, 90] = x[1, 0, 20, 30] = x[1, 0, 79, 180] = math.inf
    want = on_host(x, taps(31))
    assert want is not None
    for processors, order in ((1, 1), (2, 2), (3, 3), (100, 5)):
        got = on_host(x, taps(31), processors=processors, order=order)
        assert got is not None and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_more_steps_than_a_block_takes_in_one_go() -> None:
    x = torch.randn(1, 1, 16 * 66, 96)
    x[0, 0, -5, 60] = math.inf
    got = on_host(x, taps(29))
    assert got is not None
    want = x.nan_to_num(posinf=0)
    for reach, level in zip((14, 28), got, strict=True):
        inside = torch.zeros(x.shape, dtype=torch.bool)
        inside[..., -5 - reach :, 60 - reach : 61 + reach] = True
        assert torch.equal(level.isinf(), inside)
        want = dense_blur(want, taps(29), taps(29), "reflect")
        assert_blur_close(level[~inside], want[~inside], x[~x.isinf()], ulps=4)


def test_nothing_is_written_but_the_levels() -> None:
    x = torch.rand(1, 1, 48, 96)
    x[0, 0, 20, 20] = math.nan
    for processors in (1, 2):
        around = [torch.full((80, 96), 7.0) for _ in range(2)]
        levels = [a[16:64].view(x.shape) for a in around]
        assert on_host(x, taps(31), processors=processors, out=(levels[0], levels[1])) is not None
        for a in around:
            assert bool((a[:16] == 7).all()) and bool((a[64:] == 7).all())


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_bad_pixel_stays_in_its_windows(bad: float) -> None:
    x = torch.rand(1, 1, 96, 320)
    x[0, 0, 50, 130] = bad
    got = on_host(x, taps(29))
    assert got is not None
    want = torch.where(x.isfinite(), x, torch.zeros_like(x)).double()
    for reach, level in zip((14, 28), got, strict=True):
        inside = torch.zeros(96, 320, dtype=torch.bool)
        inside[50 - reach : 51 + reach, 130 - reach : 131 + reach] = True
        assert torch.equal(~level[0, 0].isfinite(), inside)
        want = dense_blur(want, taps(29), taps(29), "reflect")
        outside = ~inside.expand(1, 1, 96, 320)
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


def test_numbers_of_the_last_binades_keep_most_digits() -> None:
    x = (torch.rand(1, 1, 48, 128) + 0.1) * 1e-36
    x[..., :20, :40] = 0
    got = on_host(x, taps(31))
    assert got is not None
    want = x
    for level in got:
        want = dense_blur(want, taps(31), taps(31), "reflect")
        assert (level.double() - want).abs().max() < 2**-14 * want.max()


def test_the_largest_numbers_stay_in_their_windows() -> None:
    """Sums that rounding carries past them are Inf; NaN are neither these nor what is beside."""
    x, most = torch.rand(1, 1, 96, 224), torch.finfo(torch.float32).max
    x[..., 20:60, 60:100] = most
    got = on_host(x, taps(31))
    assert got is not None
    want = x
    for reach, level in zip((15, 30), got, strict=True):
        want = dense_blur(want, taps(31), taps(31), "reflect")
        finite = level.isfinite()
        assert bool((level[~finite] == math.inf).all())
        outside = torch.ones_like(finite)
        outside[..., max(20 - reach, 0) : 60 + reach, 60 - reach : 100 + reach] = False
        assert bool((level[outside] <= 1).all())
        assert_blur_close(level[finite], want[finite], x, ulps=4)


def test_takes_what_it_is_for() -> None:
    x, kernel = torch.rand(1, 2, 32, 128), taps(31)
    assert on_host(x, kernel) is not None
    assert on_host(x.half(), kernel) is None
    assert on_host(x, taps(27)) is None and on_host(x, taps(35)) is None
    assert on_host(x, kernel, "replicate") is None and on_host(x, kernel, "constant") is None
    assert on_host(x[..., :31, :].contiguous(), kernel) is None
    assert on_host(x[..., :112].contiguous(), kernel) is None
    off = torch.empty(x.numel() + 1)[1:].view(x.shape)
    fit = torch.empty(x.numel() + 2)[2:].view(x.shape)  # levels are written in pairs
    assert on_host(x, kernel, out=(fit, fit.clone())) is not None
    assert on_host(off, kernel) is None
    assert on_host(x, kernel, out=(off, fit)) is None and on_host(x, kernel, out=(fit, off)) is None


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("height", "dtype"), [(32, None), (33, None), (32, torch.half), (0, None)])
def test_the_op_around_the_kernel(
    monkeypatch: pytest.MonkeyPatch,
    height: int,
    dtype: torch.dtype | None,
    layout: torch.memory_format,
) -> None:
    """What the kernel does not take is blurred twice, and nothing where it was not built."""
    native = OP.kernels["native"]
    ran: list[bool] = []

    def launch(*arguments: object) -> bool:
        *kernel, _device, _stream = arguments
        ran.append(native._C.gaussian_pyramid_on_host(*kernel, 3, 1))
        return ran[-1]

    monkeypatch.setattr(native._C, "gaussian_pyramid_hopper", launch, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    x = torch.rand(2, 3, height, 128).to(dtype or torch.float32, memory_format=layout)
    once = native.gaussian_blur(x, taps(31), taps(31), "reflect", False)
    want = once, native.gaussian_blur(once, taps(31), taps(31), "reflect", False)
    for built in (True, False):
        if not built:
            monkeypatch.delattr(native._C, "gaussian_pyramid_hopper")
        got = native.levels_of(x, taps(31), "reflect")
        for level, same in zip(got, want, strict=True):
            assert level.stride() == same.stride()
            torch.testing.assert_close(level, same)
    asked = layout == torch.contiguous_format and dtype is None and height > 0
    assert ran == [height == 32] * asked


def test_which_pyramids_are_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    native = OP.kernels["native"]
    if not hasattr(native._C, "gaussian_blur_cuda"):
        pytest.skip("built without CUDA")
    calls: list[Tensor] = []
    blur_twice = native.blur_twice
    monkeypatch.setattr(native, "blur_twice", lambda x, *s: calls.append(x) or blur_twice(x, *s))
    with FakeTensorMode():
        x = torch.empty(1, 3, 32, 128, device="cuda:0")
        for scales, count in ((1, 0), (2, 0), (3, 1), (4, 1)):
            for backend in (None, "native", "reference"):
                calls.clear()
                levels = gaussian_pyramid(x, scales, kernel_size=31, backend=backend)
                assert len(levels) == scales and levels[-1] is x
                assert len(calls) == (0 if backend == "reference" else count)
        calls.clear()
        with torch.no_grad():
            gaussian_pyramid(x.requires_grad_(), 3, kernel_size=31)
        assert len(calls) == 1


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_no_tangent_is_lost() -> None:
    if not hasattr(OP.kernels["native"]._C, "gaussian_blur_cuda"):
        pytest.skip("built without CUDA")
    with FakeTensorMode(), forward_ad.dual_level():
        x = torch.empty(1, 3, 32, 128, device="cuda:0")
        with pytest.warns(UserWarning, match="see through the reference alone"):
            levels = gaussian_pyramid(forward_ad.make_dual(x, x.clone()), 3, kernel_size=31)
        assert all(forward_ad.unpack_dual(level).tangent is not None for level in levels)
