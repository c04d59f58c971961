"""The last layer of a decoder: contract, checks, choice of kernel, gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msvq_fast.ops.backend import Op
from msvq_fast.ops.checks import InputError, check_image, check_same_device
from msvq_fast.ops.upsample_image import reference

OP = Op(__package__, slow_reference=False)


def upsample_image(
    x: Tensor, weight: Tensor, bias: Tensor, *, backend: str | None = None
) -> Tensor:
    """Make an image of twice the size, as ``ConvTranspose2d(C, 3, 4, stride=2, padding=1)`` does.

    Args:
        x: ``(B, C, H, W)`` features, float32, float64, bfloat16 or float16, any H, W >= 1. The
            kernel takes them in channels_last, in bfloat16 or float16, C a power of two of 16 to
            128; others run PyTorch's convolution.
        weight: ``(C, 3, 4, 4)``, as of `torch.nn.ConvTranspose2d`.
        bias: ``(3,)``.
        backend: ``None`` picks; ``"reference"``, which is PyTorch's convolution, or ``"triton"``
            runs or raises.

    Returns:
        ``(B, 3, 2H, 2W)`` in the dtype of ``x``, channels_last where ``x`` is.

    Autocast:
        As of `torch.nn.functional.conv_transpose2d`: the inputs but float64 ones are cast first.
        The kernel rounds weight and bias as it reads them: there is no copy.

    Gradient:
        To all three, twice differentiable; those of weight and bias are in their own dtypes. Only
        ``x`` and ``weight`` are kept for it.

    Drop-in:
        ``F.conv_transpose2d(x, weight, bias, stride=2, padding=1)``.

    Raises:
        InputError: For a wrong shape, or dtypes or devices that differ.

    Numerics:
        The kernel's products are summed in float32, the bias is added there, and the sum is rounded
        once. Gradients of weight and bias are summed in float32 in a fixed order, with no atomics:
        deterministic on one kind of GPU. They are not rounded to the dtype of ``x``.
    """
    check_image("x", x)
    if x.shape[1] < 1:
        raise InputError(f"x has shape {tuple(x.shape)}; expected at least one channel")
    for name, tensor, shape in (("weight", weight, (x.shape[1], 3, 4, 4)), ("bias", bias, (3,))):
        if tuple(tensor.shape) != shape:
            raise InputError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}")
    check_same_device(x=x, weight=weight, bias=bias)
    dtype = _dtype(x)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if _dtype(tensor) != dtype:
            raise InputError(f"{name} has dtype {tensor.dtype} but x has {x.dtype}")
    x = x.to(dtype)
    chosen = OP.pick(x, weight, bias, backend=backend)
    if chosen == "reference":
        return reference.upsample_image(x, weight, bias)
    return _UpsampleImage.apply(x, weight, bias, chosen)


def _dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which a convolution takes a tensor."""
    device = tensor.device.type
    castable = tensor.is_floating_point() and tensor.dtype != torch.float64
    if castable and device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return tensor.dtype


class _UpsampleImage(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.backend, ctx.bias_dtype = backend, bias.dtype
        return OP.kernels[backend].upsample_image(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        if torch.is_grad_enabled():  # for a second derivative
            two, one = [2, 2], [1, 1]
            grads = torch.ops.aten.convolution_backward(
                grad_out, x, weight.to(x.dtype), [3], two, one, one, True, [0, 0], 1, wanted
            )
        else:
            grads = OP.kernels[ctx.backend].upsample_image_backward(grad_out, x, weight, wanted)
        dtypes = (x.dtype, weight.dtype, ctx.bias_dtype)
        given = zip(grads, wanted, dtypes, strict=True)
        return (*(grad.to(dtype) if want else None for grad, want, dtype in given), None)
