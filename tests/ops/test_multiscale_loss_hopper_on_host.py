"""The multi-scale loss for Hopper run on the host over a model of block and tensor cores."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from parity import assert_close
from torch import Tensor

from msvq_fast.ops.multiscale_loss.op import OP
from tests.ops.loss_cases import LAYOUTS, WEIGHTS, arguments_of, closed_form, inputs

pytestmark = pytest.mark.skipif(
    not hasattr(getattr(OP.kernels.get("native"), "_C", None), "multiscale_loss_hopper_on_host"),
    reason="the model of a block needs the C++ extension and glibc",
)
SCALES = 3
BORDERS = ["reflect", "symmetric", "circular"]


class Result(NamedTuple):
    loss: Tensor | None  # the weighted sum, then the term of every scale
    grads: list[Tensor | None]


def on_host(
    contributions: list[Tensor], x: Tensor, border: str = "reflect", radius: int = 15, *,
    wanted: tuple[bool, ...] = (True,) * SCALES, in_place: bool = False, loss: bool = True,
    upstream: float | None = None, processors: int = 1, order: int = 0,
) -> Result | None:  # fmt: skip
    """None where the kernel does not take these images."""
    _C = OP.kernels["native"]._C
    grads = [
        (c if in_place else torch.full_like(c, math.nan)) if asked else None
        for c, asked in zip(contributions, wanted, strict=False)
    ]
    scalar = None if upstream is None else torch.tensor(upstream)
    partials = torch.empty(_C.MULTISCALE_LOSS_PARTIALS, dtype=torch.float64) if loss else None
    out = torch.empty(1 + len(contributions)) if loss else None
    arguments = arguments_of(
        contributions, x, grads, list(WEIGHTS[: len(contributions)]), border, radius,
        (1 / x.numel(), 1 / x.numel()), scalar, partials, out,
    )  # fmt: skip
    ran = _C.multiscale_loss_hopper_on_host(arguments, processors, order)
    return Result(out, grads) if ran else None


def check(shape: tuple[int, ...], border: str, radius: int, processors: int = 1) -> None:
    contributions, x = inputs(shape, SCALES)
    got = on_host(contributions, x, border, radius, processors=processors)
    assert got is not None and got.loss is not None
    want, want_grads = closed_form(contributions, x, list(WEIGHTS[:SCALES]), border, radius)
    assert_close("loss", got.loss, want, ulps=8)
    for grad, want_grad in zip(got.grads, want_grads, strict=True):
        assert grad is not None
        assert_close("gradient", grad, want_grad, ulps=16)


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("radius", [14, 15, 16])
def test_equals_closed_form(radius: int, border: str) -> None:
    # One strip; two, the second cut off; planes lower than a kernel, than a step of it.
    for shape in ((1, 1, 48, 256), (2, 1, 32, 288), (1, 1, 16, 96)):
        check(shape, border, radius)


def test_strips_away_from_every_edge() -> None:
    check((1, 1, 112, 800), "reflect", 15, processors=3)


def test_targets_alone() -> None:
    """Of no contributions but one the differences are the targets themselves."""
    contributions, x = inputs((1, 1, 64, 128), SCALES)
    for c in contributions:
        c.zero_()
    got = on_host(contributions, x)
    assert got is not None
    _, want = closed_form(contributions, x, list(WEIGHTS[:SCALES]), "reflect", 15)
    parts = [got.grads[0] - got.grads[1], got.grads[1] - got.grads[2], got.grads[2]]
    true = [want[0] - want[1], want[1] - want[2], want[2]]
    for m, (part, target) in enumerate(zip(parts, true, strict=True)):
        limit = 16 * 2.0**-23 * want[min(m, 2)].abs().max()
        assert bool((part - target).abs().max() <= limit)


def test_neither_cut_nor_order_of_threads_changes_a_gradient() -> None:
    contributions, x = inputs((2, 1, 80, 288), SCALES)
    want = on_host(contributions, x)
    assert want is not None and want.loss is not None
    for processors, order in ((1, 1), (2, 2), (3, 3), (5, 4), (100, 5)):
        got = on_host(contributions, x, processors=processors, order=order)
        assert got is not None and got.loss is not None
        assert all(torch.equal(a, b) for a, b in zip(got.grads, want.grads, strict=True))
        assert_close("loss", got.loss, want.loss, ulps=2)
        again = on_host(contributions, x, processors=processors, order=order + 7)
        assert again is not None and torch.equal(again.loss, got.loss)


def test_more_steps_than_a_block_takes_in_one_go() -> None:
    check((1, 1, 16 * 66, 96), "reflect", 15)


def test_a_bad_pixel_leaves_later_streams_alone() -> None:
    contributions, x = inputs((3, 1, 80, 96), SCALES)
    x[0, 0, 20, 30] = math.inf
    want, got = on_host(contributions, x, processors=100), on_host(contributions, x)
    assert want is not None and got is not None
    assert all(torch.equal(a, b) for a, b in zip(got.grads, want.grads, strict=True))


def test_gradients_may_lie_over_the_contributions() -> None:
    contributions, x = inputs((1, 2, 48, 160), SCALES)
    apart = on_host(contributions, x)
    copies = [c.clone() for c in contributions]
    over = on_host(copies, x, in_place=True, order=2)
    assert apart is not None and over is not None
    assert all(torch.equal(a, b) for a, b in zip(apart.grads, copies, strict=True))
    assert torch.equal(apart.loss, over.loss)


def test_results_that_nobody_asks_for() -> None:
    contributions, x = inputs((1, 1, 48, 96), SCALES)
    whole = on_host(contributions, x)
    some = on_host(contributions, x, wanted=(False, True, False))
    assert whole is not None and some is not None
    assert some.grads[0] is None and torch.equal(some.grads[1], whole.grads[1])
    x[0, 0, 20, 40] = math.inf
    bad, one = on_host(contributions, x), on_host(contributions, x, wanted=(True, False, False))
    assert bad is not None and one is not None
    assert torch.equal(one.grads[0], bad.grads[0])
    x[0, 0, 20, 40] = 0
    whole = on_host(contributions, x)
    assert whole is not None
    forward = on_host(contributions, x, wanted=(False, False, False))
    assert forward is not None and torch.equal(forward.loss, whole.loss)
    again = on_host(contributions, x, loss=False, upstream=2.0)
    assert again is not None
    assert all(torch.equal(a, 2 * b) for a, b in zip(again.grads, whole.grads, strict=True))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_bad_pixel_stays_in_its_windows(bad: float) -> None:
    radius = 14
    contributions, x = inputs((1, 1, 128, 288), SCALES)
    x[0, 0, 60, 150] = x[0, 0, 3, 3] = bad
    got = on_host(contributions, x, radius=radius)
    assert got is not None and got.loss is not None and not bool(got.loss.isfinite().any())
    clean = x.nan_to_num(0.0, 0.0, 0.0)
    _, want = closed_form(contributions, clean, list(WEIGHTS[:SCALES]), "reflect", radius)
    for grad, want_grad, reach in zip(got.grads, want, (2 * radius, radius, 0), strict=True):
        inside = torch.zeros(x.shape, dtype=torch.bool)
        for y, column in ((60, 150), (3, 3)):
            rows = slice(max(y - reach, 0), y + reach + 1)
            inside[..., rows, max(column - reach, 0) : column + reach + 1] = True
        assert grad is not None and torch.equal(~grad.isfinite(), inside)
        if not math.isnan(bad):
            assert bool((grad[inside] == -bad).all())
        assert_close("gradient", grad[~inside], want_grad[~inside], ulps=16)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_bad_contribution_stays_where_it_is(bad: float) -> None:
    contributions, x = inputs((1, 1, 48, 96), SCALES)
    contributions[1][0, 0, 20, 40] = bad
    got = on_host(contributions, x)
    assert got is not None and got.loss is not None
    assert got.loss.isfinite().tolist() == [False, True, False, False]
    for grad, count in zip(got.grads, (1, 1, 1), strict=True):
        assert int((~grad.isfinite()).sum()) == count and not grad[0, 0, 20, 40].isfinite()


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 255.0, 1e15])
def test_no_scale_loses_digits(scale: float) -> None:
    contributions, x = inputs((1, 1, 48, 128), SCALES)
    x = (torch.rand(x.shape) + 0.1) * scale
    got = on_host([0 * c for c in contributions], x)
    assert got is not None
    _, want = closed_form([0 * c for c in contributions], x, list(WEIGHTS[:SCALES]), "reflect", 15)
    for grad, want_grad in zip(got.grads, want, strict=True):
        assert_close("gradient", grad, want_grad, ulps=16)


def test_takes_what_it_is_for() -> None:
    contributions, x = inputs((1, 3, 32, 128), SCALES)
    assert on_host(contributions, x) is not None
    assert on_host(contributions, x, "replicate") is None
    assert on_host(contributions, x, "constant") is None
    assert on_host(contributions, x, radius=13) is None
    assert on_host(contributions, x, radius=22) is None
    assert on_host(contributions[:2], x) is None
    assert on_host(contributions, x.half()) is None
    assert on_host([c.half() for c in contributions], x) is None
    assert on_host(*inputs((1, 3, 32, 128), SCALES, LAYOUTS[1])) is None
    for shape in ((1, 1, 40, 128), (1, 1, 32, 144), (1, 1, 32, 80)):
        assert on_host(*inputs(shape, SCALES)) is None
    off = torch.empty(x.numel() + 1)[1:].view(x.shape)
    assert on_host(contributions, off) is None
    assert on_host([*contributions[:2], off], x) is None
    assert on_host([*contributions[:2], off], x, wanted=(False,) * 3) is None
