"""What the multi-scale loss's kernels are called with and compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from msvq_fast.ops.multiscale_loss.op import OP
from tests.ops.blur_cases import dense_blur, taps

LAYOUTS = (torch.contiguous_format, torch.channels_last)
WEIGHTS = (1.0, 0.5, 2.0, 0.25)


def arguments_of(  # type: ignore[no-untyped-def]
    contributions, x, grads, weights, border, radius, factors, upstream, partials, out
):
    """``out`` is the loss, then the term of every scale, or None."""
    native = OP.kernels["native"]
    batch, channels, height, width = x.shape
    nchw = x.is_contiguous()
    pointers = (upstream, partials, out, None if out is None else out[1:])
    return native._C.MultiscaleLossArguments(
        x.data_ptr(),
        native.IMAGE_TYPES[x.dtype],
        [c.data_ptr() for c in contributions],
        [0 if g is None else g.data_ptr() for g in grads],
        native.IMAGE_TYPES[contributions[0].dtype],
        (batch * channels if nchw else batch, height, width, 1 if nchw else channels),
        taps(2 * radius + 1),
        native.BORDERS[border],
        weights,
        factors,
        *(0 if p is None else p.data_ptr() for p in pointers),
    )


def closed_form(
    contributions: list[Tensor], x: Tensor, weights: list[float], border: str, radius: int,
    reduction: str = "mean",
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Loss and terms, and gradients, in float64 with the blur as a dense operator."""
    image = x.double() / 127.5 - 1 if x.dtype == torch.uint8 else x.double()
    targets = [image]
    for _ in contributions[1:]:
        size = taps(2 * radius + 1)
        targets.insert(0, dense_blur(targets[0], size, size, border))
    partial, differences = torch.zeros_like(image), []
    for contribution, target in zip(contributions, targets, strict=True):
        partial = partial + contribution.double()
        differences.append(partial - target)
    count = x.numel() if reduction == "mean" else 1
    terms = torch.stack([d.square().sum() / count for d in differences])
    loss = (terms * torch.tensor(weights, dtype=torch.float64)).sum()
    grads = [
        sum(2 * w * d for w, d in zip(weights[j:], differences[j:], strict=True)) / count
        for j in range(len(contributions))
    ]
    return torch.cat([loss[None], terms]), grads


def inputs(
    shape: tuple[int, ...], scales: int, layout: torch.memory_format = LAYOUTS[0],
    x_dtype: torch.dtype = torch.float32, dtype: torch.dtype = torch.float32,
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    x = torch.randn(shape).to(x_dtype) if x_dtype != torch.uint8 else None
    if x is None:
        x = torch.randint(0, 256, shape, dtype=torch.uint8)
    contributions = [torch.randn(shape).to(dtype) for _ in range(scales)]
    return (
        [c.to(memory_format=layout) for c in contributions],
        x.to(memory_format=layout),
    )
