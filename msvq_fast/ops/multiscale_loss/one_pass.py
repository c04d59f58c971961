"""The multi-scale loss and its gradients together, a part of the batch at a time.

Blurred targets, partial sums and differences exist for about a million values at once, whatever the
batch; what is kept for the backward is one image per contribution, in its dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from msvq_fast.ops.checks import accumulation_dtype
from msvq_fast.ops.multiscale_loss.reference import Blur, blurred_targets

_PART = 1 << 20  # values
Part = tuple[slice, slice]


def power_of_weights(weights: Sequence[float]) -> float:
    """The power of two at or below the sum of their sizes; 1 where that is 0 or not finite."""
    total = sum(abs(weight) for weight in weights)
    return 2.0 ** (math.frexp(total)[1] - 1) if 0 < total < math.inf else 1.0


def multiscale_loss(
    contributions: Sequence[Tensor],
    x: Tensor,
    blur: Blur,
    weights: Sequence[float],
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """As the reference, of images ``x`` in place of targets."""
    # torch.compile miscounts the arguments of an autograd.Function with two contributions that
    # need no gradient.
    if not (torch.is_grad_enabled() and any(c.requires_grad for c in contributions)):
        loss, per_scale, _ = _run(x, blur, weights, reduction, contributions, False)
        return loss, per_scale
    return _OnePass.apply(x, blur, weights, reduction, *contributions)


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        blur: Blur,
        weights: Sequence[float],
        reduction: str,
        *contributions: Tensor,
    ) -> tuple[Tensor, Tensor]:
        loss, per_scale, sums = _run(x, blur, weights, reduction, contributions, True)
        ctx.factor = 2.0 * power_of_weights(weights)
        if reduction == "mean":
            ctx.factor /= max(x.numel(), 1)
        ctx.save_for_backward(*sums)
        ctx.mark_non_differentiable(per_scale)
        return loss, per_scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        factor = grad_loss * ctx.factor
        grads: list[Tensor | None] = []
        for i, running in enumerate(ctx.saved_tensors):
            needed = ctx.needs_input_grad[4 + i]
            grads.append((running.to(factor.dtype) * factor).to(running.dtype) if needed else None)
        return None, None, None, None, *grads


def _run(
    x: Tensor,
    blur: Blur,
    weights: Sequence[float],
    reduction: str,
    contributions: Sequence[Tensor],
    wanted: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The loss, its terms and, if ``wanted``, the gradients without their factor."""
    dtype = accumulation_dtype(contributions[0].dtype)
    # Sums of differences of order 1: half precision would lose them divided by the count, or
    # multiplied by a large weight.
    power = power_of_weights(weights)
    sums = [torch.zeros_like(c) for c in contributions] if wanted else []
    squares = []
    for images, channels in _parts(x):
        part = [c[images, channels] for c in contributions]
        targets = blurred_targets(x[images, channels], len(part), dtype, blur)
        differences = _differences(part, targets)
        squares.append(torch.stack([d.square().sum() for d in differences]))
        running: Tensor | None = None
        for m in reversed(range(len(sums))):
            weighted = differences.pop() * (weights[m] / power)
            running = weighted if running is None else running + weighted
            sums[m][images, channels] = running
    per_scale = torch.stack(squares).sum(0)  # (M,)
    if reduction == "mean":
        per_scale = per_scale / x.numel()
    return (per_scale * per_scale.new_tensor(weights)).sum(), per_scale, sums


def _differences(contributions: Sequence[Tensor], targets: Sequence[Tensor]) -> list[Tensor]:
    """Every partial sum minus its target, in the dtype of the targets."""
    partial: Tensor | None = None
    differences = []
    for contribution, target in zip(contributions, targets, strict=True):
        mine = contribution.to(target.dtype)
        partial = mine if partial is None else partial + mine
        differences.append(partial - target)
    return differences


def _parts(x: Tensor) -> Iterator[Part]:
    """Images, or single channels of single images where those are large."""
    batch, channels, height, width = x.shape
    images = max(1, _PART // max(1, channels * height * width))
    width_of_part = max(channels, 1) if channels * height * width <= _PART else 1
    for b in range(0, max(batch, 1), images):
        for c in range(0, max(channels, 1), width_of_part):
            yield slice(b, b + images), slice(c, c + width_of_part)
