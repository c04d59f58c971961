"""The one-pass kernel on CPU tensors against the closed form in float64."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from parity import EPS, assert_close
from torch import Tensor

from msvq_fast.ops.gaussian_blur.op import BORDERS
from tests.ops.loss_cases import LAYOUTS, WEIGHTS, arguments_of, closed_form, inputs

if importlib.util.find_spec("msvq_fast._C") is None:
    pytest.skip("msvq_fast._C is not built", allow_module_level=True)

from msvq_fast import _C

ISAS = _C.cpu_isas()
KERNELS = (1, 3, 7, 11, 15, 21, 31, 45)


def run(
    contributions: list[Tensor], x: Tensor, border: str = "reflect", *, radius: int = 3,
    reduction: str = "mean", grad: list[bool] | None = None, in_place: bool = False,
    loss: bool = True, upstream: float | None = None, grad_factor: float | None = None,
    threads: int = 1, isa: str = "",
) -> tuple[Tensor | None, list[Tensor | None]]:  # fmt: skip
    """The weighted sum followed by the term of every scale, and the gradients."""
    scales = len(contributions)
    grads = [
        (c if in_place else torch.empty_like(c)) if asked else None
        for c, asked in zip(contributions, grad or [True] * scales, strict=True)
    ]
    out = torch.empty(1 + scales) if loss else None
    scalar = None if upstream is None else torch.tensor(upstream)
    factor = (1 / x.numel() if x.numel() else float("inf")) if reduction == "mean" else 1.0
    arguments = arguments_of(
        contributions, x, grads, list(WEIGHTS[:scales]), border, radius,
        (factor, factor if grad_factor is None else grad_factor), scalar, None, out,
    )  # fmt: skip
    _C.multiscale_loss_cpu(arguments, threads, isa)
    return out, grads


def check(contributions: list[Tensor], x: Tensor, border: str, radius: int, **settings) -> None:  # type: ignore[no-untyped-def]
    out, grads = run(contributions, x, border, radius=radius, **settings)
    weights = list(WEIGHTS[: len(contributions)])
    want, want_grads = closed_form(contributions, x, weights, border, radius)
    assert out is not None
    assert_close("loss", out, want, ulps=8)
    for grad, want_grad in zip(grads, want_grads, strict=True):
        assert grad is not None
        assert_close("gradient", grad, want_grad, ulps=16)


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("scales", [1, 2, 3, 4])
@pytest.mark.parametrize("isa", ISAS)
def test_equals_closed_form(isa: str, scales: int, border: str) -> None:
    for kernel_size in KERNELS if scales > 1 else (3,):
        for shape in ((1, 2, 1, 1), (2, 1, 2, 7), (1, 1, 33, 5), (1, 3, 30, 23)):
            for layout in LAYOUTS:
                check(*inputs(shape, scales, layout), border, kernel_size // 2, isa=isa)


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize(
    ("shape", "scales", "radius"),
    [
        ((1, 1, 20, 1100), 4, 22),  # two strips
        ((1, 3, 21, 901), 4, 22),  # strips of pixels of three channels
        ((1, 70, 20, 33), 2, 7),  # two pieces of the channels
    ],
)
def test_strips_meet(shape: tuple[int, ...], scales: int, radius: int, border: str) -> None:
    for layout in LAYOUTS:
        check(*inputs(shape, scales, layout), border, radius)


@pytest.mark.parametrize("border", BORDERS)
def test_bands_meet(border: str) -> None:
    # Rows of every level wait for the coarsest, from where the band begins.
    for radius in (5, 9, 15):
        check(*inputs((1, 1, 400, 300), 4), border, radius, threads=4)


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize(("scales", "radius"), [(1, 0), (2, 7), (3, 15), (4, 10)])
def test_results_do_not_depend_on_threads(scales: int, radius: int, border: str) -> None:
    """One plane of enough work that every thread gets a band of rows."""
    for layout in LAYOUTS:
        contributions, x = inputs((1, 1, 1203, 670), scales, layout)
        one = run(contributions, x, border, radius=radius)
        for threads in (1, 2, 3, 16):
            other = run(contributions, x, border, radius=radius, threads=threads)
            assert torch.equal(one[0], other[0])
            assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


@pytest.mark.parametrize("size", [(1024, 1000), (64, 1024)])
def test_images_of_the_papers_size(size: tuple[int, int]) -> None:
    check(*inputs((1, 1, *size), 3), "reflect", 15, threads=2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_types(dtype: torch.dtype, x_dtype: torch.dtype, layout: torch.memory_format) -> None:
    for channels, border in ((3, "reflect"), (70, "constant"), (2, "circular")):
        # a sum, for in float16 the gradients of a mean are subnormal
        contributions, x = inputs((1, channels, 21, 37), 3, layout, x_dtype, dtype)
        for isa in ISAS:
            out, grads = run(contributions, x, border, radius=5, reduction="sum", isa=isa)
            want, want_grads = closed_form(contributions, x, list(WEIGHTS[:3]), border, 5, "sum")
            assert out is not None
            assert_close("loss", out, want, ulps=8)
            for grad, want_grad in zip(grads, want_grads, strict=True):
                assert grad is not None
                limit = 16 * EPS[torch.float32] * want_grad.abs().max()
                if dtype != torch.float32:
                    limit = limit + EPS[dtype] / 2 * want_grad.abs()
                assert bool(((grad.double() - want_grad).abs() <= limit).all())


def test_gradients_may_lie_over_the_contributions() -> None:
    for layout in LAYOUTS:
        for dtype in (torch.float32, torch.bfloat16):
            contributions, x = inputs((1, 3, 40, 140), 3, layout, dtype=dtype)
            loss, apart = run(contributions, x)
            same, over = run(contributions, x, in_place=True)
            assert torch.equal(loss, same) and over[0] is contributions[0]
            assert all(torch.equal(a, b) for a, b in zip(apart, over, strict=True))


@pytest.mark.parametrize("scales", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_gradients_are_those_of_small_ones(scales: int, layout: torch.memory_format) -> None:
    # Of 4 MiB and more they are stored past the cache; those of one image are smaller.
    contributions, x = inputs((2, 3, 309, 800), scales, layout)
    settings = {"radius": 7, "reduction": "sum", "threads": 2}
    asked = [scale != 1 for scale in range(scales)]
    _, grads = run(contributions, x, grad=asked, **settings)
    for i in range(len(x)):
        alone = [c[i : i + 1] for c in contributions]
        _, want = run(alone, x[i : i + 1], grad=asked, **settings)
        for scale in range(scales):
            if asked[scale]:
                assert torch.equal(grads[scale][i : i + 1], want[scale])
    _, over = run([c.clone() for c in contributions], x, in_place=True, grad=asked, **settings)
    for scale in range(scales):
        if asked[scale]:
            assert torch.equal(over[scale], grads[scale])


def test_results_that_nobody_asks_for() -> None:
    contributions, x = inputs((1, 1, 20, 30), 3)
    loss, grads = run(contributions, x)
    _, some = run(contributions, x, grad=[False, True, False])
    assert some[0] is some[2] is None and torch.equal(some[1], grads[1])
    assert torch.equal(run(contributions, x, grad=[False] * 3)[0], loss)
    _, again = run(contributions, x, loss=False)
    assert all(torch.equal(a, b) for a, b in zip(again, grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_upstream_gradient(dtype: torch.dtype) -> None:
    contributions, x = inputs((2, 1, 64, 64), 2, dtype=dtype)
    _, want = closed_form(contributions, x, list(WEIGHTS[:2]), "reflect", 3)
    _, grads = run(contributions, x, loss=False, upstream=65536.0)
    _, sums = run(contributions, x, grad_factor=1.0)
    ulps = 16 if dtype == torch.float32 else 1
    for grad, of_sum, want_grad in zip(grads, sums, want, strict=True):
        assert_close("gradient", grad, 65536 * want_grad, ulps=ulps)
        assert_close("gradient of the sum", of_sum, x.numel() * want_grad, ulps=ulps)


@pytest.mark.parametrize("isa", ISAS)
def test_a_bad_pixel_stays_in_its_windows(isa: str) -> None:
    for radius in (4, 7):
        contributions, x = inputs((1, 1, 80, 150), 3)
        x[0, 0, 40, 70] = float("inf")
        _, grads = run(contributions, x, radius=radius, isa=isa)
        for grad, side in zip(grads, (4 * radius + 1, 2 * radius + 1, 1), strict=True):
            assert int((~grad.isfinite()).sum()) == side**2


def test_an_empty_mean_is_not_a_number() -> None:
    contributions, x = inputs((0, 3, 8, 8), 2)
    assert bool(run(contributions, x)[0].isnan().all())
    assert run(contributions, x, reduction="sum")[0].tolist() == [0.0] * 3
