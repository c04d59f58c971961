"""The CUDA kernels of the multi-scale loss run on the host over a model of block and barriers."""

from __future__ import annotations

import importlib.util
import itertools
from typing import NamedTuple

import pytest
import torch
from parity import EPS, assert_close
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from msvq_fast.ops import multiscale_loss
from msvq_fast.ops.gaussian_blur.op import BORDERS

if importlib.util.find_spec("msvq_fast._C") is None:
    pytest.skip("msvq_fast._C is not built", allow_module_level=True)

from msvq_fast import _C
from msvq_fast.ops.gaussian_blur import native
from tests.ops.loss_cases import LAYOUTS, WEIGHTS, arguments_of, closed_form, inputs

ROOM = 227 << 10  # bytes of shared memory of a block on sm_90


class Result(NamedTuple):
    loss: Tensor | None  # the weighted sum, then the term of every scale
    grads: list[Tensor | None]


def on_host(
    contributions: list[Tensor], x: Tensor, weights: list[float], border: str = "reflect",
    *, radius: int = 3, reduction: str = "mean", grad: object = True, in_place: bool = False,
    loss: bool = True, upstream: float | None = None, grad_factor: float | None = None,
    blocks: int = 8, room: int = ROOM, reversed_threads: bool = False,
) -> Result:  # fmt: skip
    scales = len(contributions)
    asked = grad if isinstance(grad, list) else [grad] * scales
    grads = [
        (c if in_place else torch.empty_like(c)) if a else None
        for c, a in zip(contributions, asked, strict=True)
    ]
    scalar = None if upstream is None else torch.tensor(upstream)
    nothing = torch.tensor(float("nan"), dtype=torch.float64)  # where no block leaves a sum
    partials = nothing.repeat(_C.MULTISCALE_LOSS_PARTIALS) if loss else None
    out = torch.empty(1 + scales) if loss else None
    factor = (1 / x.numel() if x.numel() else float("inf")) if reduction == "mean" else 1.0
    arguments = arguments_of(
        contributions, x, grads, weights, border, radius,
        (factor, factor if grad_factor is None else grad_factor), scalar, partials, out,
    )  # fmt: skip
    if not _C.multiscale_loss_cuda_on_host(arguments, blocks, room, reversed_threads):
        raise MemoryError
    return Result(out, grads)


def check(contributions: list[Tensor], x: Tensor, border: str, radius: int, **settings) -> None:  # type: ignore[no-untyped-def]
    """Equal to the closed form, and the same bits whatever the order of the threads."""
    weights = list(WEIGHTS[: len(contributions)])
    got = on_host(contributions, x, weights, border, radius=radius, **settings)
    want, want_grads = closed_form(contributions, x, weights, border, radius)
    assert got.loss is not None
    assert_close("loss", got.loss, want, ulps=8)
    for grad, want_grad in zip(got.grads, want_grads, strict=True):
        assert grad is not None
        assert_close("gradient", grad, want_grad, ulps=16 if grad.dtype == torch.float32 else 1)
    other = on_host(
        contributions, x, weights, border, radius=radius, reversed_threads=True, **settings
    )
    assert other.loss is not None and torch.equal(got.loss, other.loss)
    assert all(torch.equal(a, b) for a, b in zip(got.grads, other.grads, strict=True))


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("radius", [0, 1, 3, 5, 7, 10, 15, 22])
@pytest.mark.parametrize("scales", [1, 2, 3, 4])
def test_equals_closed_form(scales: int, radius: int, border: str) -> None:
    # rows of whole quads and others run different kernels
    for shape in ((1, 2, 1, 1), (1, 1, 9, 3), (1, 3, 30, 23), (2, 1, 5, 4), (1, 3, 30, 24)):
        for layout in LAYOUTS:
            check(*inputs(shape, scales, layout), border, radius, blocks=8)


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize(("scales", "radius"), [(1, 15), (2, 15), (3, 15), (4, 15), (2, 64)])
def test_strips_and_segments_meet(scales: int, radius: int, border: str) -> None:
    check(*inputs((1, 1, 45, 300), scales), border, radius, blocks=8)
    check(*inputs((1, 5, 19, 90), scales, torch.channels_last), border, radius, blocks=8)
    check(*inputs((1, 3, 50, 204), scales, torch.channels_last), border, radius, blocks=8)
    check(*inputs((2, 1, 100, 420), scales), border, radius, blocks=5)


@pytest.mark.parametrize("width", [37, 40])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_types(
    dtype: torch.dtype, x_dtype: torch.dtype, layout: torch.memory_format, width: int
) -> None:
    for border in ("reflect", "replicate", "constant"):
        # a sum, for in float16 the gradients of a mean are subnormal
        contributions, x = inputs((1, 3, 21, width), 3, layout, x_dtype, dtype)
        got = on_host(contributions, x, [1.0, 0.5, 2.0], border, radius=5, reduction="sum")
        want, grads = closed_form(contributions, x, [1.0, 0.5, 2.0], border, 5, "sum")
        assert got.loss is not None
        assert_close("loss", got.loss, want, ulps=8)
        for grad, want_grad in zip(got.grads, grads, strict=True):
            assert grad is not None
            limit = 16 * EPS[torch.float32] * want_grad.abs().max()
            if dtype != torch.float32:
                limit = limit + EPS[dtype] / 2 * want_grad.abs()
            assert bool(((grad.double() - want_grad).abs() <= limit).all())


def test_gradients_may_lie_over_the_contributions() -> None:
    for layout, width in itertools.product(LAYOUTS, (140, 142)):
        contributions, x = inputs((1, 3, 40, width), 3, layout)
        apart = on_host(contributions, x, [1.0, 0.5, 2.0], radius=5)
        copies = [c.clone(memory_format=torch.preserve_format) for c in contributions]
        over = on_host(copies, x, [1.0, 0.5, 2.0], radius=5, in_place=True)
        assert all(torch.equal(a, b) for a, b in zip(apart.grads, over.grads, strict=True))
        assert torch.equal(apart.loss, over.loss)
        assert over.grads[0] is copies[0]


@pytest.mark.parametrize("radius", [3, 5])
def test_results_that_nobody_asks_for(radius: int) -> None:
    contributions, x = inputs((1, 1, 20, 32), 3)
    weights = [1.0, 0.5, 2.0]
    whole = on_host(contributions, x, weights, radius=radius)
    some = on_host(contributions, x, weights, radius=radius, grad=[False, True, False])
    assert some.grads[0] is None and torch.equal(some.grads[1], whole.grads[1])
    forward = on_host(contributions, x, weights, radius=radius, grad=False)
    assert torch.equal(forward.loss, whole.loss)
    again = on_host(contributions, x, weights, radius=radius, loss=False)
    assert all(torch.equal(a, b) for a, b in zip(again.grads, whole.grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("radius", [3, 5])
def test_upstream_gradient(radius: int, dtype: torch.dtype) -> None:
    """Known when the pass runs, or afterwards over gradients that were stored without it."""
    contributions, x = inputs((2, 1, 64, 64), 2, dtype=dtype)
    _, want = closed_form(contributions, x, [1.0, 0.5], "reflect", radius)
    known = on_host(contributions, x, [1.0, 0.5], radius=radius, loss=False, upstream=65536.0)
    stored = on_host(contributions, x, [1.0, 0.5], radius=radius, grad_factor=1.0)
    scale = torch.tensor(65536.0)
    rest = arguments_of(
        contributions, x, stored.grads, [1.0, 0.5], "reflect", 3, (0.0, 1 / x.numel()), scale,
        None, None,
    )  # fmt: skip
    _C.multiscale_loss_scale_cuda_on_host(rest)
    for result in (known, stored):
        for grad, want_grad in zip(result.grads, want, strict=True):
            assert_close(
                "gradient", grad, 65536 * want_grad, ulps=16 if grad.element_size() == 4 else 1
            )


def test_a_factor_of_one_keeps_every_bit() -> None:
    contributions, x = inputs((1, 1, 8, 8), 1)
    grad = torch.tensor([float("nan")] * 64).view(1, 1, 8, 8)
    before = grad.clone()
    _C.multiscale_loss_scale_cuda_on_host(
        arguments_of(contributions, x, [grad], [1.0], "reflect", 0, (1.0, 0.5),
                     torch.tensor(2.0), None, None)
    )  # fmt: skip
    assert torch.equal(grad.view(torch.int32), before.view(torch.int32))


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("radius", [4, 7])
def test_the_cut_into_tasks_changes_no_gradient(radius: int, border: str) -> None:
    contributions, x = inputs((1, 1, 150, 132), 3)
    weights = [1.0, 0.5, 2.0]
    whole = on_host(contributions, x, weights, border, radius=radius, blocks=1)
    for blocks, room in ((16, ROOM), (1000, ROOM), (3, 44 << 10)):
        cut = on_host(contributions, x, weights, border, radius=radius, blocks=blocks, room=room)
        assert all(torch.equal(a, b) for a, b in zip(whole.grads, cut.grads, strict=True))
        assert_close("loss", cut.loss, whole.loss, ulps=2)


@pytest.mark.parametrize("radius", [1, 5])
@pytest.mark.parametrize("scales", [1, 2, 3, 4])
def test_more_tasks_than_blocks(scales: int, radius: int) -> None:
    """A block then runs several, and a thread of the last sum adds up several blocks."""
    check(*inputs((4200, 1, 2, 3), scales), "reflect", radius, blocks=1)
    check(*inputs((600, 1, 2, 4), scales), "reflect", radius, blocks=500)


def test_a_bad_pixel_stays_in_its_windows() -> None:
    for radius, width in ((4, 150), (7, 150), (7, 152)):
        contributions, x = inputs((1, 1, 80, width), 3)
        x[0, 0, 40, 70] = float("inf")
        grads = on_host(contributions, x, [1.0, 1.0, 1.0], radius=radius).grads
        for j, sides in enumerate((4 * radius + 1, 2 * radius + 1, 1)):
            assert int((~grads[j].isfinite()).sum()) == sides**2


def test_an_empty_mean_is_not_a_number() -> None:
    contributions, x = inputs((0, 3, 8, 8), 2)
    assert bool(on_host(contributions, x, [1.0, 1.0]).loss.isnan().all())
    assert on_host(contributions, x, [1.0, 1.0], reduction="sum").loss.tolist() == [0.0] * 3


def test_says_what_fits_a_block() -> None:
    reflect, replicate = native.BORDERS["reflect"], native.BORDERS["replicate"]
    for room in (99 << 10, 163 << 10, ROOM):
        assert _C.multiscale_loss_cuda_fits(3, 31, reflect, room)
        assert _C.multiscale_loss_cuda_fits(3, 31, replicate, room)
        assert _C.multiscale_loss_cuda_fits(2, 45, reflect, room)
    assert _C.multiscale_loss_cuda_fits(4, 45, reflect, 163 << 10)
    assert not _C.multiscale_loss_cuda_fits(4, 129, reflect, ROOM)
    assert not _C.multiscale_loss_cuda_fits(5, 3, reflect, ROOM)
    assert not _C.multiscale_loss_cuda_fits(2, 131, reflect, ROOM)
    contributions, x = inputs((1, 1, 8, 300), 4)
    with pytest.raises(MemoryError):
        on_host(contributions, x, list(WEIGHTS), radius=64)


def test_fake_images_on_a_gpu_that_is_not_there() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with FakeTensorMode():
        x = torch.empty(2, 3, 8, 8, device="cuda:0")
        assert multiscale_loss([x, x], x)[1].shape == (2,)
