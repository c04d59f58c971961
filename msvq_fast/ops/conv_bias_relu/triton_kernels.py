"""cuDNN's convolution with bias, residual and ReLU in its own last step, or in one Triton pass.

cuDNN adds what belongs to a convolution before it writes the output, if only the ReLU is wanted.
Otherwise, and for transposed convolutions, one pass over its output adds it. Backward one pass
applies the ReLU's mask and sums the bias's gradient.
"""

from __future__ import annotations

import re

import torch
import triton
import triton.language as tl
from torch import Tensor

from msvq_fast.ops.backend import KernelVariant, kernel_op
from msvq_fast.ops.conv_bias_relu.reference import output_size

__all__ = [
    "apply_mask",
    "conv_bias_relu",
    "convolve",
    "mask_and_sum",
    "unsupported",
    "variants",
]

DTYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
MOST_CHANNELS = 2048
_ELEMENTS = 4096  # of a step of a program
_PROGRAMS = 2112  # of the backward, whatever the GPU: a sum's order follows from them
_FUSED = (torch.float16, torch.bfloat16)  # by cuDNN
_ALIGNED = 8  # channels, 16 bytes: what its fused convolutions take
_NO_ENGINE = re.compile("unable to find an engine|not_supported|not compiled with", re.IGNORECASE)
_refused: set[tuple[object, ...]] = set()  # calls that cuDNN has no fused convolution for


@triton.jit(do_not_specialize=["rows"])
def add_and_relu(
    y_ptr,  # (rows, channels): a convolution's output
    bias_ptr,  # (channels,)
    residual_ptr,  # (rows, channels)
    sum_ptr,  # (rows, channels), may be y
    relu_ptr,  # (rows, channels), may be y
    rows,
    CHANNELS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SUM: tl.constexpr,
    RELU: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Write y + bias + residual, its ReLU or both."""
    first = tl.program_id(0) * BR
    row = tl.arange(0, BR)
    channel = tl.arange(0, BC)
    start = tl.cast(first, tl.int64) * CHANNELS
    at = row[:, None] * CHANNELS + channel[None, :]
    mask = (row < rows - first)[:, None] & (channel < CHANNELS)[None, :]
    bias = tl.load(bias_ptr + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)
    total = tl.load(y_ptr + start + at, mask=mask, other=0.0).to(tl.float32) + bias[None, :]
    if RESIDUAL:
        total += tl.load(residual_ptr + start + at, mask=mask, other=0.0).to(tl.float32)
    if SUM:
        tl.store(sum_ptr + start + at, total.to(sum_ptr.dtype.element_ty), mask=mask)
    if RELU:
        total = tl.where(total <= 0, 0.0, total)  # NaN stays NaN
        tl.store(relu_ptr + start + at, total.to(relu_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def mask_and_sum_rows(
    relu_ptr,  # (rows, channels): the ReLU's output
    grad_sum_ptr,  # (rows, channels)
    grad_relu_ptr,  # (rows, channels)
    grad_ptr,  # (rows, channels)
    part_ptr,  # (programs, channels)
    rows,
    CHANNELS: tl.constexpr,
    SUM: tl.constexpr,
    RELU: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """The gradient before the ReLU, and every program's part of its sum over rows."""
    row = tl.arange(0, BR)
    channel = tl.arange(0, BC)
    at = row[:, None] * CHANNELS + channel[None, :]
    total = tl.zeros((BR, BC), tl.float32)
    for step in range(tl.program_id(0), tl.cdiv(rows, BR), tl.num_programs(0)):
        start = tl.cast(step, tl.int64) * (BR * CHANNELS)
        mask = (row < rows - step * BR)[:, None] & (channel < CHANNELS)[None, :]
        if SUM:
            grad = tl.load(grad_sum_ptr + start + at, mask=mask, other=0.0)
        if RELU:
            passed = tl.load(grad_relu_ptr + start + at, mask=mask, other=0.0)
            y = tl.load(relu_ptr + start + at, mask=mask, other=0.0)
            passed = tl.where(y <= 0, 0.0, passed)  # as PyTorch, where y is NaN
            grad = (grad.to(tl.float32) + passed).to(grad_ptr.dtype.element_ty) if SUM else passed
            tl.store(grad_ptr + start + at, grad, mask=mask)
        total += grad.to(tl.float32)
    part = part_ptr + tl.program_id(0) * CHANNELS + channel
    tl.store(part, tl.sum(total, 0), mask=channel < CHANNELS)


# By what triton.jit made of the kernels: Triton 3.3, of PyTorch 2.7, has no triton.knobs.
_INTERPRETED = not isinstance(add_and_relu, triton.JITFunction)


def unsupported(x: Tensor, weight: Tensor, bias: Tensor, transposed: bool) -> str | None:
    """Why this call cannot run here, or None; tensors of the type that is computed in."""
    if x.device.type != "cuda" and not (_INTERPRETED and x.device.type == "cpu"):
        return f"the Triton kernel runs on CUDA tensors, x is on {x.device}"
    if x.dtype not in DTYPES:
        return f"the Triton kernel takes float32, float16 or bfloat16, x is {x.dtype}"
    if _INTERPRETED and x.dtype == torch.bfloat16:
        return "Triton's interpreter does not round bfloat16 as a GPU does"
    if not x.is_contiguous(memory_format=torch.channels_last):
        return f"the Triton kernel takes x in channels_last, its strides are {tuple(x.stride())}"
    channels = weight.shape[1 if transposed else 0]
    if channels > MOST_CHANNELS:
        return f"the Triton kernel makes at most {MOST_CHANNELS} channels, not {channels}"
    return None


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    stride: int,
    padding: int,
    transposed: bool,
    want: str,
) -> tuple[Tensor, Tensor]:
    """The sum and its ReLU in channels_last; what is not wanted is empty."""
    steps = ([stride] * 2, [padding] * 2, [1, 1])
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    if want == "relu" and not transposed:
        fused = _fused(x, weight, bias, residual, steps)
        if fused is not None:
            return x.new_empty(0), fused
    y = torch.convolution(x, weight, None, *steps, transposed, [0, 0], 1)
    y = y.contiguous(memory_format=torch.channels_last)
    relu = torch.empty_like(y) if want == "both" else y
    channels, rows = y.shape[1], y.numel() // max(y.shape[1], 1)
    if rows:
        shape = _block(channels)
        with torch.cuda.device_of(y):
            add_and_relu[(triton.cdiv(rows, shape["BR"]),)](
                y, bias.contiguous(), y if residual is None else residual, y, relu, rows,
                channels, residual is not None, want != "relu", want != "sum", **shape,
            )  # fmt: skip
    none = x.new_empty(0)
    return none if want == "relu" else y, none if want == "sum" else relu


conv_bias_relu = kernel_op("conv_bias_relu_triton")(convolve)


def _empty_outputs(
    x: Tensor, weight: Tensor, stride: int, padding: int, transposed: bool, want: str
) -> tuple[Tensor, Tensor]:
    size, last = output_size(x, weight, stride, padding, transposed), torch.channels_last
    total, relu = (
        x.new_empty(0) if want == other else x.new_empty(size).to(memory_format=last)
        for other in ("relu", "sum")
    )
    return total, relu


torch.library.register_fake(
    conv_bias_relu, lambda x, weight, bias, residual, *steps: _empty_outputs(x, weight, *steps)
)


def _fused(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    steps: tuple[list[int], list[int], list[int]],
) -> Tensor | None:
    """What cuDNN makes of it in one kernel, or None where it has none.

    PyTorch lets cuDNN take any algorithm for it, whatever is said of deterministic ones.
    """
    if torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic:
        return None
    aligned = weight.shape[0] % _ALIGNED == 0 and weight.shape[1] % _ALIGNED == 0
    enabled = torch.backends.cudnn.enabled and torch.backends.cudnn.is_available()
    if not (x.is_cuda and enabled and x.dtype in _FUSED and aligned and x.numel()):
        return None
    call = (x.dtype, x.shape, weight.shape, *map(tuple, steps), residual is None, x.device)
    if call in _refused:
        return None
    bias = bias.to(x.dtype).contiguous()
    try:
        if residual is None:
            return torch.cudnn_convolution_relu(x, weight, bias, *steps, 1)
        return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *steps, 1)
    except RuntimeError as error:
        if not _NO_ENGINE.search(str(error)):
            raise
        _refused.add(call)
        return None


def apply_mask(
    relu: Tensor | None, grad_sum: Tensor | None, grad_relu: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradient before the ReLU, empty if that is ``grad_sum`` itself, and the bias's."""
    given = next(t for t in (grad_sum, grad_relu) if t is not None)
    channels, rows = given.shape[1], given.numel() // max(given.shape[1], 1)
    like = {"memory_format": torch.channels_last}
    masked = grad_relu is not None
    grad = torch.empty_like(given, **like) if masked else given.new_empty(0)
    if not rows:
        return grad, given.new_zeros(channels, dtype=torch.float32)
    tensors = [given if t is None else t.contiguous(**like) for t in (relu, grad_sum, grad_relu)]
    shape = _block(channels)
    programs = min(_PROGRAMS, triton.cdiv(rows, shape["BR"]))
    parts = given.new_empty(programs, channels, dtype=torch.float32)
    with torch.cuda.device_of(given):
        mask_and_sum_rows[(programs,)](
            *tensors, grad, parts, rows, channels, grad_sum is not None, masked, **shape
        )
    return grad, parts.sum(0)


mask_and_sum = kernel_op("conv_bias_relu_backward_triton")(apply_mask)


@torch.library.register_fake(mask_and_sum)
def _(
    relu: Tensor | None, grad_sum: Tensor | None, grad_relu: Tensor | None
) -> tuple[Tensor, Tensor]:
    given = next(t for t in (grad_sum, grad_relu) if t is not None)
    sums = given.new_empty(given.shape[1], dtype=torch.float32)
    if grad_relu is None:
        return given.new_empty(0), sums
    return torch.empty_like(given, memory_format=torch.channels_last), sums


def _block(channels: int) -> dict[str, int]:
    padded = max(triton.next_power_of_2(channels), 4)
    return {"BR": _ELEMENTS // padded, "BC": padded}


def variants() -> list[KernelVariant]:
    """What ``make kernels-check`` compiles."""
    found = []
    for dtype, pointer in DTYPES.items():
        for channels in (64, 96, 512):
            name = f"{str(dtype).removeprefix('torch.')}, {channels} channels"
            shape = _block(channels)
            forward = dict.fromkeys(
                ("y_ptr", "bias_ptr", "residual_ptr", "sum_ptr", "relu_ptr"), pointer
            )
            backward = dict.fromkeys(
                ("relu_ptr", "grad_sum_ptr", "grad_relu_ptr", "grad_ptr"), pointer
            )
            for kernel, types, flags in (
                (add_and_relu, forward, {"RESIDUAL": True, "SUM": True, "RELU": True}),
                (mask_and_sum_rows, {**backward, "part_ptr": "*fp32"}, {"SUM": True, "RELU": True}),
            ):
                constants = {"CHANNELS": channels, **flags, **shape}
                signature = {**types, "rows": "i32", **dict.fromkeys(constants, "constexpr")}
                found.append(
                    KernelVariant(f"{kernel.__name__} {name}", kernel, signature, constants)
                )
    return found
