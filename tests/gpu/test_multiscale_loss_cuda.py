"""The multi-scale loss's CUDA kernels themselves, against the closed form in float64."""

from __future__ import annotations

import pytest
import torch
from parity import assert_close
from torch import Tensor

from tests.ops.test_multiscale_loss_cuda_on_host import (
    _C,
    LAYOUTS,
    arguments_of,
    closed_form,
    inputs,
)

if not hasattr(_C, "multiscale_loss_cuda"):
    pytest.skip("msvq_fast._C was built without CUDA", allow_module_level=True)


def launch(
    contributions: list[Tensor], x: Tensor, weights: list[float], border: str, radius: int,
    upstream: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    grads = [torch.empty_like(c) for c in contributions]
    out = x.new_empty(1 + len(contributions), dtype=torch.float32)
    partials = x.new_empty(_C.MULTISCALE_LOSS_PARTIALS, dtype=torch.float64)
    factors = (1 / x.numel(), 1 / x.numel())
    arguments = arguments_of(
        contributions, x, grads, weights, border, radius, factors, upstream, partials, out
    )
    _C.multiscale_loss_cuda(arguments, x.device.index, torch.cuda.current_stream().cuda_stream)
    return out, grads


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("border", ["reflect", "replicate", "constant"])
@pytest.mark.parametrize("radius", [3, 5, 7, 10, 15, 22])
@pytest.mark.parametrize("scales", [1, 2, 3, 4])
def test_equals_closed_form(
    device: str, scales: int, radius: int, border: str, layout: torch.memory_format
) -> None:
    weights = [1.0, 0.5, 2.0, 0.25][:scales]
    for shape in ((2, 3, 300, 270), (1, 5, 9, 7), (700, 3, 12, 20)):
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
