"""What the multi-scale loss holds for its backward, and every way to differentiate it."""

from __future__ import annotations

import gc

import pytest
import torch
from parity import assert_close
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from msvq_fast.ops import InputError, multiscale_loss
from msvq_fast.ops.multiscale_loss.op import OP
from tests.ops.loss_cases import LAYOUTS, WEIGHTS, closed_form, inputs

if "native" not in OP.kernels:
    pytest.skip(OP.missing["native"], allow_module_level=True)

native = OP.kernels["native"]
MODES = [False, True]  # recompute


def leaves(
    shape: tuple[int, ...], scales: int, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], Tensor]:
    contributions, x = inputs(shape, scales, dtype=dtype)
    return [c.requires_grad_() for c in contributions], x


def assert_same(got: Tensor, want: Tensor, contributions: list[Tensor]) -> None:
    """Two losses and their gradients, bit for bit."""
    assert torch.equal(got, want)
    grads, same = (torch.autograd.grad(loss, contributions) for loss in (got, want))
    assert all(torch.equal(a, b) for a, b in zip(grads, same, strict=True))


def held_bytes(contributions: list[Tensor], x: Tensor, **settings: object) -> int:
    """Bytes that the forward took from torch's allocator and has not given back."""
    gc.collect()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        result = multiscale_loss(contributions, x, kernel_size=7, **settings)  # type: ignore[arg-type]
    del result
    return sum(event.self_cpu_memory_usage for event in profile.key_averages())


@pytest.mark.parametrize("scales", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_holds_nothing_but_gradients(dtype: torch.dtype, scales: int) -> None:
    contributions, x = leaves((1, 3, 64, 64), scales, dtype)
    image, small = contributions[0].nbytes, 256
    assert 0 <= held_bytes(contributions, x) - scales * image <= small
    assert 0 <= held_bytes(contributions, x, recompute=True) <= small
    with torch.no_grad():
        assert 0 <= held_bytes(contributions, x) <= small
    # eager holds the differences or the sums, and the targets
    assert held_bytes(contributions, x, backend="reference") >= scales * image


def test_recompute_asks_for_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, kernel = [], native.multiscale_loss
    monkeypatch.setattr(native, "multiscale_loss", lambda *a: (asked.append(a[-1]), kernel(*a))[1])
    contributions, x = leaves((1, 1, 8, 8), 2)
    for recompute in MODES:
        multiscale_loss(contributions, x, recompute=recompute)
    assert [list(a) for a in asked] == [[True, True], [False, False]]


def test_saves_only_its_inputs() -> None:
    contributions, x = leaves((1, 3, 16, 16), 3)
    saved: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t)
    with hooks:
        multiscale_loss(contributions, x)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in (x, *contributions)}


@pytest.mark.parametrize("recompute", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_scale(reduction: str, dtype: torch.dtype, recompute: bool) -> None:
    """Gradients of 1e-8 vanish in float16 unless the scale comes before the rounding."""
    contributions, x = leaves((1, 3, 64, 64), 3, dtype)
    weights = [1e-4 * w for w in WEIGHTS[:3]]
    scale = 65536.0 if reduction == "mean" else 3.0
    loss, _ = multiscale_loss(
        contributions, x, kernel_size=7, weights=weights, reduction=reduction, recompute=recompute
    )
    _, want = closed_form([c.detach() for c in contributions], x, weights, "reflect", 3, reduction)
    (loss * scale).backward()
    ulps = 16 if dtype == torch.float32 else 1
    for contribution, want_grad in zip(contributions, want, strict=True):
        assert contribution.grad is not None and contribution.grad.dtype == dtype
        assert_close("gradient", contribution.grad, scale * want_grad, ulps=ulps)


@pytest.mark.parametrize("scales", [2, 5])
@pytest.mark.parametrize("recompute", MODES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("size", [1e-6, 1e5])
def test_weights_far_from_one(size: float, reduction: str, recompute: bool, scales: int) -> None:
    """What the loss scale undoes must not leave float16 before it."""
    contributions, x = leaves((1, 3, 32, 32), scales, torch.float16)
    weights = [size * w for w in [*WEIGHTS, 0.7][:scales]]
    loss, _ = multiscale_loss(
        contributions, x, kernel_size=7, weights=weights, reduction=reduction, recompute=recompute
    )
    _, want = closed_form([c.detach() for c in contributions], x, weights, "reflect", 3, reduction)
    scale = 1 / size if reduction == "sum" else x.numel() / size
    (loss * scale).backward()
    for contribution, want_grad in zip(contributions, want, strict=True):
        assert_close("gradient", contribution.grad, scale * want_grad, ulps=2)


def test_grad_scaler() -> None:
    weight = torch.ones(1, 3, 32, 32, requires_grad=True)
    x = torch.rand(1, 3, 32, 32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    loss, _ = multiscale_loss([weight * 0.5, weight.square()], x, kernel_size=5)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    other = weight.detach().double().requires_grad_()
    loss, _ = multiscale_loss([other * 0.5, other.square()], x.double(), kernel_size=5)
    loss.backward()
    assert_close("gradient", weight.grad, other.grad, ulps=16)


@pytest.mark.parametrize("recompute", MODES)
def test_backward_as_often_as_one_likes(recompute: bool) -> None:
    """The stored gradients are given away once; what came of them does not change later."""
    contributions, x = leaves((1, 2, 20, 24), 3)
    loss, _ = multiscale_loss(contributions, x, recompute=recompute)
    first = torch.autograd.grad(loss, contributions, torch.tensor(3.0), retain_graph=True)
    kept = [g.clone() for g in first]
    for factor in (1.0, 0.0, 7.0):
        more = torch.autograd.grad(loss, contributions, torch.tensor(factor), retain_graph=True)
        for grad, other in zip(first, more, strict=True):
            assert (grad * (factor / 3) - other).abs().max() <= 1e-6 * grad.abs().max() * factor
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
    loss.backward()
    loss_again, _ = multiscale_loss(contributions, x, recompute=recompute)
    loss_again.backward()  # adds to what the first gave
    for contribution, grad in zip(contributions, first, strict=True):
        assert_close("gradient", contribution.grad, grad * 2 / 3, ulps=4)


@pytest.mark.parametrize("recompute", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scales", [1, 2, 3, 4])
def test_only_the_asked_gradients(
    scales: int, layout: torch.memory_format, recompute: bool
) -> None:
    contributions, x = inputs((1, 3, 16, 18), scales, layout)
    _, want = closed_form(contributions, x, [1.0] * scales, "reflect", 1)
    for asked in range(2**scales):
        mine = [c.clone().requires_grad_(bool(asked >> m & 1)) for m, c in enumerate(contributions)]
        loss, terms = multiscale_loss(mine, x, kernel_size=3, recompute=recompute)
        assert loss.requires_grad == (asked > 0) and not terms.requires_grad
        if asked:
            loss.backward()
        for contribution, want_grad in zip(mine, want, strict=True):
            assert (contribution.grad is not None) == contribution.requires_grad
            if contribution.grad is not None:
                assert_close("gradient", contribution.grad, want_grad, ulps=16)
                assert contribution.grad.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("recompute", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeats_every_bit(dtype: torch.dtype, recompute: bool) -> None:
    contributions, x = leaves((2, 3, 150, 170), 3, dtype)
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(3):
            loss, terms = multiscale_loss(contributions, x, recompute=recompute, backend="native")
            runs.append((loss, terms, *torch.autograd.grad(loss, contributions)))
    finally:
        torch.use_deterministic_algorithms(False)
    for others in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], others, strict=True))


@pytest.mark.parametrize("border", ["reflect", "replicate"])
@pytest.mark.parametrize("recompute", MODES)
def test_second_gradients(recompute: bool, border: str) -> None:
    contributions, x = leaves((1, 2, 9, 12), 3)
    direction = torch.randn(3, *x.shape)

    def seconds(dtype: torch.dtype, backend: str) -> list[Tensor]:
        mine = [c.detach().to(dtype).requires_grad_() for c in contributions]
        loss, _ = multiscale_loss(
            [c.square() for c in mine], x.to(dtype), kernel_size=5, border=border,
            recompute=recompute, backend=backend,
        )  # fmt: skip
        first = torch.autograd.grad(loss * loss, mine, create_graph=True)
        product = sum((g * v.to(dtype)).sum() for g, v in zip(first, direction, strict=True))
        return [*first, *torch.autograd.grad(product, mine)]

    for got, want in zip(
        seconds(torch.float32, "native"), seconds(torch.float64, "reference"), strict=True
    ):
        assert_close("gradient", got.detach(), want.detach(), ulps=32)


@pytest.mark.parametrize("recompute", MODES)
def test_contributions_that_depend_on_each_other(recompute: bool) -> None:
    (c, _), x = leaves((1, 2, 9, 12), 2)
    for contributions in ([c, c], [c, c.square()], [c.square(), c]):
        loss, _ = multiscale_loss(contributions, x, recompute=recompute, backend="native")
        (want,) = torch.autograd.grad(loss, c, retain_graph=True)
        (got,) = torch.autograd.grad(loss, c, create_graph=True)
        assert_close("gradient", got.detach(), want.double(), ulps=32)


def test_definition_in_float64() -> None:
    contributions, x = inputs((1, 1, 4, 5), 3)
    mine = tuple(c.double().requires_grad_() for c in contributions)

    def loss(*mine: Tensor) -> Tensor:
        return multiscale_loss(
            mine, x.double(), kernel_size=3, weights=WEIGHTS[:3], backend="reference"
        )[0]

    assert torch.autograd.gradcheck(loss, mine)
    assert torch.autograd.gradgradcheck(loss, mine)


def test_mixed_layouts() -> None:
    contributions, x = inputs((2, 3, 16, 18), 2)
    want, want_grads = closed_form(contributions, x, [1.0, 1.0], "reflect", 1)
    last = [c.to(memory_format=torch.channels_last) for c in contributions]
    strided = [torch.randn(2, 3, 32, 36)[:, :, ::2, ::2].copy_(c) for c in contributions]
    for given in (last, [last[0], contributions[1]], strided):
        mine = [c.detach().requires_grad_() for c in given]
        for image in (x, x.to(memory_format=torch.channels_last), x.mT.contiguous().mT):
            loss, terms = multiscale_loss(mine, image, kernel_size=3, backend="native")
            assert_close("terms", terms, want[1:], ulps=8)
            for grad, want_grad in zip(torch.autograd.grad(loss, mine), want_grads, strict=True):
                assert_close("gradient", grad, want_grad, ulps=16)


@pytest.mark.parametrize("recompute", MODES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole_with_its_backward(dynamic: bool, recompute: bool) -> None:
    torch._dynamo.reset()
    contributions, x = leaves((1, 3, 16, 20), 2)

    def step(contributions: list[Tensor], x: Tensor) -> Tensor:
        loss, terms = multiscale_loss(
            [c * 2 for c in contributions], x, kernel_size=5, recompute=recompute, backend="native"
        )
        return loss * 3 + 0 * terms.sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    got, want = compiled(contributions, x), step(contributions, x)
    assert_same(got, want, contributions)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_graph_for_any_batch(dtype: torch.dtype, reduction: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(contributions: list[Tensor], x: Tensor) -> Tensor:
        return multiscale_loss(
            contributions, x, kernel_size=5, reduction=reduction, backend="native"
        )[0]

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for batch in (2, 3, 5, 7):
        contributions, x = leaves((batch, 3, 16, 16), 2, dtype)
        got, want = compiled(contributions, x), step(contributions, x)
        assert_same(got, want, contributions)
    assert counter.frame_count == 1


def test_exports_with_any_batch() -> None:
    batch = torch.export.Dim("batch", min=2)
    shapes = {"contributions": [{0: batch}] * 2, "x": {0: batch}}

    class Loss(torch.nn.Module):
        def forward(self, contributions: list[Tensor], x: Tensor) -> Tensor:
            return multiscale_loss(contributions, x, kernel_size=5)[0]

    program = torch.export.export(Loss(), inputs((2, 3, 16, 16), 2), dynamic_shapes=shapes)
    contributions, x = inputs((5, 3, 16, 16), 2)
    got = program.module()(contributions, x)
    torch.testing.assert_close(got, Loss()(contributions, x))


def test_no_result_shares_memory() -> None:
    contributions, x = inputs((2, 3, 8, 8), 3)
    kernel = ([0.25, 0.5, 0.25], "reflect", WEIGHTS[:3], "mean")
    loss, per_scale, grads = native.multiscale_loss(contributions, x, *kernel, [True] * 3)
    for result in (loss, per_scale, *grads):
        assert result.untyped_storage().nbytes() == result.nbytes


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_registration(layout: str) -> None:
    contributions, x = inputs((2, 3, 8, 8), 2)
    if layout == "transposed":
        contributions = [c.transpose(2, 3) for c in contributions]
    if layout == "channels_last":
        contributions = [c.to(memory_format=torch.channels_last) for c in contributions]
    kernel = ([0.25, 0.5, 0.25], "reflect", [1.0, 0.5])
    operations = torch.ops.msvq_fast
    for wanted in ([True, True], [False, True], [False, False]):
        torch.library.opcheck(
            operations.multiscale_loss_native.default,
            (contributions, x, *kernel, "mean", wanted),
        )
        torch.library.opcheck(
            operations.multiscale_loss_backward_native.default,
            (torch.tensor(2.0), contributions, x, *kernel, "mean", wanted),
        )
    grads = [torch.randn(2, 3) for _ in range(2)]
    torch.library.opcheck(
        operations.multiscale_loss_scale_native.default,
        (grads, torch.tensor(2.0), [1.0, 0.5], "mean"),
    )


def test_says_what_it_cannot_run() -> None:
    contributions, x = inputs((1, 1, 8, 8), 5)
    with pytest.raises(InputError, match="up to 4 scales, there are 5"):
        multiscale_loss(contributions, x, backend="native")
    assert multiscale_loss(contributions, x)[1].shape == (5,)
    with pytest.raises(InputError, match=r"x in float32.* it is torch.float64"):
        multiscale_loss(contributions[:2], x.double(), backend="native")
    with pytest.raises(InputError, match=r"contributions are torch.float64"):
        multiscale_loss([contributions[0].double()], x, backend="native")
