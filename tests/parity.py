"""The one comparison with the references: values and gradients against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

EPS = {
    torch.float64: 2.0**-52,
    torch.float32: 2.0**-23,
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-7,
}


def assert_close(name: str, got: Tensor, want: Tensor, *, ulps: float = 8.0) -> None:
    """``|got - want| <= ulps * eps(dtype of got) * max|want|``; ``want`` is the float64 truth."""
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)} != {tuple(want.shape)}"
    if got.numel() == 0:
        return
    want = want.double()
    scale = want.abs().max().clamp_min(torch.finfo(got.dtype).tiny)
    error = (got.double() - want).abs().max()
    limit = ulps * EPS[got.dtype] * scale
    assert bool(error <= limit), f"{name}: error {error:.3e} > {limit:.3e} ({ulps} ulps of {scale})"


def assert_matches_reference(
    function: Callable[..., Any],
    inputs: Sequence[Tensor],
    *,
    backend: str,
    ulps: float = 8.0,
    **kwargs: Any,
) -> None:
    """Compare ``function(*inputs, backend=...)`` with its reference in float64.

    Values and the gradient of every floating input, for a fixed random upstream gradient. The
    gradients of a low-precision image are judged in that precision.
    """
    mine = [t.detach().clone(memory_format=torch.preserve_format) for t in inputs]
    truth = [t.detach().double() if t.is_floating_point() else t.detach() for t in inputs]
    differentiable = [t.is_floating_point() for t in inputs]
    for group in (mine, truth):
        for tensor, grad in zip(group, differentiable, strict=True):
            tensor.requires_grad_(grad)
    got = function(*mine, backend=backend, **kwargs)
    want = function(*truth, backend="reference", **kwargs)
    assert_close("value", got, want, ulps=ulps)
    upstream = torch.randn(want.shape, dtype=torch.float64, generator=_generator())
    upstream = upstream.to(got.dtype)
    got.backward(upstream)
    want.backward(upstream.double())
    for i, grad in enumerate(differentiable):
        if grad:
            assert mine[i].grad is not None and truth[i].grad is not None
            assert_close(f"grad of input {i}", mine[i].grad, truth[i].grad, ulps=2 * ulps)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)
