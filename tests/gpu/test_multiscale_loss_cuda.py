"""The multi-scale loss's CUDA kernels themselves, against the closed form in float64."""

from __future__ import annotations

import pytest
import torch
from parity import assert_close
from torch import Tensor

from msvq_fast.ops import multiscale_loss
from tests.ops.loss_cases import LAYOUTS, arguments_of, closed_form, inputs

_C = pytest.importorskip("msvq_fast._C")
if not hasattr(_C, "multiscale_loss_cuda"):
    pytest.skip("msvq_fast._C was built without CUDA", allow_module_level=True)


def launch(
    contributions: list[Tensor], x: Tensor, weights: list[float], border: str, radius: int,
    upstream: Tensor | None = None, tensor_cores: bool = False,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    grads = [torch.empty_like(c) for c in contributions]
    out = x.new_empty(1 + len(contributions), dtype=torch.float32)
    partials = x.new_empty(_C.MULTISCALE_LOSS_PARTIALS, dtype=torch.float64)
    factors = (1 / x.numel(), 1 / x.numel())
    arguments = arguments_of(
        contributions, x, grads, weights, border, radius, factors, upstream, partials, out
    )
    stream = torch.cuda.current_stream().cuda_stream
    _C.multiscale_loss_cuda(arguments, x.device.index, stream, tensor_cores)
    return out, grads


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("border", ["reflect", "replicate", "constant"])
@pytest.mark.parametrize("radius", [3, 5, 7, 10, 15, 22])
@pytest.mark.parametrize("scales", [1, 2, 3, 4])
def test_equals_closed_form(
    device: str, scales: int, radius: int, border: str, layout: torch.memory_format
) -> None:
    weights = [1.0, 0.5, 2.0, 0.25][:scales]
    # rows of whole quads and others run different kernels
    for shape in ((2, 3, 300, 270), (2, 3, 200, 532), (1, 5, 9, 7), (700, 3, 12, 20)):
        contributions, x = inputs(shape, scales, layout)
        want, want_grads = closed_form(contributions, x, weights, border, radius)
        given = [c.to(device) for c in contributions], x.to(torch.device(device, 0))
        got, grads = launch(*given, weights, border, radius)
        assert_close("loss", got.cpu(), want, ulps=8)
        for grad, want_grad in zip(grads, want_grads, strict=True):
            assert_close("gradient", grad.cpu(), want_grad, ulps=16)
        again, same = launch(*given, weights, border, radius)
        assert torch.equal(got, again)
        assert all(torch.equal(a, b) for a, b in zip(grads, same, strict=True))


@pytest.mark.parametrize("x_dtype", [torch.float16, torch.uint8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_types_and_upstream(device: str, dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    contributions, x = inputs((2, 3, 64, 80), 3, LAYOUTS[0], x_dtype, dtype)
    weights = [1.0, 0.5, 2.0]
    want, want_grads = closed_form(contributions, x, weights, "reflect", 5)
    on = torch.device(device, 0)
    upstream = torch.tensor(65536.0, device=on)
    given = [c.to(on) for c in contributions], x.to(on)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got, grads = launch(*given, weights, "reflect", 5, upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_close("loss", got.cpu(), want, ulps=8)
    for grad, want_grad in zip(grads, want_grads, strict=True):
        assert_close("gradient", grad.cpu(), 65536 * want_grad, ulps=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_op(device: str, compiled: bool, recompute: bool, dtype: torch.dtype) -> None:
    """Forward and backward without waiting for the GPU, also through torch.compile."""
    torch._dynamo.reset()
    contributions, x = inputs((2, 3, 64, 80), 3, dtype=dtype)
    _, want = closed_form(contributions, x, [1.0, 0.5, 2.0], "reflect", 5)
    given = [c.to(device).requires_grad_() for c in contributions]
    x, scale = x.to(device), torch.tensor(65536.0, device=device)

    def step() -> tuple[Tensor, ...]:
        loss, _ = multiscale_loss(
            given, x, kernel_size=11, weights=[1.0, 0.5, 2.0], recompute=recompute, backend="native"
        )
        return torch.autograd.grad(loss * scale, given)

    run = torch.compile(step, backend="aot_eager") if compiled else step
    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        grads = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for grad, want_grad in zip(grads, want, strict=True):
        ulps = 16 if dtype == torch.float32 else 1
        assert_close("gradient", grad.cpu(), 65536 * want_grad, ulps=ulps)


hopper = pytest.mark.skipif(
    not hasattr(_C, "vector_quantize_hopper")
    or not torch.cuda.is_available()
    or torch.cuda.get_device_capability() != (9, 0),
    reason="the kernel is for Hopper",
)


@hopper
@pytest.mark.parametrize("border", ["reflect", "symmetric", "circular"])
@pytest.mark.parametrize("radius", [14, 15, 16])
def test_on_tensor_cores(device: str, radius: int, border: str) -> None:
    """Equal to the closed form, and the same bits again, for streams that are cut anywhere."""
    weights = [1.0, 0.5, 2.0]
    for shape in ((2, 3, 304, 288), (1, 3, 1040, 1024), (5, 7, 32, 96), (300, 3, 16, 128)):
        contributions, x = inputs(shape, 3)
        want, want_grads = closed_form(contributions, x, weights, border, radius)
        given = [c.to(device) for c in contributions], x.to(torch.device(device, 0))
        got, grads = launch(*given, weights, border, radius, tensor_cores=True)
        assert_close("loss", got.cpu(), want, ulps=8)
        for grad, want_grad in zip(grads, want_grads, strict=True):
            assert_close("gradient", grad.cpu(), want_grad, ulps=16)
        for _ in range(3):
            again, same = launch(*given, weights, border, radius, tensor_cores=True)
            assert torch.equal(got, again)
            assert all(torch.equal(a, b) for a, b in zip(grads, same, strict=True))


@hopper
def test_a_bad_pixel_on_tensor_cores(device: str) -> None:
    radius = 14
    contributions, x = inputs((1, 2, 128, 512), 3)
    x[0, 1, 60, 260] = float("inf")
    given = [c.to(device) for c in contributions], x.to(torch.device(device, 0))
    got, grads = launch(*given, [1.0, 0.5, 2.0], "reflect", radius, tensor_cores=True)
    assert not bool(got.isfinite().any())
    for grad, reach in zip(grads, (2 * radius, radius, 0), strict=True):
        bad = ~grad.isfinite()
        assert int(bad.sum()) == (2 * reach + 1) ** 2
        assert bool(bad[0, 1, 60 - reach : 61 + reach, 260 - reach : 261 + reach].all())


@hopper
def test_the_op_on_tensor_cores_in_a_graph(device: str) -> None:
    """Outside of a graph its sum is launched before the pass has ended; all it reads is whole."""
    contributions, x = inputs((2, 3, 304, 288), 3)
    given, x = [c.to(device) for c in contributions], x.to(device)

    def step() -> tuple[Tensor, ...]:
        leaves = [c.detach().requires_grad_() for c in given]  # a step's nodes belong to its stream
        loss, terms = multiscale_loss(leaves, x, kernel_size=31, backend="native")
        return (loss, terms, *torch.autograd.grad(loss, leaves))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for _ in range(20):
        for tensor in (x, *given):
            tensor.normal_()
        graph.replay()
        want = step()
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
