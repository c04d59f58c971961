"""The one-pass loss of csrc/multiscale_loss: C++ on CPU tensors, CUDA C++ on CUDA tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from msvq_fast import _C
from msvq_fast.ops.backend import kernel_op
from msvq_fast.ops.gaussian_blur.native import BORDERS, CPU_MAX_TAPS, IMAGE_TYPES
from msvq_fast.ops.multiscale_loss.one_pass import power_of_weights

_MAX_SCALES = 4
# Whether Hopper GPUs blur on their tensor cores where they can (multiscale_loss_hopper.h).
TENSOR_CORES = True


def unsupported(
    contributions: Sequence[Tensor], x: Tensor, taps: Sequence[float], border: str
) -> str | None:
    """Why this call cannot run here, or None."""
    if x.device.type not in ("cpu", "cuda"):
        return f"the kernels run on CPU and CUDA tensors, x is on {x.device}"
    if len(contributions) > _MAX_SCALES:
        return f"the kernels take up to {_MAX_SCALES} scales, there are {len(contributions)}"
    if x.dtype not in IMAGE_TYPES:
        return f"the kernels take x in float32, float16, bfloat16 or uint8, it is {x.dtype}"
    dtype = contributions[0].dtype
    if dtype not in IMAGE_TYPES:
        return f"the kernels take float32, float16 or bfloat16, contributions are {dtype}"
    if x.device.type == "cpu":
        few = len(taps) <= CPU_MAX_TAPS
        return None if few else f"the CPU kernel takes up to {CPU_MAX_TAPS} taps"
    if not hasattr(_C, "multiscale_loss_cuda"):
        return "msvq_fast._C was built without CUDA (no nvcc was found)"
    if not torch.compiler.is_compiling() and not _fits(len(contributions), len(taps), border, x):
        # torch.compile cannot trace the question; there a launch that does not fit raises
        return f"{len(contributions)} scales of {len(taps)} taps do not fit the GPU's shared memory"
    if x.shape[1] * x.shape[3] >= 2**31:
        return "the CUDA kernel takes rows of fewer than 2**31 values"
    return None


def _fits(num_scales: int, taps: int, border: str, x: Tensor) -> bool:
    if (x.device.index or 0) >= torch.cuda.device_count():  # a fake tensor's: nothing is launched
        return True
    properties: Any = torch.cuda.get_device_properties(x.device)  # torch's stubs lack this one
    room = properties.shared_memory_per_block_optin
    return _C.multiscale_loss_cuda_fits(num_scales, taps, BORDERS[border], room)


def multiscale_loss(
    contributions: Sequence[Tensor],
    x: Tensor,
    taps: Sequence[float],
    border: str,
    weights: Sequence[float],
    reduction: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Loss ``()``, the term of every scale ``(M,)`` and the ``wanted`` gradients, from one pass.

    The gradients are finished by `scale_`.
    """
    return _forward(
        list(contributions), x, list(taps), border, list(weights), reduction, list(wanted)
    )


def multiscale_loss_backward(
    grad_loss: Tensor,
    contributions: Sequence[Tensor],
    x: Tensor,
    taps: Sequence[float],
    border: str,
    weights: Sequence[float],
    reduction: str,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """The ``wanted`` gradients times ``grad_loss ()``, which is read on its device."""
    return _backward(
        grad_loss, list(contributions), x, list(taps), border, list(weights), reduction,
        list(wanted),
    )  # fmt: skip


def scale_(
    grads: Sequence[Tensor], grad_loss: Tensor, weights: Sequence[float], reduction: str
) -> None:
    """Multiply stored gradients by ``grad_loss`` and the factor they lack, unless that makes 1."""
    _scale(list(grads), grad_loss, list(weights), reduction)


def _factors(like: Tensor, weights: Sequence[float], reduction: str) -> tuple[float, float]:
    """Factors of the sums over the elements of ``like``, and of gradients as they are stored.

    Gradients of a mean vanish in float16 before a loss scale reaches them, and those of large
    weights overflow: there they are stored as if the weights were of order 1, and of sums. Worked
    out here, where a number of elements is a number and no symbol of a compiler.
    """
    factor = 1.0
    if reduction == "mean":
        factor = 1 / like.numel() if like.numel() else float("inf")
    return factor, 1 / power_of_weights(weights) if like.dtype == torch.float16 else factor


@kernel_op("multiscale_loss_native", "cpu", "cuda")
def _forward(
    contributions: list[Tensor],
    x: Tensor,
    taps: list[float],
    border: str,
    weights: list[float],
    reduction: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    contributions = _dense(contributions)
    grads = _grads(contributions, wanted)
    loss = x.new_empty((), dtype=torch.float32)
    per_scale = x.new_empty(len(contributions), dtype=torch.float32)
    cuda = x.device.type == "cuda"
    partials = x.new_empty(_C.MULTISCALE_LOSS_PARTIALS if cuda else 0, dtype=torch.float64)
    x = _like(x, contributions[0])
    _run(
        _arguments(
            contributions, x, grads, wanted, taps, border, weights,
            _factors(contributions[0], weights, reduction), 0, partials.data_ptr(), loss.data_ptr(),
            per_scale.data_ptr(),
        ),
        x,
    )  # fmt: skip
    return loss, per_scale, grads


torch.library.register_fake(
    _forward,
    lambda contributions, x, *settings: (
        x.new_empty((), dtype=torch.float32),
        x.new_empty(len(contributions), dtype=torch.float32),
        _grads(_dense(contributions), settings[-1]),
    ),
)


@kernel_op("multiscale_loss_backward_native", "cpu", "cuda")
def _backward(
    grad_loss: Tensor,
    contributions: list[Tensor],
    x: Tensor,
    taps: list[float],
    border: str,
    weights: list[float],
    reduction: str,
    wanted: list[bool],
) -> list[Tensor]:
    contributions = _dense(contributions)
    grads = _grads(contributions, wanted)
    x = _like(x, contributions[0])
    factor, _ = _factors(x, weights, reduction)
    _run(
        _arguments(
            contributions, x, grads, wanted, taps, border, weights, (1.0, factor),
            grad_loss.data_ptr(), 0, 0, 0,
        ),
        x,
    )  # fmt: skip
    return grads


torch.library.register_fake(
    _backward,
    lambda _, contributions, *settings: _grads(_dense(contributions), settings[-1]),
)


@kernel_op("multiscale_loss_scale_native", "cpu", "cuda", mutates=("grads",))
def _scale(grads: list[Tensor], grad_loss: Tensor, weights: list[float], reduction: str) -> None:
    factor, stored = _factors(grads[0], weights, reduction)
    late = factor / stored
    if grad_loss.device.type == "cpu":
        scale = late * float(grad_loss)
        if scale != 1:
            for grad in grads:
                grad.mul_(scale)
        return
    arguments = _C.MultiscaleLossArguments(
        0,
        IMAGE_TYPES[grads[0].dtype],
        [0] * len(grads),
        [grad.data_ptr() for grad in grads],
        IMAGE_TYPES[grads[0].dtype],
        (1, 1, 1, grads[0].numel()),
        [1.0],
        0,
        [1.0] * len(grads),
        (1.0, late),
        grad_loss.data_ptr(),
        0,
        0,
        0,
    )
    with torch.cuda.device(grad_loss.device):
        stream = torch.cuda.current_stream().cuda_stream
        _C.multiscale_loss_scale_cuda(arguments, grad_loss.device.index, stream)


torch.library.register_fake(_scale, lambda *_: None)


def _run(arguments: _C.MultiscaleLossArguments, x: Tensor) -> None:
    if x.device.type == "cpu":
        _C.multiscale_loss_cpu(arguments, torch.get_num_threads())
        return
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        tensor_cores = TENSOR_CORES and torch.cuda.get_device_capability() == (9, 0)
        _C.multiscale_loss_cuda(arguments, x.device.index, stream, tensor_cores)


def _arguments(
    contributions: list[Tensor],
    x: Tensor,
    grads: list[Tensor],
    wanted: list[bool],
    taps: list[float],
    border: str,
    weights: list[float],
    factors: tuple[float, float],
    upstream: int,
    partials: int,
    loss: int,
    per_scale: int,
) -> _C.MultiscaleLossArguments:
    batch, channels, height, width = x.shape
    planes, inner = (batch * channels, 1) if x.is_contiguous() else (batch, channels)
    places = iter(grads)
    return _C.MultiscaleLossArguments(
        x.data_ptr(),
        IMAGE_TYPES[x.dtype],
        [c.data_ptr() for c in contributions],
        [next(places).data_ptr() if asked else 0 for asked in wanted],
        IMAGE_TYPES[contributions[0].dtype],
        (planes, height, width, inner),
        taps,
        BORDERS[border],
        weights,
        factors,
        upstream,
        partials,
        loss,
        per_scale,
    )


def _dense(contributions: list[Tensor]) -> list[Tensor]:
    """All contiguous or all channels_last, copied where they are not."""
    last = all(c.is_contiguous(memory_format=torch.channels_last) for c in contributions)
    return contributions if last else [c.contiguous() for c in contributions]


def _like(x: Tensor, contribution: Tensor) -> Tensor:
    """``x`` in the memory layout of the contributions."""
    layout = torch.contiguous_format if contribution.is_contiguous() else torch.channels_last
    return x.contiguous(memory_format=layout)


def _grads(contributions: list[Tensor], wanted: list[bool]) -> list[Tensor]:
    return [torch.empty_like(c) for c, asked in zip(contributions, wanted, strict=True) if asked]
