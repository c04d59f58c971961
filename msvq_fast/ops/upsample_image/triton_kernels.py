"""The last layer of a decoder in Triton: custom ops, launches and what they are compiled for."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from msvq_fast.ops.backend import KernelVariant, kernel_op
from msvq_fast.ops.upsample_image.triton_backward import gradient_kernel, sum_kernel
from msvq_fast.ops.upsample_image.triton_forward import image_kernel

__all__ = ["unsupported", "upsample_image", "upsample_image_backward", "variants"]

WIDTHS = (16, 32, 64, 128)
HALF = {torch.bfloat16: "*bf16", torch.float16: "*fp16"}
TYPES = {**HALF, torch.float32: "*fp32"}
PROGRAMS = 396
"""Of the gradients, each with a part of the sums: three on each of 132 multiprocessors."""
MOST_ROWS = 24
"""Row pairs of a strip; each strip reads one row of features more than it has."""
ENOUGH = 1024
"""Programs of the forward; below, strips are shorter."""
_PARTS = 32  # that are added at once

# By what triton.jit made of the kernels: Triton 3.3, of PyTorch 2.7, has no triton.knobs.
_INTERPRETED = not isinstance(image_kernel, triton.JITFunction)


class Shape(NamedTuple):
    """Column pairs (or features) of a tile, and how it is run."""

    block: int
    warps: int = 4
    stages: int = 1


FORWARD = {16: Shape(128, 4, 2), 32: Shape(128, 4, 2), 64: Shape(64, 4, 2), 128: Shape(64, 4, 2)}
BACKWARD = {16: Shape(64), 32: Shape(64, 4, 2), 64: Shape(64, 4, 2), 128: Shape(64, 8, 2)}


def unsupported(x: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    """Why this call cannot run here, or None; autocast has cast ``x``, not the others."""
    if x.device.type != "cuda" and not (_INTERPRETED and x.device.type == "cpu"):
        return f"the Triton kernel runs on CUDA tensors, x is on {x.device}"
    if x.dtype not in HALF and not (_INTERPRETED and x.dtype == torch.float32):
        return f"the Triton kernel takes bfloat16 or float16, x is {x.dtype}"
    if _INTERPRETED and x.dtype == torch.bfloat16:
        return "Triton's interpreter has no bfloat16 products"
    if weight.dtype not in TYPES or bias.dtype not in TYPES:
        return f"the Triton kernel takes no weight of {weight.dtype} with a bias of {bias.dtype}"
    if x.shape[1] not in WIDTHS:
        return f"the Triton kernel takes a power of two from 16 to 128 channels, not {x.shape[1]}"
    if not x.is_contiguous(memory_format=torch.channels_last):
        return "the Triton kernel takes x in channels_last"
    return None


def upsample_image(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The image, channels_last."""
    return _upsample_image(x, weight, bias)


def upsample_image_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of ``x``, ``weight`` and ``bias`` (in float32) asked for."""
    need_x, need_w = wanted[0], wanted[1] or wanted[2]
    grad_x, grad_w, grad_b = _upsample_image_backward(grad_out, x, weight, need_x, need_w)
    grads = (grad_x, grad_w, grad_b)
    x_, w_, b_ = (g if want else None for g, want in zip(grads, wanted, strict=True))
    return x_, w_, b_


def _empty_image(x: Tensor) -> Tensor:
    b, _, h, w = x.shape
    layout = torch.channels_last
    return torch.empty((b, 3, 2 * h, 2 * w), dtype=x.dtype, device=x.device, memory_format=layout)


@kernel_op("upsample_image_triton")
def _upsample_image(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    out = _empty_image(x)
    if out.numel() == 0:
        return out
    batch, channels, height, width = x.shape
    made = FORWARD[channels]
    across = batch * triton.cdiv(width + 1, made.block)
    rows = max(1, min(MOST_ROWS, across * (height + 1) // ENOUGH))
    strips = triton.cdiv(height + 1, rows)
    arguments = (
        x, weight, bias.contiguous(), out, height, width, strips, rows, *weight.stride()
    )  # fmt: skip
    constants = {"C": channels, "BLOCK": made.block}
    _launch(image_kernel, across * strips, arguments, constants, made)
    return out


torch.library.register_fake(_upsample_image, lambda x, *_: _empty_image(x))


def _empty_grads(
    x: Tensor, weight: Tensor, need_x: bool, need_w: bool
) -> tuple[Tensor, Tensor, Tensor]:
    layout = torch.channels_last
    grad_x = torch.empty_like(x, memory_format=layout) if need_x else x.new_empty(0)
    if not need_w:
        return grad_x, weight.new_empty(0), weight.new_empty(0)
    return grad_x, torch.empty_like(weight), x.new_empty(3, dtype=torch.float32)


@kernel_op("upsample_image_backward_triton")
def _upsample_image_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_w: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_w, grad_b = grads = _empty_grads(x, weight, need_x, need_w)
    if x.numel() == 0:
        grad_w.zero_()
        grad_b.zero_()
        return grads
    batch, channels, height, width = x.shape
    made = BACKWARD[channels]
    programs = min(PROGRAMS, batch * height * triton.cdiv(width, made.block))
    parts_w = torch.empty(
        (programs, channels, 64) if need_w else (1,), dtype=torch.float32, device=x.device
    )
    parts_b = torch.empty((programs, 4), dtype=torch.float32, device=x.device)
    arguments = (
        x, grad_out.contiguous(memory_format=torch.channels_last), weight,
        grad_x if need_x else x, parts_w, parts_b, batch, height, width, *weight.stride(),
    )  # fmt: skip
    constants = {"C": channels, "BLOCK": made.block, "NEED_X": need_x, "NEED_W": need_w}
    _launch(gradient_kernel, programs, arguments, constants, made)
    if need_w:
        sums = (parts_w, parts_b, grad_w, grad_b, programs, *grad_w.stride())
        _launch(sum_kernel, channels + 1, sums, {"C": channels, "PARTS": _PARTS}, Shape(1))
    return grads


torch.library.register_fake(
    _upsample_image_backward,
    lambda grad_out, x, weight, need_x, need_w: _empty_grads(x, weight, need_x, need_w),
)


def _launch(
    kernel: Any, programs: int, arguments: tuple[Any, ...], constants: dict[str, Any], made: Shape
) -> None:
    with torch.cuda.device_of(arguments[0]):
        kernel[(programs,)](*arguments, **constants, num_warps=made.warps, num_stages=made.stages)


def variants() -> list[KernelVariant]:
    """The kernels of every width and dtype as they are compiled ahead of time."""
    out = [_variant(sum_kernel, "float32", "*fp32", {"C": 64, "PARTS": _PARTS}, Shape(1))]
    for dtype, kind in HALF.items():
        for channels in WIDTHS:
            label = f"{str(dtype).removeprefix('torch.')} c{channels}"
            made = FORWARD[channels]
            constants = {"C": channels, "BLOCK": made.block}
            out.append(_variant(image_kernel, label, kind, constants, made))
            made = BACKWARD[channels]
            for need_x, need_w in ((True, True), (False, True), (True, False)):
                of = "" if need_x and need_w else " x alone" if need_x else " weight alone"
                constants = {
                    "C": channels, "BLOCK": made.block, "NEED_X": need_x, "NEED_W": need_w
                }  # fmt: skip
                out.append(_variant(gradient_kernel, label + of, kind, constants, made))
    return out


def _variant(
    kernel: Any, label: str, kind: str, constants: dict[str, Any], made: Shape
) -> KernelVariant:
    def type_of(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in ("x", "grad", "grad_x", "out"):
            return kind
        return "*fp32" if name in ("w", "b", "grad_w", "grad_b", "parts_w", "parts_b") else "i32"

    return KernelVariant(
        name=f"{kernel.__name__} {label}",
        kernel=kernel,
        signature={name: type_of(name) for name in kernel.arg_names},
        constants=constants,
        num_warps=made.warps,
        num_stages=made.stages,
        tensor_cores=kernel is not sum_kernel,
    )
